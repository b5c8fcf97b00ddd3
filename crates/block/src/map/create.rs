//! Creation of map files.

use super::format::{CHUNK_BYTES, pages_for, slot_offset};
use super::header::{check_size, write_first_header};
use super::{Extent, Header, MapError, Storage};

/// The snapshot a volume is made from.
#[derive(Debug)]
pub struct MapBase {
    /// Root hash of its manifest.
    pub root: [u8; 32],
    /// Chunks present in the manifest. Every other range is LOCAL from the start, so it reads as zeros and never touches
    /// the map again.
    pub extent: Extent,
}

/// What a new volume is to be.
#[derive(Debug)]
pub struct MapSpec {
    /// Id of the volume, at most 32 bytes.
    pub volume_id: String,
    /// Size, a multiple of 4096.
    pub size_bytes: u64,
    /// What it is made from; without it everything is LOCAL.
    pub base: Option<MapBase>,
    /// First attachment generation that may open it.
    pub generation: u64,
    /// `data` has its content already, and all of it counts as DIRTY. Otherwise it must be a hole.
    pub filled: bool,
}

/// Creates the map of a new volume in an empty file and makes it durable. Its `data` file must be `size_bytes` long. Nothing but the
/// header is written, whatever the size; a map whose creation was cut off is refused.
pub fn create(file: &dyn Storage, spec: MapSpec) -> Result<(), MapError> {
    check_size(spec.size_bytes)?;
    let mut volume_id = [0u8; 32];
    match volume_id.get_mut(..spec.volume_id.len()) {
        Some(to) if !to.is_empty() => to.copy_from_slice(spec.volume_id.as_bytes()),
        _ => return Err(MapError::VolumeId(spec.volume_id)),
    }
    let chunks = spec.size_bytes.div_ceil(CHUNK_BYTES);
    let (root, extent) = spec.base.map(|base| (base.root, base.extent.cut(chunks))).unzip();
    let mut header = Header {
        sequence: 0,
        // As after a crash: every chunk that the volume itself holds counts as DIRTY.
        clean: !spec.filled,
        volume_id,
        size_bytes: spec.size_bytes,
        generation: spec.generation,
        base_root: root,
        extent_chunks: chunks,
        extent_checksum: extent.unwrap_or_default().checksum(),
    };
    file.set_length(slot_offset(pages_for(spec.size_bytes), 0)).map_err(MapError::io("set the length of"))?;
    write_first_header(file, &mut header)
}
