//! Confinement of the process to the system calls it needs: one short allow-list per kind of thread, in force before any
//! guest code runs. A call outside the list ends the process with [`exit::INTERNAL`] and names itself on standard error.

mod rules;

use std::io;

use seccompiler::{BpfProgram, SeccompAction, SeccompFilter, TargetArch};

use crate::control::lock;
use crate::control::protocol::exit;

/// Kinds of threads, each with its own list.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ThreadKind {
    /// The control thread.
    Control,
    /// A vCPU.
    Vcpu,
    /// The I/O thread.
    Io {
        /// The host allows io_uring, so there is no pool of threads to start.
        io_uring: bool,
    },
}

/// Why the process cannot be confined.
#[derive(Debug, thiserror::Error)]
pub enum SandboxError {
    /// A list does not compile: a bug.
    #[error("the system call filter is broken: {0}")]
    Filter(String),
    /// The host's kernel refused.
    #[error("cannot install the system call filter: {0}")]
    Install(String),
}

/// The compiled filter for one kind of thread.
#[derive(Clone, Debug)]
pub struct Filter(BpfProgram);

impl Filter {
    /// Compiles the list for `kind`.
    pub fn new(kind: ThreadKind) -> Result<Self, SandboxError> {
        let broken = |e: &dyn std::fmt::Display| SandboxError::Filter(e.to_string());
        let rules = rules::allowed(kind).map_err(|e| broken(&e))?;
        let filter = SeccompFilter::new(rules, SeccompAction::Trap, SeccompAction::Allow, TargetArch::x86_64)
            .map_err(|e| broken(&e))?;
        filter.try_into().map(Self).map_err(|e: seccompiler::BackendError| broken(&e))
    }

    /// Confines the calling thread, and threads it will start, for good.
    pub fn apply(&self) -> Result<(), SandboxError> {
        seccompiler::apply_filter(&self.0).map_err(|e| SandboxError::Install(e.to_string()))
    }
}

/// Prepares the allocator for confined threads: what was needed to build the machine goes back to the host now, and later
/// nothing is given back by cutting an arena, for which glibc would open a file in /proc.
pub fn settle_allocator() {
    // SAFETY: both calls act inside the allocator alone and may be made at any time.
    unsafe {
        libc::malloc_trim(0);
        libc::mallopt(libc::M_TRIM_THRESHOLD, libc::c_int::MAX);
    }
}

/// Whether this host lets this process use io_uring (kernel.io_uring_disabled, containers' filters).
pub fn io_uring_allowed() -> bool {
    io_uring::IoUring::new(1).is_ok()
}

/// Makes a forbidden call end the process with a message. Call once, before any filter is applied.
pub fn install_trap_handler() -> io::Result<()> {
    // SAFETY: the action is fully initialised and its handler makes only async-signal-safe calls.
    let result = unsafe {
        let mut action: libc::sigaction = std::mem::zeroed();
        action.sa_sigaction = on_trap as extern "C" fn(_, _, _) as libc::sighandler_t;
        action.sa_flags = libc::SA_SIGINFO | libc::SA_NODEFER;
        libc::sigaction(libc::SIGSYS, &action, std::ptr::null_mut())
    };
    if result == 0 { Ok(()) } else { Err(io::Error::last_os_error()) }
}

/// Offset of `si_syscall` in the kernel's siginfo for SIGSYS: signo, errno, code, padding, call address, number
/// (`struct siginfo`, include/uapi/asm-generic/siginfo.h).
const SI_SYSCALL: usize = 24;

extern "C" fn on_trap(_signal: libc::c_int, info: *mut libc::siginfo_t, _context: *mut libc::c_void) {
    // SAFETY: the kernel passes a valid siginfo of 128 bytes to an SA_SIGINFO handler.
    let number = unsafe { info.cast::<u8>().add(SI_SYSCALL).cast::<i32>().read_unaligned() };
    let mut text = *b"hearth-vmm: forbidden system call           \n";
    write_number(number, text.get_mut(34..43).unwrap_or_default());
    // SAFETY: plain system calls on valid buffers; all are allowed in every list.
    unsafe {
        libc::write(2, text.as_ptr().cast(), text.len());
        lock::record_exit(exit::INTERNAL);
        libc::_exit(exit::INTERNAL);
    }
}

/// Decimal digits, left aligned. No allocation: runs in a signal handler.
fn write_number(number: i32, buffer: &mut [u8]) {
    let mut divisor = 1_000_000_000u32;
    let mut rest = number.unsigned_abs();
    let mut slots = buffer.iter_mut();
    let mut started = false;
    while divisor > 0 {
        let digit = rest / divisor;
        rest %= divisor;
        divisor /= 10;
        started |= digit > 0 || divisor == 0;
        if started && let Some(slot) = slots.next() {
            *slot = b'0' + digit as u8;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_list_compiles_and_stays_short() {
        for (kind, most) in [
            (ThreadKind::Control, 53),
            (ThreadKind::Vcpu, 25),
            (ThreadKind::Io { io_uring: true }, 42),
            (ThreadKind::Io { io_uring: false }, 47),
        ] {
            assert!(rules::allowed(kind).unwrap().len() <= most, "{kind:?}: {}", rules::allowed(kind).unwrap().len());
            Filter::new(kind).unwrap();
        }
    }

    #[test]
    fn numbers_are_written_in_decimal() {
        for (number, expected) in [(0, "0  "), (59, "59 "), (435, "435"), (12345, "123")] {
            let mut buffer = *b"   ";
            write_number(number, &mut buffer);
            assert_eq!(std::str::from_utf8(&buffer).unwrap(), expected);
        }
    }

    /// In a process of its own: the filter and its trap.
    #[test]
    fn a_forbidden_call_ends_the_process_with_its_number() {
        if std::env::var_os("HEARTH_TEST_TRAP").is_some() {
            install_trap_handler().unwrap();
            Filter::new(ThreadKind::Vcpu).unwrap().apply().unwrap();
            let _ = std::fs::File::open("/etc/passwd");
            std::process::exit(0);
        }
        let output = std::process::Command::new(std::env::current_exe().unwrap())
            .args(["--exact", "sandbox::tests::a_forbidden_call_ends_the_process_with_its_number", "--nocapture"])
            .env("HEARTH_TEST_TRAP", "1")
            .output()
            .unwrap();
        let stderr = String::from_utf8_lossy(&output.stderr);
        assert_eq!(output.status.code(), Some(exit::INTERNAL), "{stderr}");
        assert!(stderr.contains(&format!("forbidden system call {}", libc::SYS_openat)), "{stderr}");
    }
}
