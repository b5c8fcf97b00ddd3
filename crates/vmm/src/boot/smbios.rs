//! System identity by SMBIOS 3.0 (DMTF DSP0134): what cloud-init and `dmidecode` read.

use crate::mem::layout::{SMBIOS, SMBIOS_END};
use crate::mem::{Memory, MemoryError};

const ENTRY_POINT_SIZE: usize = 24;
/// Where the structures start, behind the entry point.
const TABLE: u64 = SMBIOS + 32;
const MANUFACTURER: &str = "hearth";
/// Longest string older readers accept.
const STRING_MAX: usize = 64;

/// Who the machine is.
#[derive(Clone, Debug)]
pub struct Identity<'a> {
    /// In the order of its text form.
    pub uuid: [u8; 16],
    /// Product name.
    pub instance_type: &'a str,
    /// Asset tag of the board, as on EC2.
    pub instance_id: &'a str,
}

/// The UUID as text, lower case with hyphens.
pub fn uuid_text(uuid: &[u8; 16]) -> String {
    let mut text = String::with_capacity(36);
    for (i, byte) in uuid.iter().enumerate() {
        if matches!(i, 4 | 6 | 8 | 10) {
            text.push('-');
        }
        text.push_str(&format!("{byte:02x}"));
    }
    text
}

/// Structures under construction.
struct Table {
    bytes: Vec<u8>,
    handle: u16,
}

impl Table {
    /// Appends a structure: its formatted part behind the header, then its strings.
    fn add(&mut self, kind: u8, formatted: &[u8], strings: &[&str]) {
        self.bytes.extend_from_slice(&[kind, (4 + formatted.len()) as u8]);
        self.bytes.extend_from_slice(&self.handle.to_le_bytes());
        self.bytes.extend_from_slice(formatted);
        self.handle += 1;
        for string in strings {
            // An empty string would end the list.
            let clean: Vec<u8> = string.bytes().filter(|b| (0x20..0x7f).contains(b)).take(STRING_MAX).collect();
            self.bytes.extend_from_slice(if clean.is_empty() { b"-" } else { &clean });
            self.bytes.push(0);
        }
        if strings.is_empty() {
            self.bytes.push(0);
        }
        self.bytes.push(0);
    }
}

/// The structures: firmware, system, board, chassis, end.
fn structures(identity: &Identity<'_>) -> Vec<u8> {
    let mut table = Table { bytes: Vec::new(), handle: 0 };
    let serial = uuid_text(&identity.uuid);
    // Type 0: vendor 1, version 2, segment 0, date 3, ROM size 64 KiB, characteristics "not supported",
    // extension bytes "virtual machine" (bit 4 of the second), releases not stated.
    let mut firmware = vec![1, 2, 0, 0, 3, 0];
    firmware.extend_from_slice(&(1u64 << 3).to_le_bytes());
    firmware.extend_from_slice(&[0, 1 << 4, 0xff, 0xff, 0xff, 0xff]);
    table.add(0, &firmware, &[MANUFACTURER, "1.0", "01/01/2026"]);
    // Type 1: since SMBIOS 2.6 the first three fields of the UUID are little-endian.
    let mut system = vec![1, 2, 3, 4];
    let [a, b, c, d, e, f, g, h, rest @ ..] = identity.uuid;
    system.extend_from_slice(&[d, c, b, a, f, e, h, g]);
    system.extend_from_slice(&rest);
    // Wake-up by power switch; SKU and family.
    system.extend_from_slice(&[6, 0, 5]);
    table.add(1, &system, &[MANUFACTURER, identity.instance_type, "1.0", &serial, "instance"]);
    // Type 2: a hosting motherboard (features bit 0, type 0x0a) in chassis 3.
    let mut board = vec![1, 2, 0, 0, 3, 1, 0];
    board.extend_from_slice(&3u16.to_le_bytes());
    board.extend_from_slice(&[0x0a, 0]);
    table.add(2, &board, &[MANUFACTURER, identity.instance_type, identity.instance_id]);
    // Type 3: "other", states safe, security unknown, no OEM data, one power cord, no contained elements.
    let mut chassis = vec![1, 1, 0, 0, 2, 3, 3, 3, 2];
    chassis.extend_from_slice(&[0, 0, 0, 0, 0, 1, 0, 0]);
    table.add(3, &chassis, &[MANUFACTURER, identity.instance_id]);
    table.add(127, &[], &[]);
    table.bytes
}

/// Entry point and structures as one block for [`SMBIOS`].
pub fn build(identity: &Identity<'_>) -> Vec<u8> {
    let structures = structures(identity);
    let mut block = b"_SM3_".to_vec();
    // Checksum, length, version 3.0.0, entry point revision 1, reserved.
    block.extend_from_slice(&[0, ENTRY_POINT_SIZE as u8, 3, 0, 0, 1, 0]);
    block.extend_from_slice(&(structures.len() as u32).to_le_bytes());
    block.extend_from_slice(&TABLE.to_le_bytes());
    let sum = block.iter().fold(0u8, |sum, byte| sum.wrapping_add(*byte));
    if let Some(checksum) = block.get_mut(5) {
        *checksum = sum.wrapping_neg();
    }
    block.resize((TABLE - SMBIOS) as usize, 0);
    block.extend_from_slice(&structures);
    block
}

/// Writes it into guest memory.
pub fn write(memory: &Memory, identity: &Identity<'_>) -> Result<(), MemoryError> {
    let block = build(identity);
    if block.len() as u64 > SMBIOS_END - SMBIOS {
        return Err(MemoryError::OutOfRange { address: SMBIOS, size: block.len() as u64 });
    }
    memory.write(SMBIOS, &block)
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    /// Splits the table as a reader does: type, formatted part, strings.
    fn parse(mut bytes: &[u8]) -> Vec<(u8, Vec<u8>, Vec<String>)> {
        let mut found = Vec::new();
        loop {
            let length = usize::from(bytes[1]);
            let (formatted, rest) = bytes.split_at(length);
            let end = rest.windows(2).position(|w| w == [0, 0]).unwrap();
            let strings = rest[..end].split(|b| *b == 0).map(|s| String::from_utf8(s.to_vec()).unwrap()).collect();
            found.push((formatted[0], formatted.to_vec(), strings));
            bytes = &rest[end + 2..];
            if formatted[0] == 127 {
                assert!(bytes.is_empty());
                return found;
            }
        }
    }

    #[test]
    fn the_uuid_reads_back_as_its_text() {
        let uuid = [0xec, 0x2a, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14];
        let identity = Identity { uuid, instance_type: "t3.micro", instance_id: "i-0123456789abcdef0" };
        let block = build(&identity);
        assert_eq!(block[..24].iter().fold(0u8, |a, b| a.wrapping_add(*b)), 0);
        let found = parse(&block[32..]);
        assert_eq!(found.iter().map(|f| f.0).collect::<Vec<_>>(), [0, 1, 2, 3, 127]);
        let (_, system, strings) = &found[1];
        assert_eq!(strings[3], "ec2a0102-0304-0506-0708-090a0b0c0d0e");
        assert_eq!(strings[1], "t3.micro");
        assert_eq!(system[8..24], [2, 1, 0x2a, 0xec, 4, 3, 6, 5, 7, 8, 9, 10, 11, 12, 13, 14]);
        assert_eq!(found[2].2[2], "i-0123456789abcdef0");
    }

    proptest! {
        #[test]
        fn any_text_yields_a_table_that_parses(uuid: [u8; 16], kind in ".*", id in "\\PC*") {
            let block = build(&Identity { uuid, instance_type: &kind, instance_id: &id });
            prop_assert!(block.len() < 4096);
            prop_assert_eq!(parse(&block[32..]).len(), 5);
        }
    }
}
