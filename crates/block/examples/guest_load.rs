//! What the storage benchmarks run inside a guest: loads on a disk, and a watch on which disks the kernel has. Linked statically, so
//! that it can be all there is in an initrd.
//!
//! `guest_load load read|write|synced DEPTH SECONDS DEVICE [MIB]`: 4 KiB at random with `O_DIRECT` and io_uring, in the first MIB of the
//! disk (default: all of it); `synced` makes each write durable. `cached-read`, `cached-write` and `cached-synced` do the same through the
//! page cache by plain system calls, one at a time whatever DEPTH says: the most that a VMM which does that can get. Says `BENCH-BEGIN` when it begins and `BENCH-END` when it ends, then what
//! it found: `seconds` until all of it was durable, `accepted_seconds` until all of it was answered.
//!
//! `guest_load watch`: says `BENCH-DISK add NAME` and `BENCH-DISK remove NAME` when the kernel does.
//!
//! As the first process of an initrd it mounts what is needed, loads `/modules/*.ko` in the order of their names,
//! watches, says `BENCH-READY`, and obeys lines on the console (`load …` as above, `off`).
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::indexing_slicing, clippy::panic)]

use std::fs::{File, OpenOptions};
use std::io::{BufRead, Seek, SeekFrom, Write};
use std::os::fd::AsRawFd;
use std::os::unix::fs::OpenOptionsExt;
use std::time::{Duration, Instant};

use io_uring::types::Fixed;
use io_uring::{IoUring, opcode};

const BLOCK: usize = 4096;

fn main() {
    let words: Vec<String> = std::env::args().collect();
    match words.get(1).map(String::as_str) {
        Some("load") => load(&words[2..]),
        Some("watch") => tell_disks(uevents()),
        _ if std::process::id() == 1 => init(),
        _ => panic!("guest_load load|watch"),
    }
}

/// One line, whole, whoever else writes to the console.
fn say(text: &str) {
    let mut out = std::io::stdout().lock();
    out.write_all(format!("{text}\n").as_bytes()).and_then(|()| out.flush()).unwrap();
}

fn load(words: &[String]) {
    let (depth, seconds) = (words[1].parse().unwrap(), words[2].parse().unwrap());
    let (direct, kind) = words[0].strip_prefix("cached-").map_or((true, words[0].as_str()), |kind| (false, kind));
    let what = match kind {
        "read" => What::Read,
        "write" => What::Write(0),
        "synced" => What::Write(libc::RWF_DSYNC),
        other => panic!("load {other}"),
    };
    let write = what != What::Read;
    let flags = if direct { libc::O_DIRECT } else { 0 };
    let mut file = OpenOptions::new().read(true).write(write).custom_flags(flags).open(&words[3]).unwrap();
    let mut bytes = file.seek(SeekFrom::End(0)).unwrap();
    if let Some(mib) = words.get(4) {
        bytes = bytes.min(mib.parse::<u64>().unwrap() << 20);
    }
    let mut worker = Worker::new(&file, what, if direct { depth } else { 1 }, bytes / BLOCK as u64);
    let mut run = |time| if direct { worker.run(time) } else { worker.run_cached(&file, time) };
    // Everything is warm before it counts.
    run(Duration::from_millis(300));
    file.sync_data().unwrap();
    say("BENCH-BEGIN");
    let began = Instant::now();
    let (mut waits, accepted) = run(Duration::from_secs_f64(seconds));
    // What a VMM has only in the host's memory is not written yet.
    file.sync_data().unwrap();
    let elapsed = began.elapsed();
    say("BENCH-END");
    waits.sort_unstable();
    let at = |part: f64| waits.get((waits.len() as f64 * part) as usize).copied().unwrap_or(0);
    say(&format!(
        "BENCH-FOUND operations={} seconds={:.3} accepted_seconds={:.3} p50_us={} p99_us={} max_us={}",
        waits.len(),
        elapsed.as_secs_f64(),
        accepted.as_secs_f64(),
        at(0.5),
        at(0.99),
        waits.last().copied().unwrap_or(0)
    ));
}

#[derive(Clone, Copy, PartialEq, Eq)]
enum What {
    Read,
    /// With these `RWF_*` flags.
    Write(i32),
}

struct Worker {
    ring: IoUring,
    buffers: Vec<&'static mut [u8]>,
    began: Vec<Instant>,
    what: What,
    blocks: u64,
    random: u64,
}

impl Worker {
    fn new(file: &File, what: What, depth: usize, blocks: u64) -> Self {
        let ring = IoUring::new(depth.max(8) as u32).unwrap();
        ring.submitter().register_files(&[file.as_raw_fd()]).unwrap();
        let all = Box::leak(vec![0x5A; (depth + 1) * BLOCK].into_boxed_slice());
        let skip = all.as_ptr().align_offset(BLOCK);
        let buffers: Vec<_> = all[skip..].chunks_exact_mut(BLOCK).take(depth).collect();
        // Other content each time: a snapshot does not upload again what it has.
        let random = std::time::UNIX_EPOCH.elapsed().unwrap().as_nanos() as u64 | 1;
        let mut worker = Self { ring, began: vec![Instant::now(); depth], buffers, what, blocks, random };
        // Content that does not compress.
        for slot in 0..depth {
            for at in (0..BLOCK).step_by(8) {
                let word = worker.next().to_le_bytes();
                worker.buffers[slot][at..at + 8].copy_from_slice(&word);
            }
        }
        worker
    }

    fn next(&mut self) -> u64 {
        self.random ^= self.random << 13;
        self.random ^= self.random >> 7;
        self.random ^= self.random << 17;
        self.random
    }

    /// As [`run`](Self::run), by `preadv2` and `pwritev2`.
    fn run_cached(&mut self, file: &File, time: Duration) -> (Vec<u32>, Duration) {
        let mut waits = Vec::with_capacity(1 << 16);
        let began = Instant::now();
        while began.elapsed() < time {
            let offset = self.next() % self.blocks * BLOCK as u64;
            self.buffers[0][..8].copy_from_slice(&offset.to_le_bytes());
            let vector = libc::iovec { iov_base: self.buffers[0].as_mut_ptr().cast(), iov_len: BLOCK };
            let (fd, at, before) = (file.as_raw_fd(), offset as i64, Instant::now());
            // SAFETY: the buffer is as long as it says.
            let moved = unsafe {
                match self.what {
                    What::Read => libc::preadv2(fd, &raw const vector, 1, at, 0),
                    What::Write(flags) => libc::pwritev2(fd, &raw const vector, 1, at, flags),
                }
            };
            assert_eq!(moved, BLOCK as isize, "{}", std::io::Error::last_os_error());
            waits.push(before.elapsed().as_micros() as u32);
        }
        (waits, began.elapsed())
    }

    /// Microseconds that each operation took, and how long all of them.
    fn run(&mut self, time: Duration) -> (Vec<u32>, Duration) {
        let mut waits = Vec::with_capacity(1 << 16);
        let mut free: Vec<usize> = (0..self.buffers.len()).collect();
        let began = Instant::now();
        loop {
            while began.elapsed() < time
                && let Some(slot) = free.pop()
            {
                let offset = self.next() % self.blocks * BLOCK as u64;
                // Each write is another one.
                self.buffers[slot][..8].copy_from_slice(&offset.to_le_bytes());
                let memory = self.buffers[slot].as_mut_ptr();
                let entry = match self.what {
                    What::Read => opcode::Read::new(Fixed(0), memory, BLOCK as u32).offset(offset).build(),
                    What::Write(flags) => {
                        opcode::Write::new(Fixed(0), memory, BLOCK as u32).offset(offset).rw_flags(flags).build()
                    }
                };
                self.began[slot] = Instant::now();
                // SAFETY: the buffers are never freed.
                unsafe { self.ring.submission().push(&entry.user_data(slot as u64)).unwrap() };
            }
            if free.len() == self.buffers.len() {
                return (waits, began.elapsed());
            }
            self.ring.submit_and_wait(1).unwrap();
            for entry in self.ring.completion() {
                assert_eq!(entry.result(), BLOCK as i32, "an operation failed");
                let slot = entry.user_data() as usize;
                waits.push(self.began[slot].elapsed().as_micros() as u32);
                free.push(slot);
            }
        }
    }
}

fn init() {
    let mount = |kind: &str, to: &str| {
        let (kind, to) = (std::ffi::CString::new(kind).unwrap(), std::ffi::CString::new(to).unwrap());
        // SAFETY: all three are strings that end with NUL; there are no options.
        unsafe { libc::mount(kind.as_ptr(), to.as_ptr(), kind.as_ptr(), 0, std::ptr::null()) };
    };
    mount("devtmpfs", "/dev");
    mount("proc", "/proc");
    mount("sysfs", "/sys");
    let mut modules: Vec<_> = std::fs::read_dir("/modules").unwrap().map(|entry| entry.unwrap().path()).collect();
    modules.sort();
    // Before drivers find disks.
    let socket = uevents();
    std::thread::spawn(move || tell_disks(socket));
    for module in modules {
        let file = File::open(&module).unwrap();
        // SAFETY: a descriptor and an empty string that ends with NUL.
        let result = unsafe { libc::syscall(libc::SYS_finit_module, file.as_raw_fd(), c"".as_ptr(), 0) };
        assert_eq!(result, 0, "{}: {}", module.display(), std::io::Error::last_os_error());
    }
    say("BENCH-READY");
    for line in std::io::stdin().lock().lines() {
        let words: Vec<String> = line.unwrap().split_whitespace().map(str::to_owned).collect();
        match words.first().map(String::as_str) {
            Some("load") => load(&words[1..]),
            Some("off") => break,
            _ => {}
        }
    }
    // SAFETY: no pointers.
    unsafe { libc::reboot(libc::RB_AUTOBOOT) };
}

/// A socket with the kernel's news of devices.
fn uevents() -> i32 {
    // SAFETY: no pointers but to one address that lives long enough.
    unsafe {
        let socket = libc::socket(libc::AF_NETLINK, libc::SOCK_DGRAM, libc::NETLINK_KOBJECT_UEVENT);
        assert!(socket >= 0);
        let mut address: libc::sockaddr_nl = std::mem::zeroed();
        address.nl_family = libc::AF_NETLINK as u16;
        address.nl_groups = 1;
        let length = size_of::<libc::sockaddr_nl>() as u32;
        assert_eq!(libc::bind(socket, (&raw const address).cast(), length), 0);
        socket
    }
}

fn tell_disks(socket: i32) -> ! {
    let mut buffer = [0u8; 8192];
    loop {
        // SAFETY: the buffer is as long as it says.
        let length = unsafe { libc::recv(socket, buffer.as_mut_ptr().cast(), buffer.len(), 0) };
        let Some(message) = usize::try_from(length).ok().and_then(|length| buffer.get(..length)) else { continue };
        // "add@/devices/…/block/vda", then variables.
        let head = message.split(|byte| *byte == 0).next().unwrap_or_default();
        let head = String::from_utf8_lossy(head);
        if let (Some((action @ ("add" | "remove"), _)), Some((_, name))) =
            (head.split_once('@'), head.split_once("/block/"))
            && !name.contains('/')
        {
            say(&format!("BENCH-DISK {action} {name}"));
        }
    }
}
