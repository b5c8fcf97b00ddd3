//! Decoding of block requests. Pure: a chain in, what to do out.

use hearth_block::{Operation, SECTOR_BYTES};
use virtio_bindings::virtio_blk::{
    VIRTIO_BLK_ID_BYTES, VIRTIO_BLK_S_IOERR, VIRTIO_BLK_S_UNSUPP, VIRTIO_BLK_T_DISCARD, VIRTIO_BLK_T_FLUSH,
    VIRTIO_BLK_T_GET_ID, VIRTIO_BLK_T_IN, VIRTIO_BLK_T_OUT, VIRTIO_BLK_T_WRITE_ZEROES,
    VIRTIO_BLK_WRITE_ZEROES_FLAG_UNMAP,
};

use super::RANGES_MAX;
use crate::virtio::queue::Chain;

/// `struct virtio_blk_req` before its data: type, reserved, sector.
const HEADER_BYTES: usize = 16;
/// `struct virtio_blk_discard_write_zeroes`: sector, sectors, flags.
const RANGE_BYTES: usize = 16;
/// Most bytes of one read or write. Far above what `seg_max` lets drivers send; bounds what one request can ask the host.
const TRANSFER_BYTES_MAX: u64 = 1 << 30;

/// What a request asks for.
#[derive(Debug, PartialEq, Eq)]
pub(crate) enum Work {
    /// Move the chain's data buffers.
    Transfer {
        operation: Operation,
        offset: u64,
    },
    Flush,
    /// Discard or zero the ranges that `decode` noted.
    Ranges {
        operation: Operation,
    },
    /// Put the serial into the chain's data buffers.
    Identify,
    /// Answer this status at once.
    Refuse(u8),
}

/// What the volume allows.
pub(crate) struct Bounds {
    pub(crate) size: u64,
    pub(crate) read_only: bool,
    pub(crate) max_discard: u64,
    pub(crate) max_write_zeroes: u64,
}

/// Decodes a chain and strips header and status byte off its buffers, so that only data is left. `None` when it is too
/// short to be answered. `ranges` gets the (offset, length) pairs in bytes of a DISCARD or WRITE_ZEROES.
pub(crate) fn decode(chain: &mut Chain, bounds: &Bounds, ranges: &mut Vec<(u64, u64)>) -> Option<Work> {
    let mut header = [0u8; HEADER_BYTES];
    let data_in = chain.writable.len().checked_sub(1)?;
    if !chain.readable.read(&mut header) {
        return None;
    }
    chain.readable.advance(HEADER_BYTES as u64);
    chain.writable.truncate(data_in);
    let kind = u32_at(&header, 0);
    let sector = u64_at(&header, 8);
    let refuse = |status: u32| Some(Work::Refuse(status as u8));
    let (operation, bytes) = match kind {
        VIRTIO_BLK_T_IN => (Operation::Read, data_in),
        VIRTIO_BLK_T_OUT => (Operation::Write, chain.readable.len()),
        VIRTIO_BLK_T_FLUSH => return Some(Work::Flush),
        VIRTIO_BLK_T_GET_ID => {
            // Older drivers give exactly 20 bytes; less has no defined meaning.
            let fits = data_in >= u64::from(VIRTIO_BLK_ID_BYTES);
            return if fits { Some(Work::Identify) } else { refuse(VIRTIO_BLK_S_IOERR) };
        }
        VIRTIO_BLK_T_DISCARD | VIRTIO_BLK_T_WRITE_ZEROES => return Some(decode_ranges(chain, kind, bounds, ranges)),
        _ => return refuse(VIRTIO_BLK_S_UNSUPP),
    };
    let aligned = bytes.is_multiple_of(SECTOR_BYTES) && bytes <= TRANSFER_BYTES_MAX;
    let end = sector.checked_mul(SECTOR_BYTES).and_then(|offset| offset.checked_add(bytes));
    match end {
        Some(end) if aligned && end <= bounds.size && !(bounds.read_only && operation == Operation::Write) => {
            Some(Work::Transfer { operation, offset: end - bytes })
        }
        _ => refuse(VIRTIO_BLK_S_IOERR),
    }
}

fn decode_ranges(chain: &Chain, kind: u32, bounds: &Bounds, ranges: &mut Vec<(u64, u64)>) -> Work {
    ranges.clear();
    let failed = Work::Refuse(VIRTIO_BLK_S_IOERR as u8);
    let unsupported = Work::Refuse(VIRTIO_BLK_S_UNSUPP as u8);
    if bounds.read_only {
        return failed;
    }
    let bytes = chain.readable.len();
    let count = usize::try_from(bytes / RANGE_BYTES as u64).unwrap_or(usize::MAX);
    if count == 0 || count > RANGES_MAX || !bytes.is_multiple_of(RANGE_BYTES as u64) {
        return failed;
    }
    let mut raw = [0u8; RANGES_MAX * RANGE_BYTES];
    let Some(raw) = raw.get_mut(..count * RANGE_BYTES) else { return failed };
    if !chain.readable.read(raw) {
        return failed;
    }
    let discard = kind == VIRTIO_BLK_T_DISCARD;
    let limit = if discard { bounds.max_discard } else { bounds.max_write_zeroes };
    let mut all_unmap = true;
    for raw in raw.chunks_exact(RANGE_BYTES) {
        let (sector, sectors, flags) = (u64_at(raw, 0), u32_at(raw, 8), u32_at(raw, 12));
        // 5.2.6.2: unknown flags, and "unmap" on a discard, are not supported.
        if flags & !VIRTIO_BLK_WRITE_ZEROES_FLAG_UNMAP != 0 || (discard && flags != 0) {
            return unsupported;
        }
        all_unmap &= flags == VIRTIO_BLK_WRITE_ZEROES_FLAG_UNMAP;
        let length = u64::from(sectors) * SECTOR_BYTES;
        let offset = sector.checked_mul(SECTOR_BYTES);
        match offset.and_then(|offset| offset.checked_add(length)) {
            Some(end) if end <= bounds.size && length <= limit => ranges.push((end - length, length)),
            _ => return failed,
        }
    }
    let operation = if discard { Operation::Discard } else { Operation::WriteZeroes { may_unmap: all_unmap } };
    Work::Ranges { operation }
}

fn u32_at(bytes: &[u8], offset: usize) -> u32 {
    let mut word = [0; 4];
    if let Some(source) = bytes.get(offset..offset + 4) {
        word.copy_from_slice(source);
    }
    u32::from_le_bytes(word)
}

fn u64_at(bytes: &[u8], offset: usize) -> u64 {
    u64::from(u32_at(bytes, offset)) | (u64::from(u32_at(bytes, offset + 4)) << 32)
}
