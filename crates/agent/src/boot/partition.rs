//! Partition tables: GPT (UEFI specification 2.10, chapter 5) and MBR.

use std::sync::Arc;

use flate2::Crc;

use super::error::BootError;
use super::read_at::{ReadAt, le_u16, le_u32, le_u64};

/// Sector size that virtio-blk shows to guests, in bytes.
const SECTOR: u64 = 512;
/// Most partitions that are looked at.
pub const MAX_PARTITIONS: usize = 128;
/// Largest GPT entry array that is read, in bytes (128 entries of 128 bytes are usual).
const MAX_GPT_ENTRIES_BYTES: u64 = 256 * 1024;

/// Discoverable Partitions Specification: root file system for x86-64.
pub const TYPE_ROOT_X86_64: &str = "4f68bce3-e8cd-4db1-96e7-fbcaf984b709";
/// Boot Loader Specification: extended boot loader partition, mounted at /boot.
pub const TYPE_XBOOTLDR: &str = "bc13c2ff-59e6-4262-a352-b275fd6f7172";

/// One partition, or the whole disk (number 0).
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Partition {
    /// Number as Linux and GRUB count, from 1; 0 = the whole disk.
    pub number: u32,
    /// First byte.
    pub start: u64,
    /// Size in bytes.
    pub size: u64,
    /// GPT type GUID in lower case, or the MBR type as two hex digits.
    pub kind: String,
    /// What `root=PARTUUID=` wants; absent for the whole disk.
    pub part_uuid: Option<String>,
    /// GPT partition name.
    pub name: String,
}

impl Partition {
    /// How messages call it.
    pub fn place(&self) -> String {
        if self.number == 0 { "the whole disk".to_owned() } else { format!("partition {}", self.number) }
    }
}

/// The partitions of a disk in table order; empty when there is no table at all.
///
/// # Errors
/// [`BootError::PartitionTable`] when there is a GPT and both its copies are damaged.
pub fn partitions(disk: &Arc<dyn ReadAt>) -> Result<Vec<Partition>, BootError> {
    if disk.size() < 2 * SECTOR {
        return Ok(Vec::new());
    }
    let mut first = [0u8; SECTOR as usize];
    disk.read_exact_at(&mut first, 0).map_err(|source| BootError::Read { what: "first sector", source })?;
    let mbr = le_u16(&first, 510) == Some(0xaa55);
    let protective = mbr && (0..4).any(|slot| first.get(446 + 16 * slot + 4) == Some(&0xee));
    let last_sector = disk.size() / SECTOR - 1;
    let primary = read_gpt(disk.as_ref(), 1);
    match primary {
        Ok(partitions) => return Ok(partitions),
        Err(reason) if protective || reason != NO_SIGNATURE => {
            return read_gpt(disk.as_ref(), last_sector)
                .map_err(|backup| BootError::PartitionTable(format!("primary GPT: {reason}; backup GPT: {backup}")));
        }
        Err(_) => {}
    }
    if !mbr || is_ext4(&first, disk.as_ref()) { Ok(Vec::new()) } else { Ok(read_mbr(disk.as_ref(), &first)) }
}

const NO_SIGNATURE: &str = "no signature";

/// A file system straight on the disk: its superblock says so, even if the first sector looks like an MBR.
fn is_ext4(first: &[u8; SECTOR as usize], disk: &dyn ReadAt) -> bool {
    let mut magic = [0u8; 2];
    let has_entries = (0..4).any(|slot| le_u32(first, 446 + 16 * slot + 12).is_some_and(|sectors| sectors != 0));
    !has_entries && disk.read_exact_at(&mut magic, 1024 + 56).is_ok() && magic == [0x53, 0xef]
}

fn read_gpt(disk: &dyn ReadAt, lba: u64) -> Result<Vec<Partition>, &'static str> {
    let mut header = [0u8; SECTOR as usize];
    let at = lba.checked_mul(SECTOR).ok_or("outside the disk")?;
    disk.read_exact_at(&mut header, at).map_err(|_| "cannot be read")?;
    if header.get(..8) != Some(b"EFI PART") {
        return Err(NO_SIGNATURE);
    }
    let field32 = |offset| le_u32(&header, offset).ok_or("cut off");
    let field64 = |offset| le_u64(&header, offset).ok_or("cut off");
    let header_size = field32(12)? as usize;
    let stored_crc = field32(16)?;
    let mut covered = header.get(..header_size).filter(|h| h.len() >= 92).ok_or("impossible header size")?.to_vec();
    covered.get_mut(16..20).ok_or("cut off")?.fill(0);
    if crc32(&covered) != stored_crc {
        return Err("wrong header checksum");
    }
    if field64(24)? != lba {
        return Err("header belongs to another sector");
    }
    let (entries_lba, count, entry_size) = (field64(72)?, u64::from(field32(80)?), u64::from(field32(84)?));
    if entry_size < 128 || entry_size % 8 != 0 {
        return Err("impossible entry size");
    }
    let bytes = count.checked_mul(entry_size).filter(|b| *b <= MAX_GPT_ENTRIES_BYTES).ok_or("too many entries")?;
    let mut entries = vec![0u8; usize::try_from(bytes).map_err(|_| "too many entries")?];
    let entries_at = entries_lba.checked_mul(SECTOR).ok_or("entries lie outside the disk")?;
    disk.read_exact_at(&mut entries, entries_at).map_err(|_| "entries cannot be read")?;
    if crc32(&entries) != field32(88)? {
        return Err("wrong checksum of the entries");
    }
    let size = usize::try_from(entry_size).map_err(|_| "impossible entry size")?;
    let partitions = entries.chunks_exact(size).enumerate().take(MAX_PARTITIONS);
    Ok(partitions.filter_map(|(index, entry)| gpt_entry(disk, index, entry)).collect())
}

fn gpt_entry(disk: &dyn ReadAt, index: usize, entry: &[u8]) -> Option<Partition> {
    let kind = guid(entry.get(..16)?)?;
    if entry.get(..16)?.iter().all(|b| *b == 0) {
        return None;
    }
    let (first, last) = (le_u64(entry, 32)?, le_u64(entry, 40)?);
    let start = first.checked_mul(SECTOR)?;
    let size = last.checked_sub(first)?.checked_add(1)?.checked_mul(SECTOR)?;
    if first == 0 || start >= disk.size() {
        return None;
    }
    let units = entry.get(56..128)?.chunks_exact(2).map(|pair| le_u16(pair, 0).unwrap_or(0)).take_while(|u| *u != 0);
    let name = char::decode_utf16(units).map(|c| c.unwrap_or(char::REPLACEMENT_CHARACTER)).collect();
    let part_uuid = guid(entry.get(16..32)?);
    Some(Partition { number: u32::try_from(index).ok()?.checked_add(1)?, start, size, kind, part_uuid, name })
}

/// A GUID's text form: the first three fields are little-endian.
fn guid(bytes: &[u8]) -> Option<String> {
    let hex = |part: &[u8]| part.iter().map(|b| format!("{b:02x}")).collect::<String>();
    Some(format!(
        "{:08x}-{:04x}-{:04x}-{}-{}",
        le_u32(bytes, 0)?,
        le_u16(bytes, 4)?,
        le_u16(bytes, 6)?,
        hex(bytes.get(8..10)?),
        hex(bytes.get(10..16)?)
    ))
}

fn crc32(bytes: &[u8]) -> u32 {
    let mut crc = Crc::new();
    crc.update(bytes);
    crc.sum()
}

fn is_extended(kind: u8) -> bool {
    matches!(kind, 0x05 | 0x0f | 0x85)
}

struct MbrEntry {
    kind: u8,
    first: u64,
    sectors: u64,
}

fn mbr_entry(sector: &[u8], slot: usize) -> Option<MbrEntry> {
    let entry = sector.get(446 + 16 * slot..)?.get(..16)?;
    let (kind, first, sectors) = (*entry.get(4)?, le_u32(entry, 8)?, le_u32(entry, 12)?);
    (kind != 0 && sectors != 0).then_some(MbrEntry { kind, first: first.into(), sectors: sectors.into() })
}

fn read_mbr(disk: &dyn ReadAt, first: &[u8; SECTOR as usize]) -> Vec<Partition> {
    let signature = le_u32(first, 440).unwrap_or(0);
    let partition = |number: u32, entry: &MbrEntry, base: u64| {
        let start = base.checked_add(entry.first)?.checked_mul(SECTOR)?;
        (start < disk.size()).then(|| Partition {
            number,
            start,
            size: entry.sectors * SECTOR,
            kind: format!("{:02x}", entry.kind),
            part_uuid: Some(format!("{signature:08x}-{number:02x}")),
            name: String::new(),
        })
    };
    let mut found = Vec::new();
    let mut extended = None;
    for (number, slot) in (1u32..).zip(0..4) {
        let Some(entry) = mbr_entry(first, slot) else { continue };
        if is_extended(entry.kind) {
            extended = extended.or(Some(entry.first));
        } else {
            found.extend(partition(number, &entry, 0));
        }
    }
    // Logical partitions: a chain of tables, each with one partition and the next table, relative to the first.
    let Some(base) = extended else { return found };
    let mut table = base;
    for number in 5..(5 + MAX_PARTITIONS as u32) {
        let mut sector = [0u8; SECTOR as usize];
        let readable = table.checked_mul(SECTOR).is_some_and(|at| disk.read_exact_at(&mut sector, at).is_ok());
        if !readable || le_u16(&sector, 510) != Some(0xaa55) {
            break;
        }
        if let Some(entry) = mbr_entry(&sector, 0) {
            found.extend(partition(number, &entry, table));
        }
        match mbr_entry(&sector, 1) {
            Some(next) if is_extended(next.kind) => table = base.saturating_add(next.first),
            _ => break,
        }
    }
    found
}
