//! The instance lock, which is also where the exit code is left for an agent that was away; see
//! [`LOCK_FD`](super::protocol::LOCK_FD).

use std::os::fd::RawFd;
use std::sync::atomic::{AtomicI32, Ordering};

use super::protocol::LOCK_FD;

/// The descriptor, once claimed; it stays open until the process ends.
static CLAIMED: AtomicI32 = AtomicI32::new(-1);

/// Looks whether the parent passed the lock. Must come before this process opens anything, or the number could be its own.
pub fn claim() {
    // SAFETY: asking for a descriptor's flags changes nothing, whatever it is.
    if unsafe { libc::fcntl(LOCK_FD, libc::F_GETFD) } >= 0 {
        CLAIMED.store(LOCK_FD, Ordering::Relaxed);
    }
}

/// Writes the exit code. Async-signal-safe.
pub fn record_exit(code: i32) {
    record_exit_in(CLAIMED.load(Ordering::Relaxed), code);
}

fn record_exit_in(fd: RawFd, code: i32) {
    if fd >= 0 {
        let bytes = code.to_le_bytes();
        // SAFETY: the buffer is valid for its length. Nothing can be done about an error: the process is ending.
        let _ = unsafe { libc::pwrite(fd, bytes.as_ptr().cast(), bytes.len(), 0) };
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::fd::AsRawFd;
    use std::os::unix::fs::FileExt;

    #[test]
    fn the_code_is_found_at_the_start_of_the_file() {
        let file = tempfile::tempfile().unwrap();
        record_exit_in(file.as_raw_fd(), 12);
        record_exit_in(-1, 99);
        let mut bytes = [0u8; 8];
        assert_eq!(file.read_at(&mut bytes, 0).unwrap(), 4);
        assert_eq!(bytes[..4], 12i32.to_le_bytes());
    }
}
