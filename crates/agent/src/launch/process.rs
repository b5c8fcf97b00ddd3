//! Processes by pidfd: waiting, killing and how they ended, whoever their parent was.

use std::fs::File;
use std::io;
use std::os::fd::{AsFd, AsRawFd, FromRawFd, OwnedFd};
use std::os::unix::fs::FileExt;

use hearth_vmm::control::protocol::exit;
use nix::sys::wait::{Id, WaitPidFlag, WaitStatus, waitid};
use tokio::io::Interest;
use tokio::io::unix::AsyncFd;

use super::VmmEnd;

/// A process that may or may not be this one's child.
#[derive(Debug)]
pub struct Process {
    pidfd: AsyncFd<OwnedFd>,
}

/// Opens a pidfd for a process number.
pub fn open_pidfd(pid: i32) -> io::Result<OwnedFd> {
    // SAFETY: pidfd_open takes two integers.
    let fd = unsafe { libc::syscall(libc::SYS_pidfd_open, pid, 0) };
    if fd < 0 {
        return Err(io::Error::last_os_error());
    }
    // SAFETY: the kernel has just returned this descriptor and nobody else owns it.
    Ok(unsafe { OwnedFd::from_raw_fd(fd as i32) })
}

/// Takes the exit status of a child that has ended or is about to.
pub fn reap(pidfd: &OwnedFd) -> Option<WaitStatus> {
    waitid(Id::PIDFd(pidfd.as_fd()), WaitPidFlag::WEXITED).ok()
}

impl Process {
    /// Must be called inside a tokio runtime.
    pub fn new(pidfd: OwnedFd) -> io::Result<Self> {
        // SAFETY: an OwnedFd keeps its one descriptor open and the same for as long as it lives.
        Ok(Self { pidfd: unsafe { AsyncFd::register_with_interest(pidfd, Interest::READABLE)? } })
    }

    /// Waits until the process has ended. `status_file` is the instance's lock file, where the VMM leaves its exit code.
    pub async fn wait(&self, status_file: &File) -> VmmEnd {
        // An error of the reactor says nothing about the process: ask the pidfd itself.
        let _ = self.pidfd.readable().await.map(|mut ready| ready.retain_ready());
        let flags = WaitPidFlag::WEXITED | WaitPidFlag::WNOHANG;
        let code = match waitid(Id::PIDFd(self.pidfd.get_ref().as_fd()), flags) {
            Ok(WaitStatus::Exited(_, code)) => Some(code),
            Ok(WaitStatus::Signaled(..)) => None,
            // Not our child, or taken before.
            _ => exit_code(status_file),
        };
        end_of(code)
    }

    /// SIGKILL.
    pub fn kill(&self) {
        // SAFETY: pidfd_send_signal takes integers and may take no siginfo. A process that has ended is no error.
        unsafe {
            libc::syscall(
                libc::SYS_pidfd_send_signal,
                self.pidfd.get_ref().as_raw_fd(),
                libc::SIGKILL,
                std::ptr::null::<libc::siginfo_t>(),
                0,
            );
        }
    }
}

/// The exit code that a VMM left in its lock file; `None` = it left none.
pub fn exit_code(status_file: &File) -> Option<i32> {
    let mut bytes = [0u8; 4];
    status_file.read_exact_at(&mut bytes, 0).ok()?;
    Some(i32::from_le_bytes(bytes))
}

/// What an exit code says.
pub fn end_of(code: Option<i32>) -> VmmEnd {
    match code {
        None => VmmEnd::Died,
        Some(exit::POWER_OFF) => VmmEnd::PoweredOff,
        Some(exit::RESET) => VmmEnd::Reset,
        Some(exit::GUEST_CRASH) => VmmEnd::GuestCrashed,
        Some(exit::KILLED) => VmmEnd::Killed,
        Some(code) => VmmEnd::Failed(code),
    }
}
