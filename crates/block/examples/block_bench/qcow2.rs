//! A volume over a base against a qcow2 image over a raw one: both over NBD on a Unix socket, for the same client, the one served by
//! a small server around the engine and the other by `qemu-storage-daemon`. Both have direct I/O and io_uring for what they
//! write, and the base in the page cache.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::Arc;
use std::thread::JoinHandle;
use std::time::Duration;

use hearth_block::nbd::{NbdError, NbdEvents, NbdOptions, NbdVolume, UnixConnector};
use hearth_block::{Operation, Request, Volume};

use crate::loads::{BLOCK, Load, engine, shuffled};
use crate::nbd_server::{self, MOST};
use crate::volumes::Folder;

struct Nothing;

impl NbdEvents for Nothing {
    fn lost(&self, error: &NbdError) {
        eprintln!("connection lost: {error}");
    }
    fn recovered(&self) {}
}

/// Who serves, until dropped.
enum Server {
    Engine(Option<JoinHandle<()>>),
    Qemu(Child),
}

impl Drop for Server {
    fn drop(&mut self) {
        match self {
            Self::Engine(thread) => thread.take().unwrap().join().unwrap(),
            Self::Qemu(child) => {
                child.kill().unwrap();
                child.wait().unwrap();
            }
        }
    }
}

/// An export and its client. The client goes first.
struct Export {
    volume: NbdVolume,
    _server: Server,
}

impl Export {
    /// A new volume over a complete base, served by the engine.
    fn engine(folder: &Folder, name: &str) -> Self {
        let socket = socket(name);
        let server = nbd_server::serve(folder.volume(name, true, None), &socket);
        Self { volume: connect(&socket), _server: Server::Engine(Some(server)) }
    }

    /// A new qcow2 image over the same base.
    fn qcow2(folder: &Folder, name: &str) -> Self {
        let (socket, image, base) = (socket(name), folder.file(name), folder.file("raw"));
        let _ = std::fs::remove_file(&image);
        let made = Command::new("qemu-img")
            .args(["create", "-q", "-f", "qcow2", "-F", "raw", "-b"])
            .args([&base, &image])
            .arg(folder.bytes.to_string())
            .status();
        assert!(made.unwrap().success(), "qemu-img");
        let child = Command::new("qemu-storage-daemon")
            .arg("--blockdev")
            .arg(format!("driver=file,node-name=base-file,read-only=on,filename={}", base.display()))
            .args(["--blockdev", "driver=raw,node-name=base,read-only=on,file=base-file"])
            .arg("--blockdev")
            .arg(format!("driver=file,node-name=own-file,aio=io_uring,cache.direct=on,filename={}", image.display()))
            .args(["--blockdev", "driver=qcow2,node-name=own,cache.direct=on,file=own-file,backing=base"])
            .arg("--nbd-server")
            .arg(format!("addr.type=unix,addr.path={}", socket.display()))
            .args(["--export", "type=nbd,id=own,node-name=own,name=,writable=on"])
            .stdin(Stdio::null())
            .spawn()
            .expect("qemu-storage-daemon");
        Self { volume: connect(&socket), _server: Server::Qemu(child) }
    }

    /// Writes all of it.
    fn fill(&self) {
        let mut queue = self.volume.open_queue(1).unwrap();
        let content = vec![0x33u8; MOST];
        for offset in (0..self.volume.size_bytes()).step_by(MOST) {
            let buffers = [libc::iovec { iov_base: content.as_ptr().cast_mut().cast(), iov_len: MOST }];
            let request = Request { operation: Operation::Write, offset, length: 0, buffers: &buffers, token: 0 };
            // SAFETY: the buffer is only read, and outlives the request.
            unsafe { queue.submit(request).unwrap() };
            queue.kick().unwrap();
            let mut done = false;
            while !done {
                queue
                    .drain(&mut |completion| {
                        completion.result.unwrap();
                        done = true;
                    })
                    .unwrap();
                std::thread::yield_now();
            }
        }
        self.volume.sync().unwrap();
    }

    fn seconds(&self, load: Load, order: &[u64]) -> f64 {
        engine(self.volume.open_queue(64).unwrap().as_mut(), load, order)
    }
}

fn socket(name: &str) -> PathBuf {
    // Short enough for a socket's address.
    let path = std::env::temp_dir().join(format!("block-bench-{}-{name}", std::process::id()));
    let _ = std::fs::remove_file(&path);
    path
}

fn connect(socket: &Path) -> NbdVolume {
    for _ in 0..500 {
        let connector = Box::new(UnixConnector { path: socket.to_owned() });
        if let Ok(volume) = NbdVolume::open(connector, Arc::new(Nothing), NbdOptions::default()) {
            let _ = std::fs::remove_file(socket);
            return volume;
        }
        std::thread::sleep(Duration::from_millis(10));
    }
    panic!("nobody serves {}", socket.display());
}

/// Operations per second of qcow2 and of the engine, round by round.
pub fn compare(folder: &Folder, rounds: u64, wanted: &dyn Fn(&str) -> bool) -> BTreeMap<&'static str, Vec<(f64, f64)>> {
    let load = |write, depth, sync| Load { write, depth, sync };
    // Whether each block is written for the first time.
    let cases = [
        ("nbd_random_read_qd32", load(false, 32, false), 24_000, false),
        ("nbd_random_read_qd1", load(false, 1, false), 3000, false),
        ("nbd_random_write_qd32", load(true, 32, false), 24_000, false),
        ("nbd_random_write_qd1", load(true, 1, false), 3000, false),
        ("nbd_synced_overwrite", load(true, 1, true), 400, false),
        ("nbd_first_write_qd32", load(true, 32, false), 12_000, true),
        ("nbd_synced_first_write", load(true, 1, true), 400, true),
    ];
    let cases: Vec<_> = cases.into_iter().filter(|(name, ..)| wanted(name)).collect();
    let mut figures: BTreeMap<_, Vec<_>> = BTreeMap::new();
    let steady = cases.iter().any(|(.., first)| !first);
    let steady = steady.then(|| [Export::qcow2(folder, "steady-qcow2"), Export::engine(folder, "steady-nbd")]);
    steady.iter().flatten().for_each(Export::fill);
    let blocks = folder.bytes / BLOCK as u64;
    for round in 0..rounds {
        for (name, load, count, first) in &cases {
            let order = shuffled(blocks, (*count).min(if *first { blocks as usize } else { *count }), round * 2 + 5);
            let run = |which: usize| match (&steady, first) {
                (Some(steady), false) => steady[which].seconds(*load, &order),
                _ if which == 0 => Export::qcow2(folder, "first-qcow2").seconds(*load, &order),
                _ => Export::engine(folder, "first-nbd").seconds(*load, &order),
            };
            let (qcow2, engine) = if round % 2 == 0 {
                let qcow2 = run(0);
                (qcow2, run(1))
            } else {
                let engine = run(1);
                (run(0), engine)
            };
            let each = order.len() as f64;
            figures.entry(*name).or_default().push((each / qcow2, each / engine));
        }
    }
    figures
}
