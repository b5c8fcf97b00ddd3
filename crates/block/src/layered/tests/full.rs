//! A host whose file system is really full.

use std::fs::File;
use std::io::Write;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::atomic::Ordering;
use std::time::{Duration, Instant};

use super::files::{Files, all, each, read, run, submit, wait, write};
use crate::{CHUNK_BYTES, Cause, Engine, Operation, Volume, VolumeQueue};

const NAME: &str = "layered::tests::full::a_full_file_system_stalls_writes_and_loses_none";
const SMALL: &str = "HEARTH_TEST_SMALL_DISK";
const BYTES: u64 = 8 << 20;
const PATIENCE: Duration = Duration::from_secs(60);

/// Takes all the room there is.
struct Filler(PathBuf);

impl Filler {
    fn new(folder: &Path) -> Self {
        let path = folder.join("filler");
        let mut file = File::create(&path).unwrap();
        let full = std::iter::repeat_with(|| file.write_all(&[1; 4096])).find_map(Result::err).unwrap();
        assert_eq!(full.raw_os_error(), Some(libc::ENOSPC));
        Self(path)
    }
}

impl Drop for Filler {
    fn drop(&mut self) {
        std::fs::remove_file(&self.0).unwrap();
    }
}

/// Waits until the volume says that there is no space.
fn await_impairment(files: &Files, queue: &mut dyn VolumeQueue) {
    let end = Instant::now() + PATIENCE;
    queue.kick().unwrap();
    while !files.agent.impaired.load(Ordering::Relaxed) {
        queue.drain(&mut |done| panic!("{done:?} on a full file system")).unwrap();
        assert!(Instant::now() < end, "nobody tells that the file system is full");
        std::thread::sleep(Duration::from_millis(5));
    }
    assert_eq!(files.agent.causes.lock().unwrap().last(), Some(&Cause::NoSpace));
}

fn stalls_and_goes_on(folder: &Path, engine: Engine, keys: bool) {
    let files = Files::new_in(folder, keys);
    files.bring(1);
    let volume = files.open(engine);
    let (mut queue, mut other) = (volume.open_queue(8).unwrap(), volume.open_queue(8).unwrap());
    write(queue.as_mut(), 2 * CHUNK_BYTES, 4096, 9);

    // Writes wait for room in `data`, and a flush after them.
    let filler = Filler::new(folder);
    let mut contents: Vec<Vec<u8>> = (1..5).map(|byte| vec![byte; 65536]).collect();
    let places = [CHUNK_BYTES, CHUNK_BYTES + 100 * 4096, 3 * CHUNK_BYTES, 5 * CHUNK_BYTES];
    for (place, content) in places.iter().zip(&mut contents) {
        let buffers = [libc::iovec { iov_base: content.as_mut_ptr().cast(), iov_len: content.len() }];
        submit(queue.as_mut(), Operation::Write, *place, 0, &buffers);
    }
    await_impairment(&files, queue.as_mut());
    // What needs no room goes on meanwhile.
    assert!(all(&read(other.as_mut(), 2 * CHUNK_BYTES, 4096), 9));
    assert!(all(&read(other.as_mut(), CHUNK_BYTES + 72 * 4096, 4096), 0xB1));
    drop(filler);
    let mut ended = Vec::new();
    let end = Instant::now() + PATIENCE;
    while ended.len() < places.len() {
        queue
            .drain(&mut |done| {
                done.result.unwrap();
                ended.push(done.token);
            })
            .unwrap();
        assert!(Instant::now() < end, "writes that had waited for room do not end");
        std::thread::sleep(Duration::from_millis(5));
    }
    ended.sort_unstable();
    assert_eq!(ended, places);
    assert!(!files.agent.impaired.load(Ordering::Relaxed), "nobody tells that there is room again");

    // A flush waits for room in the map: the page has none yet.
    let filler = Filler::new(folder);
    submit(queue.as_mut(), Operation::Flush, 0, 0, &[]);
    await_impairment(&files, queue.as_mut());
    drop(filler);
    wait(queue.as_mut(), "a flush that had waited for room").result.unwrap();
    assert!(!files.agent.impaired.load(Ordering::Relaxed));

    // Killed here, what was flushed is there.
    drop((queue, other));
    drop(volume);
    let volume = files.open(engine);
    let mut queue = volume.open_queue(8).unwrap();
    for (place, byte) in places.iter().zip(1..) {
        assert!(all(&read(queue.as_mut(), *place, 65536), byte), "{byte}");
    }
    assert!(all(&read(queue.as_mut(), 2 * CHUNK_BYTES, 4096), 9));
    run(queue.as_mut(), Operation::Flush, 0, 0, &mut []);
    drop(queue);
    volume.close_clean().unwrap();
}

/// In a mount namespace of its own, on a small tmpfs.
#[test]
fn a_full_file_system_stalls_writes_and_loses_none() {
    if let Some(folder) = std::env::var_os(SMALL) {
        let folder = Path::new(&folder);
        assert!(Filler::new(folder).0.metadata().unwrap().len() <= BYTES, "not on the small file system");
        return each(|engine, keys| stalls_and_goes_on(folder, engine, keys));
    }
    let mount = tempfile::tempdir().unwrap();
    let script = format!("mount -t tmpfs -o size={BYTES} none \"$0\" && exec \"$@\"");
    let child = Command::new("unshare")
        .args(["--user", "--map-root-user", "--mount", "sh", "-c", &script])
        .arg(mount.path())
        .arg(std::env::current_exe().unwrap())
        .args(["--exact", NAME, "--nocapture", "--test-threads=1"])
        .env(SMALL, mount.path())
        .output()
        .unwrap();
    let said = String::from_utf8_lossy(&child.stdout).into_owned() + &String::from_utf8_lossy(&child.stderr);
    assert!(child.status.success() && said.contains("1 passed"), "{said}");
}
