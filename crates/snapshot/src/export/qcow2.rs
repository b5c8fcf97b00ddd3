//! Writing qcow2: <https://gitlab.com/qemu-project/qemu/-/blob/master/docs/interop/qcow2.rst>
//!
//! Clusters stand in this order: header, L1 table, then data clusters with the L2 table of each 512 MiB behind them, at the end
//! the refcount blocks and their table. The header is written last.

use std::fs::File;
use std::os::unix::fs::FileExt;
use std::path::Path;
use std::sync::Arc;

use bytes::Bytes;
use futures::{StreamExt, TryStreamExt};
use tokio::task::spawn_blocking;

use super::OnExportProgress;
use crate::chunk::{CHUNK_BYTES, ChunkStore};
use crate::manifest::Manifest;
use crate::objects::StorageError;
use crate::upload::DEFAULT_PARALLEL;
use crate::writer::is_zero;

const CLUSTER_BITS: u32 = 16;
const CLUSTER: u64 = 1 << CLUSTER_BITS;
const HEADER_BYTES: u32 = 104;
/// Refcounts have 16 bits.
const REFCOUNT_ORDER: u32 = 4;
const REFCOUNTS_PER_BLOCK: u64 = CLUSTER / 2;
/// Clusters that one L2 table maps.
const PER_L2: u64 = CLUSTER / 8;
/// The cluster is used once: it may be written in place.
const COPIED: u64 = 1 << 63;

pub(super) async fn write(
    store: &ChunkStore,
    manifest: &Manifest,
    file: Arc<File>,
    path: &Path,
    progress: &OnExportProgress,
) -> Result<u64, StorageError> {
    let size = manifest.size_bytes();
    let mut writer = Writer::new(file, size);
    let reads = manifest
        .entries()
        .map(|(index, chunk)| async move { Ok::<_, StorageError>((index, store.get_chunk(&chunk).await?)) });
    let mut reads = futures::stream::iter(reads).buffered(DEFAULT_PARALLEL);
    let mut done = 0;
    while let Some((index, content)) = reads.try_next().await? {
        let offset = index * CHUNK_BYTES as u64;
        writer = spawn_blocking(move || {
            writer.chunk(offset, &content)?;
            Ok(writer)
        })
        .await?
        .map_err(StorageError::io("write", path))?;
        done += 1;
        progress(done, manifest.present_chunks());
    }
    let written = spawn_blocking(move || writer.finish()).await?;
    written.map_err(StorageError::io("write", path))
}

struct Writer {
    file: Arc<File>,
    size: u64,
    l1: Vec<u64>,
    /// Table of the stretch being written, and which.
    l2: Vec<u64>,
    l2_index: Option<usize>,
    /// First cluster behind all that was given out.
    next: u64,
    data_clusters: u64,
}

fn big_endian(words: &[u64]) -> Vec<u8> {
    words.iter().flat_map(|word| word.to_be_bytes()).collect()
}

impl Writer {
    fn new(file: Arc<File>, size: u64) -> Self {
        let l1_entries = size.div_ceil(PER_L2 * CLUSTER);
        let l1_clusters = (l1_entries * 8).div_ceil(CLUSTER);
        Self {
            file,
            size,
            l1: vec![0; l1_entries as usize],
            l2: vec![0; PER_L2 as usize],
            l2_index: None,
            next: 1 + l1_clusters,
            data_clusters: 0,
        }
    }

    /// Takes the chunks in ascending order.
    fn chunk(&mut self, offset: u64, content: &Bytes) -> std::io::Result<()> {
        for (number, cluster) in content.chunks(CLUSTER as usize).enumerate() {
            let at = offset + number as u64 * CLUSTER;
            if at >= self.size || is_zero(cluster) {
                continue;
            }
            let index = (at / CLUSTER / PER_L2) as usize;
            if self.l2_index != Some(index) {
                self.end_table()?;
                self.l2_index = Some(index);
            }
            let place = self.next * CLUSTER;
            self.file.write_all_at(cluster, place)?;
            self.next += 1;
            self.data_clusters += 1;
            if let Some(entry) = self.l2.get_mut((at / CLUSTER % PER_L2) as usize) {
                *entry = place | COPIED;
            }
        }
        Ok(())
    }

    fn end_table(&mut self) -> std::io::Result<()> {
        let Some(index) = self.l2_index.take() else {
            return Ok(());
        };
        let place = self.next * CLUSTER;
        self.file.write_all_at(&big_endian(&self.l2), place)?;
        self.next += 1;
        self.l2.fill(0);
        if let Some(entry) = self.l1.get_mut(index) {
            *entry = place | COPIED;
        }
        Ok(())
    }

    fn finish(mut self) -> std::io::Result<u64> {
        self.end_table()?;
        // Blocks and table count themselves.
        let (mut blocks, mut tables) = (0u64, 0u64);
        loop {
            let clusters = self.next + blocks + tables;
            let needed = clusters.div_ceil(REFCOUNTS_PER_BLOCK);
            let needed_tables = (needed * 8).div_ceil(CLUSTER);
            if (needed, needed_tables) == (blocks, tables) {
                break;
            }
            (blocks, tables) = (needed, needed_tables);
        }
        let clusters = self.next + blocks + tables;
        let table_at = (self.next + blocks) * CLUSTER;
        self.file.set_len(clusters * CLUSTER)?;
        for block in 0..blocks {
            let used = (clusters - block * REFCOUNTS_PER_BLOCK).min(REFCOUNTS_PER_BLOCK) as usize;
            let content: Vec<u8> = std::iter::repeat_n(1u16.to_be_bytes(), used).flatten().collect();
            self.file.write_all_at(&content, (self.next + block) * CLUSTER)?;
        }
        let table: Vec<u64> = (0..blocks).map(|block| (self.next + block) * CLUSTER).collect();
        self.file.write_all_at(&big_endian(&table), table_at)?;
        self.file.write_all_at(&big_endian(&self.l1), CLUSTER)?;
        self.file.write_all_at(&self.header(table_at, tables as u32), 0)?;
        Ok(self.data_clusters * CLUSTER)
    }

    fn header(&self, refcount_table: u64, refcount_table_clusters: u32) -> Vec<u8> {
        let mut header = Vec::with_capacity(HEADER_BYTES as usize + 8);
        header.extend_from_slice(crate::format::QCOW2_MAGIC);
        let u32s = |values: &[u32], header: &mut Vec<u8>| {
            values.iter().for_each(|value| header.extend_from_slice(&value.to_be_bytes()));
        };
        u32s(&[3], &mut header);
        header.extend_from_slice(&0u64.to_be_bytes()); // backing file: none
        u32s(&[0, CLUSTER_BITS], &mut header);
        header.extend_from_slice(&self.size.to_be_bytes());
        u32s(&[0, self.l1.len() as u32], &mut header); // encryption: none; L1 entries
        header.extend_from_slice(&CLUSTER.to_be_bytes()); // L1 table
        header.extend_from_slice(&refcount_table.to_be_bytes());
        u32s(&[refcount_table_clusters, 0], &mut header); // snapshots: none
        header.extend_from_slice(&0u64.to_be_bytes());
        header.extend_from_slice(&big_endian(&[0, 0, 0])); // features: incompatible, compatible, autoclear
        u32s(&[REFCOUNT_ORDER, HEADER_BYTES], &mut header);
        u32s(&[0, 0], &mut header); // end of header extensions
        header
    }
}
