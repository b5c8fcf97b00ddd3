//! virtio-blk (virtio 1.2, section 5.2).

mod backend;
mod request;

pub(crate) use backend::BlockBackend;

use hearth_block::{SECTOR_BYTES, Volume};
use virtio_bindings::virtio_blk::{
    VIRTIO_BLK_F_BLK_SIZE, VIRTIO_BLK_F_DISCARD, VIRTIO_BLK_F_FLUSH, VIRTIO_BLK_F_MQ, VIRTIO_BLK_F_RO,
    VIRTIO_BLK_F_SEG_MAX, VIRTIO_BLK_F_SIZE_MAX, VIRTIO_BLK_F_TOPOLOGY, VIRTIO_BLK_F_WRITE_ZEROES,
};
use virtio_bindings::virtio_ids::VIRTIO_ID_BLOCK;

use super::transport::Profile;

/// Descriptors per queue.
pub(crate) const QUEUE_SIZE: u16 = 256;
/// Most data segments of a request: the queue's descriptors without header and status.
const SEGMENTS_MAX: u32 = QUEUE_SIZE as u32 - 2;
/// Most bytes of one segment.
const SEGMENT_BYTES_MAX: u32 = 1 << 20;
/// Most ranges in one DISCARD or WRITE_ZEROES request.
pub(crate) const RANGES_MAX: usize = 16;

/// The disk as drivers see it.
pub(crate) fn profile(volume: &dyn Volume, queues: u16) -> Profile {
    let limits = volume.limits();
    let mut features = 1 << VIRTIO_BLK_F_SIZE_MAX
        | 1 << VIRTIO_BLK_F_SEG_MAX
        | 1 << VIRTIO_BLK_F_BLK_SIZE
        | 1 << VIRTIO_BLK_F_TOPOLOGY
        | 1 << VIRTIO_BLK_F_FLUSH;
    if queues > 1 {
        features |= 1 << VIRTIO_BLK_F_MQ;
    }
    if volume.read_only() {
        features |= 1 << VIRTIO_BLK_F_RO;
    } else {
        if limits.max_discard_bytes > 0 {
            features |= 1 << VIRTIO_BLK_F_DISCARD;
        }
        if limits.max_write_zeroes_bytes > 0 {
            features |= 1 << VIRTIO_BLK_F_WRITE_ZEROES;
        }
    }
    Profile {
        device_type: VIRTIO_ID_BLOCK as u16,
        class: 0x01_80_00,
        features,
        acceptable: |_| true,
        queue_sizes: vec![QUEUE_SIZE; usize::from(queues)],
    }
}

/// `struct virtio_blk_config`, up to the write-zeroes fields.
pub(crate) fn config_space(volume: &dyn Volume, queues: u16) -> Vec<u8> {
    let limits = volume.limits();
    let logical = limits.logical_block_bytes.max(512);
    let in_blocks = |bytes: u32| bytes / logical;
    let sectors = |bytes: u64| u32::try_from(bytes / SECTOR_BYTES).unwrap_or(u32::MAX);
    let physical_exponent = limits.physical_block_bytes.max(logical).ilog2() - logical.ilog2();
    let mut config = Vec::with_capacity(60);
    let mut put = |bytes: &[u8]| config.extend_from_slice(bytes);
    put(&(volume.size_bytes() / SECTOR_BYTES).to_le_bytes());
    put(&SEGMENT_BYTES_MAX.to_le_bytes());
    put(&SEGMENTS_MAX.to_le_bytes());
    put(&[0; 4]); // geometry: not offered
    put(&logical.to_le_bytes());
    put(&[physical_exponent as u8, 0]);
    put(&(in_blocks(limits.physical_block_bytes).max(1) as u16).to_le_bytes());
    put(&in_blocks(limits.optimal_io_bytes).to_le_bytes());
    put(&[1, 0]); // write-back cache, as FLUSH implies
    put(&queues.to_le_bytes());
    put(&sectors(limits.max_discard_bytes).to_le_bytes());
    put(&(RANGES_MAX as u32).to_le_bytes());
    put(&sectors(u64::from(limits.discard_granularity_bytes)).to_le_bytes());
    put(&sectors(limits.max_write_zeroes_bytes).to_le_bytes());
    put(&(RANGES_MAX as u32).to_le_bytes());
    put(&[1, 0, 0, 0]); // write_zeroes_may_unmap
    config
}
