//! qcow2: <https://gitlab.com/qemu-project/qemu/-/blob/master/docs/interop/qcow2.rst>
//!
//! imago reads clusters; what stands before it here is what an untrusted upload needs on top: imago reads zeros behind the
//! end of the file, as QEMU does for a running guest, whereas a truncated upload must not become an image; and header
//! fields that it does not look at (encryption) or takes on trust are checked first.

use std::io;

use imago::file::File as Storage;
use imago::qcow2::Qcow2;
use imago::{DenyImplicitOpenGate, FormatAccess, FormatDriverBuilder, Mapping, StorageOpenOptions};

use crate::error::ImageError;
use crate::source::{Source, field};
use crate::writer::DiskSink;
use crate::{ProgressFn, SECTOR};

const BUFFER: u64 = 1 << 20;
/// QEMU's own limit for the first-level table.
const MAX_L1_BYTES: u64 = 32 << 20;
/// No more than this comes out of one byte of DEFLATE data (RFC 1951 allows about 1032).
const MAX_INFLATION: u64 = 1100;
const V2_HEADER_BYTES: u64 = 72;
const V3_HEADER_BYTES: u64 = 104;
const OFFSET_MASK: u64 = 0x00ff_ffff_ffff_fe00;
const FEATURE_NAMES: u32 = 0x6803_f857;

/// Incompatible features (bit number) that imago or hearth do not read, and the way out.
const INCOMPATIBLE: [(u32, &str); 4] = [
    (0, "it was not closed properly; mend it first: qemu-img check -r all FILE"),
    (1, "it is marked corrupt; mend it first: qemu-img check -r all FILE"),
    (3, "it is compressed with zstd; convert it first: qemu-img convert -O qcow2 -o compression_type=zlib IN OUT"),
    (4, "it has extended L2 entries; convert it first: qemu-img convert -O qcow2 IN OUT"),
];

/// A qcow2 image whose header makes sense.
#[derive(Debug)]
pub(crate) struct Image {
    source: Source,
    virtual_bytes: u64,
    cluster_bits: u32,
    l1_offset: u64,
    l1_entries: u64,
    version: u32,
}

impl Image {
    pub fn open(source: Source) -> Result<Self, ImageError> {
        let header = source.read_vec("the header", 0, V2_HEADER_BYTES as usize)?;
        let u32_at = |offset| u32::from_be_bytes(field(&header, offset));
        let u64_at = |offset| u64::from_be_bytes(field(&header, offset));
        let version = u32_at(4);
        if !(2..=3).contains(&version) {
            return Err(source.unsupported(format!("version {version}; versions 2 and 3 are known")));
        }
        let cluster_bits = u32_at(20);
        if !(9..=21).contains(&cluster_bits) {
            return Err(source.corrupt(format!("cluster size 2^{cluster_bits}, must be 2^9..=2^21")));
        }
        if u64_at(8) != 0 {
            return Err(source.external("it has a backing file"));
        }
        if u32_at(32) != 0 {
            return Err(source.unsupported("it is encrypted; decrypt it first with qemu-img convert"));
        }
        let image = Self {
            virtual_bytes: u64_at(24),
            cluster_bits,
            l1_offset: u64_at(40),
            l1_entries: u64::from(u32_at(36)),
            version,
            source,
        };
        if version == 3 {
            image.check_version_3()?;
        }
        image.check_l1_place()?;
        Ok(image)
    }

    pub fn virtual_bytes(&self) -> u64 {
        self.virtual_bytes
    }

    fn cluster_bytes(&self) -> u64 {
        1 << self.cluster_bits
    }

    fn check_version_3(&self) -> Result<(), ImageError> {
        let source = &self.source;
        let header = source.read_vec("the header", 0, V3_HEADER_BYTES as usize)?;
        let incompatible = u64::from_be_bytes(field(&header, 72));
        if incompatible & 1 << 2 != 0 {
            return Err(source.external("its data is in an external data file"));
        }
        if let Some((_, what)) = INCOMPATIBLE.iter().find(|(bit, _)| incompatible & 1 << bit != 0) {
            return Err(source.unsupported(*what));
        }
        if incompatible != 0 {
            return Err(source.unsupported(format!("unknown incompatible features {incompatible:#x}")));
        }
        let header_bytes = u64::from(u32::from_be_bytes(field(&header, 100)));
        if !(V3_HEADER_BYTES..=self.cluster_bytes()).contains(&header_bytes) || header_bytes % 8 != 0 {
            return Err(source.corrupt(format!("header length {header_bytes}")));
        }
        self.check_extensions(header_bytes)
    }

    /// Extensions: type, length, data padded to 8 bytes, until type 0; all inside the first cluster.
    fn check_extensions(&self, mut offset: u64) -> Result<(), ImageError> {
        loop {
            if offset + 8 > self.cluster_bytes() {
                return Err(self.source.corrupt("header extensions leave the first cluster"));
            }
            let head = self.source.read_vec("a header extension", offset, 8)?;
            let kind = u32::from_be_bytes(field(&head, 0));
            let length = u64::from(u32::from_be_bytes(field(&head, 4)));
            if kind == 0 {
                return Ok(());
            }
            if length > self.cluster_bytes() {
                return Err(self.source.corrupt("header extensions leave the first cluster"));
            }
            if kind == FEATURE_NAMES && length % 48 != 0 {
                return Err(self.source.corrupt(format!("feature name table of {length} bytes")));
            }
            offset += 8 + length.next_multiple_of(8);
        }
    }

    fn check_l1_place(&self) -> Result<(), ImageError> {
        let per_l2 = self.cluster_bytes() / 8 * self.cluster_bytes();
        let needed = self.virtual_bytes.div_ceil(per_l2);
        if self.l1_entries < needed {
            let what = format!("L1 table of {} entries, {needed} are needed", self.l1_entries);
            return Err(self.source.corrupt(what));
        }
        if self.l1_entries * 8 > MAX_L1_BYTES {
            return Err(self.source.unsupported(format!("L1 table of {} entries", self.l1_entries)));
        }
        if !self.l1_offset.is_multiple_of(self.cluster_bytes()) {
            return Err(self.source.corrupt(format!("L1 table at byte {}", self.l1_offset)));
        }
        self.source.check("the L1 table", self.l1_offset, self.l1_entries * 8)
    }

    /// Walks all tables: everything they point at must stand inside the file, and no more of it than the file can hold,
    /// which keeps clusters that are mapped many times from filling the disk.
    pub fn check_tables(&self) -> Result<(), ImageError> {
        let source = &self.source;
        let cluster = self.cluster_bytes();
        let l1 = source.read_vec("the L1 table", self.l1_offset, (self.l1_entries * 8) as usize)?;
        let mut l2 = vec![0; cluster as usize];
        let (mut tables, mut plain, mut compressed) = (0u64, 0u64, 0u64);
        for (index, entry) in l1.as_chunks::<8>().0.iter().enumerate() {
            let l2_offset = u64::from_be_bytes(*entry) & OFFSET_MASK;
            let first = index as u64 * (cluster / 8) * cluster;
            if l2_offset == 0 || first >= self.virtual_bytes {
                continue;
            }
            if !l2_offset.is_multiple_of(cluster) {
                return Err(source.corrupt(format!("L2 table at byte {l2_offset}")));
            }
            tables += 1;
            source.read("an L2 table", &mut l2, l2_offset)?;
            let used = (self.virtual_bytes - first).div_ceil(cluster);
            for (slot, entry) in l2.as_chunks::<8>().0.iter().take(used as usize).enumerate() {
                let guest_left = self.virtual_bytes - first - slot as u64 * cluster;
                match self.check_entry(u64::from_be_bytes(*entry), guest_left)? {
                    Entry::Nothing => {}
                    Entry::Plain => plain += 1,
                    Entry::Compressed => compressed += 1,
                }
            }
        }
        let clusters = source.bytes.div_ceil(cluster);
        if tables > clusters || plain > clusters {
            return Err(source.corrupt("clusters are mapped more than once"));
        }
        if compressed.saturating_mul(cluster) > source.bytes.saturating_mul(MAX_INFLATION) {
            return Err(source.corrupt("compressed clusters are mapped more than once"));
        }
        Ok(())
    }

    fn check_entry(&self, entry: u64, guest_left: u64) -> Result<Entry, ImageError> {
        let source = &self.source;
        let cluster = self.cluster_bytes();
        if entry & 1 << 62 != 0 {
            let bits = 62 - (self.cluster_bits - 8);
            let offset = entry & ((1 << bits) - 1);
            let sectors = (entry & ((1 << 62) - 1)) >> bits;
            // The descriptor counts sectors; the data ends somewhere in the last one.
            let end = offset / SECTOR * SECTOR + sectors * SECTOR + 1;
            source.check("a compressed cluster", 0, end.max(offset + 1))?;
            return Ok(Entry::Compressed);
        }
        let offset = entry & OFFSET_MASK;
        if self.version == 3 && entry & 1 != 0 || offset == 0 {
            return Ok(Entry::Nothing);
        }
        if !offset.is_multiple_of(cluster) {
            return Err(source.corrupt(format!("a cluster at byte {offset}")));
        }
        source.check("a cluster", offset, cluster.min(guest_left))?;
        Ok(Entry::Plain)
    }

    /// Writes the disk, padded to `size`.
    pub fn copy(self, size: u64, writer: &mut dyn DiskSink, progress: ProgressFn<'_>) -> Result<(), ImageError> {
        let failed = |error: io::Error| match error.raw_os_error() {
            Some(_) => ImageError::io("read", &self.source.path)(error),
            None => self.source.corrupt(error.to_string()),
        };
        let file = self.source.file.try_clone().map_err(failed)?;
        let storage = Storage::from_open_file(file, StorageOpenOptions::new()).map_err(failed)?;
        let qcow2: Qcow2<Storage> = Qcow2::builder(storage)
            .backing(None)
            .data_file(None)
            .open(DenyImplicitOpenGate::default())
            .map_err(failed)?;
        let disk = FormatAccess::new(qcow2);
        let mut buffer = vec![0; BUFFER as usize];
        while writer.position() < self.virtual_bytes {
            let at = writer.position();
            let (mapping, length) = disk.get_mapping(at, self.virtual_bytes - at).map_err(failed)?;
            if length == 0 {
                return Err(self.source.corrupt(format!("nothing is mapped at byte {at} of the disk")));
            }
            if let Mapping::Zero { .. } = mapping {
                writer.zeros(length, &mut |done| progress(done, size))?;
                continue;
            }
            let count = length.min(BUFFER) as usize;
            let piece = buffer.get_mut(..count).unwrap_or_default();
            disk.read(&mut *piece, at).map_err(failed)?;
            writer.data(piece)?;
            progress(writer.position(), size);
        }
        writer.zeros(size - self.virtual_bytes, &mut |_| {})?;
        Ok(())
    }
}

enum Entry {
    Nothing,
    Plain,
    Compressed,
}
