//! File systems that lost their power: made by mke2fs, their logs written by debugfs, what they should become by e2fsck.

use std::fmt::Write;
use std::path::Path;
use std::process::Command;
use std::sync::Arc;

use super::support::*;
use crate::boot::journal::tests::journal_file_of;
pub use crate::boot::journal::tests::parse_superblock;
use crate::boot::read_at::{ReadAt, Window};

/// JBD2's magic number, at the start of some blocks of the new kernel, so that they must be escaped.
pub const MAGIC: [u8; 4] = [0xc0, 0x3b, 0x39, 0x98];

/// debugfs has no name for it, complains, and does it.
pub const CHECKSUM_PER_TRANSACTION: &str = "-c -v 1";

/// A kind of file system and of journal.
#[derive(Clone, Copy, Debug)]
pub struct Kind {
    pub mke2fs: &'static str,
    /// Arguments of debugfs' journal_open.
    pub open: &'static str,
}

impl Kind {
    /// debugfs' checksums of transactions with revocations are wrong where there is one per transaction: e2fsck says so.
    pub fn revokes(&self) -> bool {
        self.open != CHECKSUM_PER_TRANSACTION
    }
}

/// A file system before and after.
#[derive(Clone)]
pub struct Dirty {
    pub kind: Kind,
    /// Needs recovery.
    pub image: Vec<u8>,
    /// After e2fsck's replay.
    pub replayed: Vec<u8>,
    pub block_size: usize,
    /// The kernel that is only seen after the replay, and the one before.
    pub new_kernel: Vec<u8>,
    pub old_kernel: Vec<u8>,
    /// A block whose revoked content must not be seen.
    pub revoked: u64,
}

pub fn e2fsprogs(program: &str, arguments: &[&str], path: &Path) {
    let output = Command::new(program)
        .env("PATH", "/usr/sbin:/sbin:/usr/bin:/bin")
        .args(arguments)
        .arg(path)
        .output()
        .unwrap_or_else(|error| panic!("{program} (package e2fsprogs) is needed for tests of journals: {error}"));
    let said = [output.stdout, output.stderr].concat();
    let said = String::from_utf8_lossy(&said).into_owned();
    // e2fsck: 1 = corrected.
    let good = output.status.success() || (program == "e2fsck" && output.status.code() == Some(1));
    assert!(good, "{program} {arguments:?}: {said}");
}

fn debugfs(path: &Path, script: &str) {
    let file = path.with_extension("script");
    std::fs::write(&file, script).unwrap();
    // It fails in words alone; whoever calls looks at what came of it.
    e2fsprogs("debugfs", &["-w", "-f", file.to_str().unwrap()], path);
}

fn kernel(mark: &str, bytes: usize) -> Vec<u8> {
    let mut kernel = fake_kernel(mark);
    let mut state = mark.bytes().map(u32::from).sum::<u32>();
    while kernel.len() < bytes {
        state = state.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
        kernel.extend_from_slice(&state.to_le_bytes());
    }
    for at in (8192..bytes).step_by(16384) {
        kernel[at..at + 4].copy_from_slice(&MAGIC);
    }
    kernel
}

pub fn le32(image: &[u8], at: usize) -> u32 {
    u32::from_le_bytes(image[at..at + 4].try_into().unwrap())
}

pub fn block_size(image: &[u8]) -> usize {
    1024 << le32(image, 1024 + 0x18)
}

impl Dirty {
    /// An old kernel on the disk; in the log: another file system with a newer one, block by block, in some transactions, with
    /// revocations before, between and after.
    pub fn make(kind: Kind) -> Self {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("image");
        let (old_kernel, new_kernel) = (kernel("old", 9000), kernel("new", 300_000));
        let tree = folder.path().join("tree");
        std::fs::create_dir_all(tree.join("boot")).unwrap();
        std::fs::create_dir_all(tree.join("sbin")).unwrap();
        std::fs::write(tree.join("sbin/init"), "init").unwrap();
        std::fs::write(tree.join("boot/vmlinuz-1"), &old_kernel).unwrap();
        std::fs::File::create(&path).unwrap().set_len(16 << 20).unwrap();
        let mut arguments = vec!["-q", "-F", "-U", FS_UUID, "-d", tree.to_str().unwrap()];
        arguments.extend(kind.mke2fs.split_whitespace());
        e2fsprogs("mke2fs", &arguments, &path);
        let old = std::fs::read(&path).unwrap();

        let source = folder.path().join("kernel");
        std::fs::write(&source, &new_kernel).unwrap();
        debugfs(&path, &format!("write {} /boot/vmlinuz-2\nrm /boot/vmlinuz-1\n", source.display()));
        let new = std::fs::read(&path).unwrap();
        std::fs::write(&path, &old).unwrap();

        let size = block_size(&old);
        let changed: Vec<usize> =
            (0..old.len() / size).filter(|block| old[block * size..][..size] != new[block * size..][..size]).collect();
        assert!(changed.len() > 300_000 / size);
        let free = (old.len() / size - 20) as u64;
        let junk = folder.path().join("junk");
        std::fs::write(&junk, vec![0xaa; size * changed.len()]).unwrap();
        let list = |blocks: &[usize]| blocks.iter().map(usize::to_string).collect::<Vec<_>>().join(",");
        let part = |name: &str, blocks: &[usize]| {
            let content: Vec<u8> = blocks.iter().flat_map(|block| &new[block * size..][..size]).copied().collect();
            let file = folder.path().join(name);
            std::fs::write(&file, content).unwrap();
            format!("jw -b {} {}\n", list(blocks), file.display())
        };
        let (first, second) = changed.split_at(changed.len() / 2);
        let mut script = format!("jo {}\n", kind.open);
        // What is revoked stays as it was, unless it is written again later.
        let last = list(&changed[changed.len() - 3..]);
        writeln!(script, "jw -b {free},{},{last} {}", free + 1, junk.display()).unwrap();
        if kind.revokes() {
            writeln!(script, "jw -r {free},{last}").unwrap();
        }
        script += &part("first", first);
        script += &part("second", second);
        script += &if kind.revokes() { format!("jw -r {}\njc\n", free + 7) } else { "jc\n".to_owned() };
        debugfs(&path, &script);
        let image = std::fs::read(&path).unwrap();
        let replayed = replay(&image);
        Self { kind, image, replayed, block_size: size, new_kernel, old_kernel, revoked: free }
    }

    /// The journal's ring turned by so many blocks.
    pub fn turned(&self, by: usize) -> Vec<u8> {
        let mut image = self.image.clone();
        let superblock = parse_superblock(&image);
        let (first, length) = (superblock.first as usize, (superblock.last - superblock.first) as usize);
        let places: Vec<usize> = journal_places(&image);
        let size = self.block_size;
        for index in 0..length {
            let from = places[first + index] * size;
            let to = places[first + (index + by) % length] * size;
            image[to..to + size].copy_from_slice(&self.image[from..from + size]);
        }
        let start = (superblock.start as usize - first + by) % length + first;
        patch_journal(&mut image, &[(0x1c, start as u32)]);
        image
    }
}

/// Where the blocks of the journal lie.
pub fn journal_places(image: &[u8]) -> Vec<usize> {
    let file = journal_file_of(image);
    (0..file.blocks).map(|block| file.physical(block).unwrap() as usize).collect()
}

/// Changes big-endian words of the journal's superblock, and its checksum if it has one.
pub fn patch_journal(image: &mut [u8], words: &[(usize, u32)]) {
    let at = journal_places(image)[0] * block_size(image);
    let superblock = &mut image[at..at + 1024];
    for (offset, value) in words {
        superblock[*offset..offset + 4].copy_from_slice(&value.to_be_bytes());
    }
    if superblock[0x2b] & 0x18 != 0 {
        let sum = crate::boot::journal::tests::superblock_checksum(superblock);
        superblock[0xfc..0x100].copy_from_slice(&sum.to_be_bytes());
    }
}

/// What e2fsck makes of it when it only replays.
pub fn replay(image: &[u8]) -> Vec<u8> {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("image");
    std::fs::write(&path, image).unwrap();
    e2fsprogs("e2fsck", &["-y", "-E", "journal_only"], &path);
    std::fs::read(path).unwrap()
}

/// The whole file system as boot discovery sees it.
pub fn seen(image: &[u8]) -> Vec<u8> {
    let disk: Arc<dyn ReadAt> = Arc::new(image.to_vec());
    let view = crate::boot::journal::replayed(Window::new(disk, 0, image.len() as u64)).unwrap();
    let mut seen = vec![0; image.len()];
    // Pieces that begin and end anywhere.
    let mut at = 0;
    for length in [1usize, 1000, 777, 4096, 100_000, 131_072].iter().cycle() {
        let end = (at + length).min(seen.len());
        view.read_exact_at(&mut seen[at..end], at as u64).unwrap();
        at = end;
        if at == seen.len() {
            break;
        }
    }
    seen
}

/// Blocks of `seen`, a view of `image`, that differ from `replayed`, but for what e2fsck notes for itself: times and counters in the super block; and but for the log.
pub fn differences(image: &[u8], seen: &[u8], replayed: &[u8]) -> Vec<usize> {
    let size = block_size(seen);
    let journal = journal_places(image);
    let cleaned = |image: &[u8]| {
        let mut image = image.to_vec();
        for range in [0x2c..0x36, 0x3a..0x3c, 0x178..0x180, 0x3fc..0x400] {
            image[1024 + range.start..1024 + range.end].fill(0);
        }
        image
    };
    let (seen, replayed) = (cleaned(seen), cleaned(replayed));
    let differs = |block: &usize| seen[block * size..][..size] != replayed[block * size..][..size];
    (0..seen.len() / size).filter(|block| differs(block) && !journal.contains(block)).collect()
}
