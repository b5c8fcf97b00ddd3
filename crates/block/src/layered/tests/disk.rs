//! A disk that can lose power. Sectors written since the last sync have several versions; a power cut keeps any one of
//! them, for each sector independently.

use std::collections::HashMap;
use std::io;
use std::sync::{Arc, Mutex};

use crate::layered::op::FileId;
use crate::map::Storage;

pub(crate) const SECTOR: usize = 512;
type Content = [u8; SECTOR];

/// xorshift64*: reproducible from its seed.
#[derive(Clone, Debug)]
pub(crate) struct Rng(u64);

impl Rng {
    pub(crate) fn new(seed: u64) -> Self {
        Self(seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) ^ 0x5851_f42d_4c95_7f2d | 1)
    }

    pub(crate) fn next(&mut self) -> u64 {
        self.0 ^= self.0 >> 12;
        self.0 ^= self.0 << 25;
        self.0 ^= self.0 >> 27;
        self.0.wrapping_mul(0x2545_f491_4f6c_dd1d) >> 11
    }

    pub(crate) fn below(&mut self, bound: u64) -> u64 {
        self.next() % bound.max(1)
    }

    pub(crate) fn chance(&mut self, of: u64) -> bool {
        self.below(of) == 0
    }
}

#[derive(Clone, Debug)]
struct Version {
    id: u64,
    /// The call that wrote it was answered: only such versions are covered by a sync that begins now.
    completed: bool,
    content: Content,
}

#[derive(Clone, Debug, Default)]
struct Sector {
    durable: Option<Box<Content>>,
    versions: Vec<Version>,
}

#[derive(Debug, Default)]
struct SimFile {
    sectors: HashMap<u64, Sector>,
    /// Sectors with versions.
    dirty: Vec<u64>,
    length: u64,
    durable_length: u64,
}

impl SimFile {
    fn content(&self, sector: u64) -> Content {
        let Some(found) = self.sectors.get(&sector) else { return [0; SECTOR] };
        match found.versions.last() {
            Some(version) => version.content,
            None => found.durable.as_deref().copied().unwrap_or([0; SECTOR]),
        }
    }

    fn put(&mut self, sector: u64, id: u64, content: Content, completed: bool) {
        let entry = self.sectors.entry(sector).or_default();
        if entry.versions.is_empty() {
            self.dirty.push(sector);
        }
        entry.versions.push(Version { id, completed, content });
        self.length = self.length.max((sector + 1) * SECTOR as u64);
    }
}

/// What a sync that has begun will make durable: for each sector the newest version it covers.
pub(crate) type Covered = Vec<(u64, u64)>;

#[derive(Debug, Default)]
struct State {
    files: [SimFile; 5],
    ids: u64,
    /// Changing calls until the power is cut in the middle of one.
    fuse: Option<u64>,
    /// The call in the middle of which it was.
    died: Option<Died>,
}

/// The call that was under way when the fuse burnt out.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Died {
    pub(crate) file: FileId,
    pub(crate) writing: bool,
}

#[derive(Debug, Default)]
pub(crate) struct SimDisk(Mutex<State>);

impl SimDisk {
    fn with<R>(&self, f: impl FnOnce(&mut State) -> R) -> R {
        f(&mut self.0.lock().unwrap())
    }

    pub(crate) fn read(&self, file: FileId, mut offset: u64, into: &mut [u8]) {
        self.with(|state| {
            let file = &state.files[file as usize];
            let mut into = into;
            while !into.is_empty() {
                let inside = offset as usize % SECTOR;
                let length = (SECTOR - inside).min(into.len());
                let (now, rest) = into.split_at_mut(length);
                now.copy_from_slice(&file.content(offset / SECTOR as u64)[inside..inside + length]);
                offset += length as u64;
                into = rest;
            }
        });
    }

    /// Changes what reads see. Returns the id of the write.
    pub(crate) fn write(&self, file: FileId, mut offset: u64, mut bytes: &[u8], completed: bool) -> u64 {
        self.with(|state| {
            state.ids += 1;
            let id = state.ids;
            let file = &mut state.files[file as usize];
            while !bytes.is_empty() {
                let (sector, inside) = (offset / SECTOR as u64, offset as usize % SECTOR);
                let length = (SECTOR - inside).min(bytes.len());
                let mut content = file.content(sector);
                content[inside..inside + length].copy_from_slice(&bytes[..length]);
                file.put(sector, id, content, completed);
                offset += length as u64;
                bytes = &bytes[length..];
            }
            id
        })
    }

    pub(crate) fn zero(&self, file: FileId, offset: u64, length: u64) -> u64 {
        self.with(|state| {
            state.ids += 1;
            let id = state.ids;
            let file = &mut state.files[file as usize];
            let zeroed = offset / SECTOR as u64..(offset + length) / SECTOR as u64;
            let present: Vec<u64> = if zeroed.end - zeroed.start > 4096 {
                file.sectors.keys().copied().filter(|sector| zeroed.contains(sector)).collect()
            } else {
                zeroed.filter(|sector| file.sectors.contains_key(sector)).collect()
            };
            present.into_iter().for_each(|sector| file.put(sector, id, [0; SECTOR], false));
            id
        })
    }

    /// The call that made these changes was answered.
    pub(crate) fn complete(&self, file: FileId, id: u64) {
        self.with(|state| {
            let file = &mut state.files[file as usize];
            for sector in &file.dirty {
                let versions = &mut file.sectors.get_mut(sector).unwrap().versions;
                versions.iter_mut().filter(|version| version.id == id).for_each(|version| version.completed = true);
            }
        });
    }

    /// The process is gone: what took effect is in the page cache like everything else.
    pub(crate) fn complete_all(&self) {
        self.with(|state| {
            for sector in state.files.iter_mut().flat_map(|file| file.sectors.values_mut()) {
                sector.versions.iter_mut().for_each(|version| version.completed = true);
            }
        });
    }

    pub(crate) fn sync_begins(&self, file: FileId) -> Covered {
        self.with(|state| {
            let file = &state.files[file as usize];
            let newest = |sector: &u64| {
                let versions = &file.sectors[sector].versions;
                versions.iter().rev().find(|version| version.completed).map(|version| (*sector, version.id))
            };
            file.dirty.iter().filter_map(newest).collect()
        })
    }

    pub(crate) fn sync_ends(&self, file: FileId, covered: &Covered) {
        self.with(|state| {
            let file = &mut state.files[file as usize];
            for (sector, id) in covered {
                let entry = file.sectors.get_mut(sector).unwrap();
                let Some(at) = entry.versions.iter().position(|version| version.id == *id) else { continue };
                let rest = entry.versions.split_off(at + 1);
                entry.durable = entry.versions.pop().map(|version| Box::new(version.content));
                entry.versions = rest;
            }
            let SimFile { sectors, dirty, .. } = file;
            dirty.retain(|sector| !sectors[sector].versions.is_empty());
            file.durable_length = file.length;
        });
    }

    /// Power fails: of every unsynced sector, some version survives.
    pub(crate) fn power_cut(&self, rng: &mut Rng) {
        self.with(|state| {
            let mood = rng.below(4);
            for file in &mut state.files {
                for sector in std::mem::take(&mut file.dirty) {
                    let entry = file.sectors.get_mut(&sector).unwrap();
                    let count = entry.versions.len() as u64;
                    let keep = match mood {
                        0 => 0,
                        1 => count,
                        _ => rng.below(count + 1),
                    };
                    if keep > 0 {
                        entry.durable = Some(Box::new(entry.versions[keep as usize - 1].content));
                    }
                    entry.versions.clear();
                }
                if rng.chance(2) {
                    file.length = file.durable_length;
                }
                file.durable_length = file.length;
            }
            state.fuse = None;
            state.died = None;
        });
    }

    /// The process that made calls is gone, the host is not.
    pub(crate) fn revive(&self) {
        self.with(|state| (state.fuse, state.died) = (None, None));
    }

    pub(crate) fn length(&self, file: FileId) -> u64 {
        self.with(|state| state.files[file as usize].length)
    }

    /// What no power cut can take.
    pub(crate) fn durable(&self, file: FileId) -> Vec<(u64, Content)> {
        self.with(|state| {
            let sectors = state.files[file as usize].sectors.iter();
            sectors.filter_map(|(at, sector)| sector.durable.as_deref().map(|content| (*at, *content))).collect()
        })
    }

    /// The power will fail during one of the next calls that change something.
    pub(crate) fn set_fuse(&self, calls: Option<u64>) {
        self.with(|state| state.fuse = calls);
    }

    /// The call during which it failed, until [`power_cut`](Self::power_cut).
    pub(crate) fn died(&self) -> Option<Died> {
        self.with(|state| state.died)
    }

    pub(crate) fn flip_bit(&self, file: FileId, bit: u64) {
        self.with(|state| {
            let file = &mut state.files[file as usize];
            let sector = bit / 8 / SECTOR as u64;
            let mut content = file.content(sector);
            content[(bit / 8) as usize % SECTOR] ^= 1 << (bit % 8);
            assert!(file.dirty.is_empty());
            file.sectors.entry(sector).or_default().durable = Some(Box::new(content));
        });
    }

    pub(crate) fn storage(self: &Arc<Self>, file: FileId) -> SimStorage {
        SimStorage { disk: Arc::clone(self), file }
    }

    /// A call that changes something begins; true when the power fails during it.
    pub(crate) fn burn(&self, file: FileId, writing: bool) -> io::Result<bool> {
        self.with(|state| {
            if state.died.is_some() {
                return Err(io::Error::other("the power is off"));
            }
            if let Some(left) = &mut state.fuse {
                if *left == 0 {
                    state.died = Some(Died { file, writing });
                    return Ok(true);
                }
                *left -= 1;
            }
            Ok(false)
        })
    }
}

/// A file for cold paths.
#[derive(Debug)]
pub(crate) struct SimStorage {
    disk: Arc<SimDisk>,
    file: FileId,
}

impl Storage for SimStorage {
    fn read_at(&self, buffer: &mut [u8], offset: u64) -> io::Result<()> {
        if offset + buffer.len() as u64 > self.length()? {
            return Err(io::ErrorKind::UnexpectedEof.into());
        }
        self.disk.read(self.file, offset, buffer);
        Ok(())
    }

    fn write_at(&self, bytes: &[u8], offset: u64) -> io::Result<()> {
        let dies = self.disk.burn(self.file, true)?;
        self.disk.write(self.file, offset, bytes, true);
        if dies { Err(io::Error::other("the power fails")) } else { Ok(()) }
    }

    fn sync(&self) -> io::Result<()> {
        if self.disk.burn(self.file, false)? {
            return Err(io::Error::other("the power fails"));
        }
        let covered = self.disk.sync_begins(self.file);
        self.disk.sync_ends(self.file, &covered);
        Ok(())
    }

    fn next_data(&self, offset: u64) -> io::Result<Option<u64>> {
        let first = |state: &mut State| {
            let file = &state.files[self.file as usize];
            let ends = |sector: &u64| (sector + 1) * SECTOR as u64 > offset && sector * (SECTOR as u64) < file.length;
            file.sectors.keys().copied().filter(ends).min()
        };
        Ok(self.disk.with(first).map(|sector| offset.max(sector * SECTOR as u64)))
    }

    fn length(&self) -> io::Result<u64> {
        Ok(self.disk.length(self.file))
    }

    fn set_length(&self, bytes: u64) -> io::Result<()> {
        let dies = self.disk.burn(self.file, true)?;
        self.disk.with(|state| state.files[self.file as usize].length = bytes);
        if dies { Err(io::Error::other("the power fails")) } else { Ok(()) }
    }
}
