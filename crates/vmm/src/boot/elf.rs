//! As much of ELF64 as a kernel image needs (System V gABI chapter 4 and 5), from an untrusted file.

use std::fs::File;

use super::{BootError, field, length, read_exact};

/// First bytes of any ELF file.
pub const MAGIC: [u8; 4] = *b"\x7fELF";

/// Most program headers looked at; kernels have about five.
const MAX_PROGRAM_HEADERS: usize = 64;
/// Largest note segment looked at, in bytes.
const MAX_NOTES: u64 = 64 << 10;

const HEADER_SIZE: usize = 64;
const PROGRAM_HEADER_SIZE: usize = 56;
const CLASS_64: u8 = 2;
const LITTLE_ENDIAN: u8 = 1;
const MACHINE_X86_64: u16 = 62;
const PT_LOAD: u32 = 1;
const PT_NOTE: u32 = 4;

/// One part of the file that belongs into memory.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Segment {
    /// Offset in the file.
    pub offset: u64,
    /// Bytes in the file.
    pub file_size: u64,
    /// Physical address.
    pub address: u64,
    /// Bytes in memory, not less than in the file; the rest is zero.
    pub memory_size: u64,
}

/// What the program headers say.
#[derive(Debug, Default)]
pub struct Image {
    /// Loadable segments, sorted by address, not overlapping.
    pub segments: Vec<Segment>,
    /// Contents of the note segments.
    pub notes: Vec<Vec<u8>>,
}

fn bad(reason: impl Into<String>) -> BootError {
    BootError::Image { format: "ELF", reason: reason.into() }
}

/// Reads and checks the headers of `file`.
pub fn parse(file: &File) -> Result<Image, BootError> {
    let file_length = length(file, "kernel")?;
    let mut header = [0u8; HEADER_SIZE];
    read_exact(file, "kernel", &mut header, 0)?;
    let byte = |at: usize| header.get(at).copied().unwrap_or(0);
    let machine = field::<2>(&header, 18).map(u16::from_le_bytes);
    if byte(4) != CLASS_64 || byte(5) != LITTLE_ENDIAN || machine != Some(MACHINE_X86_64) {
        return Err(bad("it is not a 64-bit x86 file"));
    }
    let table = field::<8>(&header, 32).map_or(0, u64::from_le_bytes);
    let entry_size = field::<2>(&header, 54).map_or(0, u16::from_le_bytes);
    let count = usize::from(field::<2>(&header, 56).map_or(0, u16::from_le_bytes));
    if usize::from(entry_size) != PROGRAM_HEADER_SIZE || count == 0 || count > MAX_PROGRAM_HEADERS {
        return Err(bad(format!("it has {count} program headers of {entry_size} bytes")));
    }
    let mut headers = vec![0u8; count * PROGRAM_HEADER_SIZE];
    if table.checked_add(headers.len() as u64).is_none_or(|end| end > file_length) {
        return Err(bad("its program headers lie behind its end"));
    }
    read_exact(file, "kernel", &mut headers, table)?;
    let mut image = Image::default();
    for header in headers.chunks_exact(PROGRAM_HEADER_SIZE) {
        let word = |at: usize| field::<8>(header, at).map_or(0, u64::from_le_bytes);
        let segment = Segment { offset: word(8), address: word(24), file_size: word(32), memory_size: word(40) };
        let kind = field::<4>(header, 0).map_or(0, u32::from_le_bytes);
        if !matches!(kind, PT_LOAD | PT_NOTE) {
            continue;
        }
        if segment.offset.checked_add(segment.file_size).is_none_or(|end| end > file_length) {
            return Err(bad("a segment lies behind its end"));
        }
        if kind == PT_NOTE {
            if segment.file_size > MAX_NOTES {
                return Err(bad(format!("it has {} bytes of notes", segment.file_size)));
            }
            let mut notes = vec![0u8; segment.file_size as usize];
            read_exact(file, "kernel", &mut notes, segment.offset)?;
            image.notes.push(notes);
        } else if segment.memory_size > 0 {
            if segment.file_size > segment.memory_size || segment.address.checked_add(segment.memory_size).is_none() {
                return Err(bad("a segment's sizes contradict each other"));
            }
            image.segments.push(segment);
        }
    }
    image.segments.sort_by_key(|s| s.address);
    if image.segments.is_empty() {
        return Err(bad("it has nothing to load"));
    }
    let overlap = |pair: &[Segment]| matches!(pair, [a, b] if a.address + a.memory_size > b.address);
    if image.segments.windows(2).any(overlap) {
        return Err(bad("its segments overlap"));
    }
    Ok(image)
}

/// The descriptor of the first note with this owner and type, if any.
pub fn find_note<'a>(notes: &'a [u8], owner: &[u8], kind: u32) -> Option<&'a [u8]> {
    let mut at = 0usize;
    loop {
        let word = |offset: usize| field::<4>(notes, at.checked_add(offset)?).map(u32::from_le_bytes);
        let (name_size, descriptor_size) = (word(0)? as usize, word(4)? as usize);
        let note_kind = word(8)?;
        let name_at = at.checked_add(12)?;
        let descriptor_at = name_at.checked_add(name_size.checked_next_multiple_of(4)?)?;
        let end = descriptor_at.checked_add(descriptor_size)?;
        let name = notes.get(name_at..name_at.checked_add(name_size)?)?;
        let descriptor = notes.get(descriptor_at..end)?;
        if note_kind == kind && name == owner {
            return Some(descriptor);
        }
        at = descriptor_at.checked_add(descriptor_size.checked_next_multiple_of(4)?)?;
    }
}
