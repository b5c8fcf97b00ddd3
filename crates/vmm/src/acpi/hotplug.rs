//! PCI hot-plug registers: how the guest's ACPI code learns which slots changed, and how it lets go of a function.
//!
//! A page at [`layout::PCI_HOTPLUG`](crate::mem::layout::PCI_HOTPLUG) with three 32-bit registers, one bit a slot of bus 0.
//! Only aligned 32-bit accesses count; others read zeros and write nothing.
//!
//! ```text
//! 0x0  INSERTED  r   slots that got a function since the last read; reading clears
//! 0x4  REMOVALS  r   slots whose function the host wants back, asked since the last read; reading clears
//! 0x8  EJECT     w   the guest has let go of these slots' functions (_EJ0)
//! ```
//!
//! After each change the host raises [`PCI_HOTPLUG`](super::ged::PCI_HOTPLUG); the generic event device's `_EVT` method then
//! reads both bitmaps and notifies the slots: device check (1) for a new function, eject request (3) for one to give back. An
//! eject that the host did not ask for changes nothing: what is attached is decided by the control plane, not by the guest.

/// Offset of INSERTED.
pub const INSERTED: u64 = 0x0;
/// Offset of REMOVALS.
pub const REMOVALS: u64 = 0x4;
/// Offset of EJECT.
pub const EJECT: u64 = 0x8;
/// Bytes the three registers take.
pub const REGISTERS_BYTES: u64 = 0xc;

/// The registers' state; its owner serialises calls and acts on ejections.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct HotplugRegisters {
    inserted: u32,
    /// Asked for and not yet seen by the guest.
    removals: u32,
    /// Asked for and not yet ejected.
    wanted: u32,
}

fn bit(slot: usize) -> u32 {
    u32::try_from(slot).ok().and_then(|slot| 1u32.checked_shl(slot)).unwrap_or(0)
}

impl HotplugRegisters {
    /// A function was put into `slot`. Forgets what was asked about an earlier one there.
    pub fn inserted(&mut self, slot: usize) {
        self.emptied(slot);
        self.inserted |= bit(slot);
    }

    /// The host wants `slot`'s function back. May be asked again: the guest is notified again.
    pub fn ask_removal(&mut self, slot: usize) {
        self.removals |= bit(slot);
        self.wanted |= bit(slot);
    }

    /// The function in `slot` is gone, asked or not.
    pub fn emptied(&mut self, slot: usize) {
        let keep = !bit(slot);
        self.inserted &= keep;
        self.removals &= keep;
        self.wanted &= keep;
    }

    /// A guest read.
    pub fn read(&mut self, offset: u64, data: &mut [u8]) {
        data.fill(0);
        if let Ok(word) = <&mut [u8; 4]>::try_from(data) {
            *word = match offset {
                INSERTED => std::mem::take(&mut self.inserted),
                REMOVALS => std::mem::take(&mut self.removals),
                _ => 0,
            }
            .to_le_bytes();
        }
    }

    /// A guest write. Returns the slots, bit by bit, whose function the guest lets go of now as the host asked.
    pub fn write(&mut self, offset: u64, data: &[u8]) -> u32 {
        let (EJECT, Ok(word)) = (offset, <[u8; 4]>::try_from(data)) else { return 0 };
        let ejected = u32::from_le_bytes(word) & self.wanted;
        self.inserted &= !ejected;
        self.removals &= !ejected;
        self.wanted &= !ejected;
        ejected
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::pci::fuzzing::fuzz;
    use proptest::prelude::*;

    fn read(registers: &mut HotplugRegisters, offset: u64) -> u32 {
        let mut word = [0xff; 4];
        registers.read(offset, &mut word);
        u32::from_le_bytes(word)
    }

    #[test]
    fn an_insertion_and_a_removal_are_told_once_and_ejected_once() {
        let mut registers = HotplugRegisters::default();
        registers.inserted(3);
        assert_eq!((read(&mut registers, INSERTED), read(&mut registers, INSERTED)), (8, 0));
        assert_eq!(registers.write(EJECT, &8u32.to_le_bytes()), 0, "nobody asked");
        registers.ask_removal(3);
        assert_eq!((read(&mut registers, REMOVALS), read(&mut registers, REMOVALS)), (8, 0));
        registers.ask_removal(3);
        assert_eq!(read(&mut registers, REMOVALS), 8, "asked again");
        assert_eq!(registers.write(EJECT, &u32::MAX.to_le_bytes()), 8);
        assert_eq!(registers.write(EJECT, &8u32.to_le_bytes()), 0);
        assert_eq!(registers, HotplugRegisters::default());
    }

    #[test]
    fn a_slot_used_again_starts_afresh() {
        let mut registers = HotplugRegisters::default();
        registers.ask_removal(5);
        registers.inserted(5);
        assert_eq!(read(&mut registers, REMOVALS), 0);
        assert_eq!(registers.write(EJECT, &32u32.to_le_bytes()), 0, "the new function was not asked back");
        registers.inserted(32);
        registers.ask_removal(usize::MAX);
        assert_eq!(read(&mut registers, INSERTED), 32, "slots that do not exist have no bit");
    }

    #[derive(Clone, Debug)]
    enum Step {
        Insert(usize),
        Ask(usize),
        Empty(usize),
        Read(u64, usize),
        Write(u64, Vec<u8>),
    }

    fn steps() -> impl Strategy<Value = Vec<Step>> {
        let offset = prop_oneof![4 => (0u64..4).prop_map(|n| n * 4), 1 => any::<u64>()];
        let bytes =
            prop_oneof![3 => prop::collection::vec(any::<u8>(), 4), 1 => prop::collection::vec(any::<u8>(), 0..9)];
        let step = prop_oneof![
            (0usize..33).prop_map(Step::Insert),
            (0usize..33).prop_map(Step::Ask),
            (0usize..33).prop_map(Step::Empty),
            (offset.clone(), prop_oneof![3 => Just(4usize), 1 => 0usize..9]).prop_map(|(o, l)| Step::Read(o, l)),
            (offset, bytes).prop_map(|(o, b)| Step::Write(o, b)),
        ];
        prop::collection::vec(step, 0..80)
    }

    /// Against sets: a slot is ejected exactly when it was asked for after its last insertion and not ejected since, and
    /// each telling happens once.
    #[test]
    fn any_history_matches_a_model() {
        use std::collections::BTreeSet;
        let slots = |set: &BTreeSet<usize>| set.iter().fold(0u32, |bits, slot| bits | (1 << slot));
        fuzz(512, &steps(), |steps| {
            let mut registers = HotplugRegisters::default();
            let (mut inserted, mut told, mut wanted) = (BTreeSet::new(), BTreeSet::new(), BTreeSet::new());
            for step in steps {
                match step {
                    Step::Insert(slot) => {
                        registers.inserted(slot);
                        told.remove(&slot);
                        wanted.remove(&slot);
                        inserted.extend((slot < 32).then_some(slot));
                    }
                    Step::Ask(slot) => {
                        registers.ask_removal(slot);
                        told.extend((slot < 32).then_some(slot));
                        wanted.extend((slot < 32).then_some(slot));
                    }
                    Step::Empty(slot) => {
                        registers.emptied(slot);
                        for set in [&mut inserted, &mut told, &mut wanted] {
                            set.remove(&slot);
                        }
                    }
                    Step::Read(offset, length) => {
                        let mut data = vec![0xaa; length];
                        registers.read(offset, &mut data);
                        let expected = match (offset, length) {
                            (INSERTED, 4) => slots(&std::mem::take(&mut inserted)),
                            (REMOVALS, 4) => slots(&std::mem::take(&mut told)),
                            _ => 0,
                        };
                        data.resize(4.max(length), 0);
                        prop_assert_eq!(&data[..4], expected.to_le_bytes());
                    }
                    Step::Write(offset, data) => {
                        let word = <[u8; 4]>::try_from(data.as_slice()).map_or(0, u32::from_le_bytes);
                        let expected = if offset == EJECT { word & slots(&wanted) } else { 0 };
                        prop_assert_eq!(registers.write(offset, &data), expected);
                        for slot in (0..32).filter(|slot| expected & (1 << slot) != 0) {
                            for set in [&mut inserted, &mut told, &mut wanted] {
                                set.remove(&slot);
                            }
                        }
                    }
                }
            }
            Ok(())
        });
    }
}
