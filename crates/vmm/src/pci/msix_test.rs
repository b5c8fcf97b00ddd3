use proptest::prelude::*;

use super::{MAX_VECTORS, MSIX_ENTRY_BYTES, MsiMessage, Msix};

const ENABLE: u16 = 0x8000;
const FUNCTION_MASK: u16 = 0x4000;

fn program(msix: &mut Msix, vector: u64, address: u64, data: u32, masked: bool) -> Option<MsiMessage> {
    let base = vector * MSIX_ENTRY_BYTES;
    assert_eq!(msix.write_table(base, &address.to_le_bytes()), None);
    assert_eq!(msix.write_table(base + 8, &data.to_le_bytes()), None);
    msix.write_table(base + 12, &u32::from(masked).to_le_bytes())
}

#[test]
fn delivers_only_when_enabled_and_unmasked() {
    let mut msix = Msix::new(3);
    assert_eq!(msix.control(), 2);
    program(&mut msix, 1, 0xfee0_0000, 0x41, false);
    assert_eq!(msix.trigger(1), None);
    assert!(msix.set_control(ENABLE).is_empty(), "an interrupt before MSI-X was enabled is not kept");
    assert_eq!(msix.trigger(1), Some(MsiMessage { address: 0xfee0_0000, data: 0x41 }));
    assert_eq!(msix.trigger(3), None);
    assert_eq!(msix.trigger(0xffff), None);
}

#[test]
fn masked_vectors_stay_pending_and_fire_once_when_unmasked() {
    let mut msix = Msix::new(2);
    msix.set_control(ENABLE);
    program(&mut msix, 0, 0xfee0_1000, 7, true);
    assert_eq!((msix.trigger(0), msix.trigger(0)), (None, None));
    let mut pending = [0; 8];
    msix.read_pending(0, &mut pending);
    assert_eq!(pending[0], 1);
    assert_eq!(msix.write_table(12, &[0; 4]), Some(MsiMessage { address: 0xfee0_1000, data: 7 }));
    assert_eq!(msix.write_table(12, &[0; 4]), None);
    msix.read_pending(0, &mut pending);
    assert_eq!(pending[0], 0);
}

#[test]
fn the_function_mask_holds_every_vector() {
    let mut msix = Msix::new(4);
    msix.set_control(ENABLE | FUNCTION_MASK);
    for vector in 0..4 {
        program(&mut msix, vector, 0xfee0_0000, vector as u32, vector == 3);
        assert_eq!(msix.trigger(vector as u16), None);
    }
    let released: Vec<u32> = msix.set_control(ENABLE).iter().map(|message| message.data).collect();
    assert_eq!(released, [0, 1, 2]);
}

#[test]
fn odd_accesses_are_ignored() {
    let mut msix = Msix::new(1);
    let before = msix.clone();
    msix.write_table(0, &[0xff; 2]);
    msix.write_table(2, &[0xff; 4]);
    msix.write_table(4, &[0xff; 8]);
    msix.write_table(16, &[0xff; 8]);
    msix.write_table(u64::MAX - 7, &[0xff; 8]);
    let mut read = [0; 16];
    msix.read_table(0, &mut read);
    let mut fresh = [0; 16];
    before.read_table(0, &mut fresh);
    assert_eq!(read, fresh);
}

proptest! {
    /// Against a plain model: a vector fires exactly when pending, enabled and unmasked.
    #[test]
    fn matches_a_model(
        vectors in 1u16..=MAX_VECTORS,
        steps in prop::collection::vec((0u8..4, any::<u16>(), any::<u32>(), any::<u64>()), 0..200),
    ) {
        let mut msix = Msix::new(vectors);
        let mut pending = vec![false; usize::from(vectors)];
        let mut masked = vec![true; usize::from(vectors)];
        let (mut enabled, mut all_masked) = (false, false);
        for (kind, number, word, wide) in steps {
            let vector = number % vectors;
            let index = usize::from(vector);
            match kind {
                0 => {
                    let sent = msix.trigger(vector).is_some();
                    let fires = enabled && !all_masked && !masked[index];
                    prop_assert_eq!(sent, fires);
                    pending[index] = !fires && (enabled || pending[index]);
                }
                1 => {
                    enabled = number & ENABLE != 0;
                    all_masked = number & FUNCTION_MASK != 0;
                    let sent = msix.set_control(number).len();
                    let mut expected = 0;
                    for vector in 0..usize::from(vectors) {
                        if enabled && !all_masked && pending[vector] && !masked[vector] {
                            pending[vector] = false;
                            expected += 1;
                        }
                    }
                    prop_assert_eq!(sent, expected);
                }
                2 => {
                    masked[index] = word & 1 != 0;
                    let sent = msix.write_table(u64::from(vector) * 16 + 12, &word.to_le_bytes()).is_some();
                    let fires = enabled && !all_masked && pending[index] && !masked[index];
                    pending[index] &= !fires;
                    prop_assert_eq!(sent, fires);
                }
                _ => {
                    let mut data = vec![0; (word % 17) as usize];
                    msix.read_table(wide, &mut data);
                    msix.read_pending(wide, &mut data);
                    if wide % 16 != 12 && wide % 16 != 8 {
                        msix.write_table(wide, &wide.to_le_bytes()[..(word % 9) as usize]);
                    }
                }
            }
        }
        let mut bits = [0; 8];
        msix.read_pending(0, &mut bits);
        let expected = pending.iter().enumerate().fold(0u64, |bits, (index, on)| bits | (u64::from(*on) << index));
        prop_assert_eq!(u64::from_le_bytes(bits), expected);
    }
}
