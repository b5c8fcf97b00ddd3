//! VMware's sparse extents, the single-file forms of vmdk: monolithicSparse and streamOptimized.
//! Source: VMware, "Virtual Disk Format 5.0", chapters "Hosted Sparse Extents" and "Stream-Optimized Compressed Sparse
//! Extents". (imago reads flat extents only, which an upload, being one file, cannot have.)

use flate2::{Decompress, FlushDecompress, Status};

use crate::error::ImageError;
use crate::format::VMDK_MAGIC;
use crate::source::{Source, field};
use crate::writer::DiskSink;
use crate::{ProgressFn, SECTOR};

const HEADER_BYTES: usize = 512;
/// The grain directory stands in a footer at the end.
const DIRECTORY_AT_END: u64 = u64::MAX;
const FLAG_ZERO_GRAINS: u32 = 1 << 2;
const FLAG_COMPRESSED: u32 = 1 << 16;
const FLAG_MARKERS: u32 = 1 << 17;
const COMPRESSION_DEFLATE: u16 = 1;
/// Entry of a grain table that stands for a grain of zeros.
const ZERO_GRAIN: u32 = 1;
const MAX_GRAIN_SECTORS: u64 = 1 << 15;
const MAX_TABLE_ENTRIES: u64 = 1 << 16;
const MAX_DESCRIPTOR_BYTES: u64 = 1 << 20;
const MAX_DIRECTORY_BYTES: u64 = 64 << 20;

/// What header and footer say.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Header {
    flags: u32,
    virtual_bytes: u64,
    /// A power of two.
    grain_bytes: u64,
    entries_per_table: u64,
    /// In sectors.
    directory: u64,
}

impl Header {
    fn parse(bytes: &[u8], source: &Source) -> Result<Self, ImageError> {
        let u32_at = |offset| u32::from_le_bytes(field(bytes, offset));
        let u64_at = |offset| u64::from_le_bytes(field(bytes, offset));
        let version = u32_at(4);
        if !(1..=3).contains(&version) {
            return Err(source.unsupported(format!("version {version}; versions 1 to 3 are known")));
        }
        // A file that went through a text-mode transfer has these four characters changed.
        if field::<4>(bytes, 73) != *b"\n \r\n" {
            return Err(source.corrupt("it was changed by a text-mode transfer"));
        }
        let flags = u32_at(8);
        let (capacity, grain) = (u64_at(12), u64_at(20));
        if !grain.is_power_of_two() || grain > MAX_GRAIN_SECTORS {
            return Err(source.corrupt(format!("grains of {grain} sectors")));
        }
        let entries_per_table = u64::from(u32_at(44));
        if !(1..=MAX_TABLE_ENTRIES).contains(&entries_per_table) {
            return Err(source.corrupt(format!("grain tables of {entries_per_table} entries")));
        }
        let algorithm = u16::from_le_bytes(field(bytes, 77));
        if flags & FLAG_COMPRESSED != 0 && algorithm != COMPRESSION_DEFLATE {
            return Err(source.unsupported(format!("compression algorithm {algorithm}")));
        }
        let virtual_bytes = capacity.checked_mul(SECTOR);
        Ok(Self {
            flags,
            virtual_bytes: virtual_bytes.ok_or_else(|| source.corrupt(format!("{capacity} sectors")))?,
            grain_bytes: grain * SECTOR,
            entries_per_table,
            directory: u64_at(56),
        })
    }
}

/// A sparse extent whose header makes sense.
#[derive(Debug)]
pub(crate) struct Image {
    source: Source,
    header: Header,
}

impl Image {
    pub fn open(source: Source) -> Result<Self, ImageError> {
        let bytes = source.read_vec("the header", 0, HEADER_BYTES.min(source.bytes as usize))?;
        if !bytes.starts_with(VMDK_MAGIC) {
            return Err(source.external("this is a descriptor, the disk is in the extents it names"));
        }
        source.check("the header", 0, HEADER_BYTES as u64)?;
        let mut header = Header::parse(&bytes, &source)?;
        let sectors = |offset| u64::from_le_bytes(field(&bytes, offset));
        check_descriptor(&source, sectors(28), sectors(36))?;
        if header.directory == DIRECTORY_AT_END {
            header = footer(&source, header)?;
        }
        Ok(Self { source, header })
    }

    pub fn virtual_bytes(&self) -> u64 {
        self.header.virtual_bytes
    }

    /// Writes the disk, padded to `size`.
    pub fn copy(self, size: u64, writer: &mut dyn DiskSink, progress: ProgressFn<'_>) -> Result<(), ImageError> {
        let source = &self.source;
        let Header { virtual_bytes, grain_bytes, entries_per_table, directory, .. } = self.header;
        let per_table = grain_bytes * entries_per_table;
        let directory_bytes = virtual_bytes.div_ceil(per_table) * 4;
        if directory_bytes > MAX_DIRECTORY_BYTES {
            return Err(source.unsupported(format!("grain directory of {directory_bytes} bytes")));
        }
        let directory = source.read_vec("the grain directory", self.sector(directory)?, directory_bytes as usize)?;
        let mut table = vec![0; entries_per_table as usize * 4];
        let mut grain = vec![0; grain_bytes as usize];
        let mut grains = 0u64;
        for table_sector in directory.as_chunks::<4>().0 {
            let table_sector = u64::from(u32::from_le_bytes(*table_sector));
            if table_sector == 0 {
                writer.zeros(per_table.min(virtual_bytes - writer.position()), &mut |done| progress(done, size))?;
                continue;
            }
            source.read("a grain table", &mut table, self.sector(table_sector)?)?;
            for entry in table.as_chunks::<4>().0 {
                let length = grain_bytes.min(virtual_bytes - writer.position());
                if length == 0 {
                    break;
                }
                let entry = u32::from_le_bytes(*entry);
                if entry == 0 || entry == ZERO_GRAIN && self.header.flags & FLAG_ZERO_GRAINS != 0 {
                    writer.zeros(length, &mut |done| progress(done, size))?;
                    continue;
                }
                grains += 1;
                self.check_grains(grains)?;
                let piece = grain.get_mut(..length as usize).unwrap_or_default();
                self.read_grain(u64::from(entry), writer.position(), piece)?;
                writer.data(piece)?;
                progress(writer.position(), size);
            }
        }
        writer.zeros(size - virtual_bytes, &mut |_| {})?;
        Ok(())
    }

    /// No more grains than the file can hold: grains that are mapped many times must not fill the disk.
    fn check_grains(&self, count: u64) -> Result<(), ImageError> {
        let holds = if self.header.flags & FLAG_COMPRESSED != 0 {
            self.source.bytes / SECTOR
        } else {
            self.source.bytes.div_ceil(self.header.grain_bytes)
        };
        if count > holds { Err(self.source.corrupt("grains are mapped more than once")) } else { Ok(()) }
    }

    fn sector(&self, sector: u64) -> Result<u64, ImageError> {
        sector.checked_mul(SECTOR).ok_or_else(|| self.source.corrupt(format!("sector {sector}")))
    }

    fn read_grain(&self, sector: u64, disk_offset: u64, grain: &mut [u8]) -> Result<(), ImageError> {
        let source = &self.source;
        let at = self.sector(sector)?;
        if self.header.flags & FLAG_COMPRESSED == 0 {
            return source.read("a grain", grain, at);
        }
        // With markers: the grain's sector on the disk and the length of the data; without: only the length.
        let marker = source.read_vec("a grain marker", at, 12)?;
        let (length, skip) = if self.header.flags & FLAG_MARKERS != 0 {
            let belongs_to = u64::from_le_bytes(field(&marker, 0));
            if belongs_to != disk_offset / SECTOR {
                let what = format!("the grain of sector {} is marked as that of {belongs_to}", disk_offset / SECTOR);
                return Err(source.corrupt(what));
            }
            (u32::from_le_bytes(field(&marker, 8)), 12)
        } else {
            (u32::from_le_bytes(field(&marker, 0)), 4)
        };
        if u64::from(length) > 2 * self.header.grain_bytes + 64 {
            return Err(source.corrupt(format!("a compressed grain of {length} bytes")));
        }
        let packed = source.read_vec("a compressed grain", at + skip, length as usize)?;
        // The last grain of a disk may be unpacked whole or only as far as the disk goes.
        let mut whole = vec![0; self.header.grain_bytes as usize];
        let mut inflate = Decompress::new(true);
        let status = inflate
            .decompress(&packed, &mut whole, FlushDecompress::Finish)
            .map_err(|error| source.corrupt(format!("a compressed grain at byte {at}: {error}")))?;
        if status != Status::StreamEnd || inflate.total_out() < grain.len() as u64 {
            return Err(source.corrupt(format!("the compressed grain at byte {at} does not hold a whole grain")));
        }
        grain.copy_from_slice(whole.get(..grain.len()).unwrap_or_default());
        Ok(())
    }
}

/// The header's true version stands before the end-of-stream marker, the last sector.
fn footer(source: &Source, header: Header) -> Result<Header, ImageError> {
    let truncated = || ImageError::Truncated {
        format: source.format,
        what: "the footer",
        offset: source.bytes.saturating_add(2 * SECTOR),
        file_bytes: source.bytes,
    };
    let at = source.bytes.checked_sub(2 * SECTOR).ok_or_else(truncated)?;
    let bytes = source.read_vec("the footer", at, HEADER_BYTES)?;
    if !bytes.starts_with(VMDK_MAGIC) {
        return Err(truncated());
    }
    let footer = Header::parse(&bytes, source)?;
    if (Header { directory: DIRECTORY_AT_END, ..footer }) != header {
        return Err(source.corrupt("header and footer differ"));
    }
    Ok(footer)
}

/// The embedded descriptor tells whether this one file is the whole disk.
fn check_descriptor(source: &Source, sector: u64, sectors: u64) -> Result<(), ImageError> {
    if sector == 0 || sectors == 0 {
        return Err(source.external("it has no descriptor: it is one extent of several"));
    }
    let (Some(offset), Some(length)) = (sector.checked_mul(SECTOR), sectors.checked_mul(SECTOR)) else {
        return Err(source.corrupt(format!("descriptor at sector {sector}")));
    };
    if length > MAX_DESCRIPTOR_BYTES {
        return Err(source.corrupt(format!("descriptor of {length} bytes")));
    }
    let bytes = source.read_vec("the descriptor", offset, length as usize)?;
    let text = String::from_utf8_lossy(bytes.split(|byte| *byte == 0).next().unwrap_or_default()).into_owned();
    let value = |key: &str| {
        text.lines().filter_map(|line| line.split_once('=')).find_map(|(name, value)| {
            name.trim().eq_ignore_ascii_case(key).then(|| value.trim().trim_matches('"').to_owned())
        })
    };
    if value("parentCID").is_some_and(|parent| !parent.eq_ignore_ascii_case("ffffffff")) {
        return Err(source.external("it is a difference to a parent disk"));
    }
    match value("createType").as_deref() {
        Some("monolithicSparse" | "streamOptimized") => Ok(()),
        Some(other) => Err(source.external(format!("it is of type {other}"))),
        None if text.is_empty() => Err(source.external("its descriptor is empty: it is one extent of several")),
        None => Err(source.corrupt("its descriptor has no createType")),
    }
}
