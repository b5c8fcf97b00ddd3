use super::*;
use proptest::prelude::*;

#[derive(Default)]
struct Messages(Mutex<Vec<(u64, u32)>>);

impl MsiSender for Messages {
    fn send(&self, address: u64, data: u32) -> io::Result<()> {
        self.0.lock().unwrap().push((address, data));
        Ok(())
    }
}

fn chip() -> (Arc<Messages>, IoApic) {
    let messages = Arc::new(Messages::default());
    (messages.clone(), IoApic::new(messages))
}

fn write(chip: &IoApic, index: u8, value: u32) {
    chip.write(IOREGSEL, &u32::from(index).to_le_bytes());
    chip.write(IOWIN, &value.to_le_bytes());
}

fn read(chip: &IoApic, index: u8) -> u32 {
    chip.write(IOREGSEL, &u32::from(index).to_le_bytes());
    let mut word = [0; 4];
    chip.read(IOWIN, &mut word);
    u32::from_le_bytes(word)
}

#[test]
fn a_pin_sends_what_its_entry_says() {
    let (messages, chip) = chip();
    assert_eq!(read(&chip, VERSION), 0x0007_0011);
    write(&chip, REDIRECTION + 9, 3 << 24);
    write(&chip, REDIRECTION + 8, 0x31);
    chip.pulse(4).unwrap();
    chip.pulse(5).unwrap();
    chip.pulse(99).unwrap();
    assert_eq!(*messages.0.lock().unwrap(), vec![(0xfee0_3000, 0x31)]);
}

#[test]
fn logical_lowest_priority_entries_keep_their_mode() {
    let (messages, chip) = chip();
    write(&chip, REDIRECTION + 1, 0xff << 24);
    write(&chip, REDIRECTION, 0x40 | (1 << 8) | (1 << 11));
    chip.pulse(0).unwrap();
    assert_eq!(*messages.0.lock().unwrap(), vec![(0xfeef_f004, 0x140)]);
}

#[test]
fn a_pulse_while_masked_is_not_lost_and_not_doubled() {
    let (messages, chip) = chip();
    chip.pulse(4).unwrap();
    chip.pulse(4).unwrap();
    assert!(messages.0.lock().unwrap().is_empty());
    write(&chip, REDIRECTION + 8, 0x31);
    write(&chip, REDIRECTION + 8, 0x31);
    assert_eq!(messages.0.lock().unwrap().len(), 1);
}

#[test]
fn status_bits_cannot_be_written() {
    let (_, chip) = chip();
    write(&chip, REDIRECTION, 0xffff_ffff);
    assert_eq!(read(&chip, REDIRECTION) & (READ_ONLY as u32), 0);
}

proptest! {
    #[test]
    fn no_access_breaks_it(accesses in prop::collection::vec((prop_oneof![0u64..0x20, any::<u64>()], prop::collection::vec(any::<u8>(), 1..9), any::<bool>()), 0..200), pin in 0u32..40) {
        let (messages, chip) = chip();
        for (offset, mut data, is_read) in accesses {
            if is_read { chip.read(offset, &mut data) } else { chip.write(offset, &data) }
            chip.pulse(pin).unwrap();
        }
        for (address, data) in messages.0.lock().unwrap().iter() {
            prop_assert_eq!(address >> 20, 0xfee);
            prop_assert!(*data < 0x800);
        }
    }
}
