use proptest::prelude::*;

use super::{CONFIG_BYTES, ConfigSpace, Identity};

const SIZE: u64 = 0x8000;
const HOME: u64 = 0x40_0000_0000;

fn space() -> ConfigSpace {
    let mut space = ConfigSpace::new(Identity {
        vendor: 0x1af4,
        device: 0x1042,
        revision: 1,
        class: 0x01_00_00,
        subsystem_vendor: 0x1af4,
        subsystem: 0x0042,
    });
    space.set_bar(0, SIZE, HOME);
    space
}

fn write32(space: &mut ConfigSpace, offset: usize, value: u32) -> bool {
    space.write(offset, &value.to_le_bytes())
}

#[test]
fn identity_and_capability_chain() {
    let mut space = space();
    assert_eq!(space.u32_at(0), 0x1042_1af4);
    assert_eq!(space.u32_at(8), 0x0100_0001);
    assert_eq!(space.u16_at(6) & 0x10, 0);
    let first = space.add_capability(9, &[0; 14], &[]).unwrap();
    let second = space.add_capability(0x11, &[1; 10], &[0xff; 2]).unwrap();
    assert_eq!(space.u16_at(6) & 0x10, 0x10);
    let mut pointer = [0];
    space.read(0x34, &mut pointer);
    assert_eq!(usize::from(pointer[0]), first);
    space.read(first + 1, &mut pointer);
    assert_eq!(usize::from(pointer[0]), second);
    space.write(second + 2, &[0xaa; 10]);
    let mut body = [0; 10];
    space.read(second + 2, &mut body);
    assert_eq!(body, [0xaa, 0xaa, 1, 1, 1, 1, 1, 1, 1, 1]);
    assert_eq!(space.add_capability(9, &[0; 200], &[]), None);
}

#[test]
fn sizing_with_decoding_on_does_not_move_the_function() {
    let mut space = space();
    assert!(space.write(4, &[0x06, 0]));
    assert_eq!(space.decoded_bar(), Some((0, HOME, SIZE)));
    for (offset, home) in [(0x10, HOME as u32 | 0xc), (0x14, (HOME >> 32) as u32)] {
        assert!(!write32(&mut space, offset, u32::MAX));
        assert_eq!(space.u32_at(offset), if offset == 0x10 { 0xffff_800c } else { u32::MAX });
        assert!(!write32(&mut space, offset, home));
    }
    assert_eq!(space.decoded_bar(), Some((0, HOME, SIZE)));
}

#[test]
fn moves_in_two_halves_end_at_the_new_address() {
    let mut space = space();
    space.write(4, &[0x02]);
    assert!(write32(&mut space, 0x10, 0x1234_8000));
    assert!(write32(&mut space, 0x14, 0x41));
    assert_eq!(space.decoded_bar(), Some((0, 0x41_1234_8000, SIZE)));
    assert!(space.write(4, &[0x00]));
    assert_eq!(space.decoded_bar(), None);
    assert!(!write32(&mut space, 0x14, 0x42));
    assert!(space.write(4, &[0x02]));
    assert_eq!(space.decoded_bar(), Some((0, 0x42_1234_8000, SIZE)));
}

proptest! {
    /// Read-only bits survive any writes; the decoded address is always aligned and only set while decoding is on.
    #[test]
    fn random_writes_respect_the_masks(
        writes in prop::collection::vec((0usize..300, prop::collection::vec(any::<u8>(), 0..9)), 0..60),
    ) {
        let mut space = space();
        space.add_capability(9, &[0x5a; 14], &[]).unwrap();
        let fresh = space.clone();
        for (offset, data) in &writes {
            space.write(*offset, data);
            if let Some((_, address, size)) = space.decoded_bar() {
                prop_assert_eq!(address % size, 0);
                prop_assert_eq!(space.u16_at(4) & 2, 2);
            }
        }
        for offset in (0..CONFIG_BYTES).filter(|offset| !matches!(offset, 4..=5 | 0x0c | 0x3c | 0x10..=0x17)) {
            let (mut now, mut then) = ([0], [0]);
            space.read(offset, &mut now);
            fresh.read(offset, &mut then);
            prop_assert_eq!(now, then, "register {:#x}", offset);
        }
        prop_assert_eq!(space.u32_at(0x10) & 0x7fff, 0xc);
    }
}
