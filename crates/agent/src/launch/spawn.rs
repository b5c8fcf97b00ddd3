//! clone3, the jail, exec.
//!
//! Between clone3 and exec the child of a threaded process may only make system calls: everything it needs (strings, numbers,
//! descriptors) is prepared before, nothing is allocated or locked. Each failing step sends its number and errno up a pipe that
//! exec closes.

use std::ffi::{CStr, CString};
use std::fs::File;
use std::io::{self, Read};
use std::os::fd::{AsRawFd, BorrowedFd, FromRawFd, OwnedFd, RawFd};

use super::LaunchError;
use super::jail::Program;

const CLONE_INTO_CGROUP: u64 = 0x2_0000_0000;
/// First descriptor that is free for moving others out of the way.
const PARKING: RawFd = 64;
/// Most descriptors the child gets.
const MAX_FDS: usize = 8;
/// Highest capability number that is tried when dropping the bounding set; unknown ones fail harmlessly.
const CAPABILITIES: libc::c_ulong = 64;
/// Open files a VMM may have.
const NOFILE: libc::rlim_t = 1024;

/// What to start.
pub struct Spawn<'a> {
    /// The program.
    pub program: &'a Program,
    /// An empty folder, used as mount point only (each child has its own mount namespace).
    pub jail: &'a CStr,
    /// Opened folder of its cgroup.
    pub cgroup: BorrowedFd<'a>,
    /// Uid and gid.
    pub uid: u32,
    /// Descriptor `n` of the child, from 0 on.
    pub fds: &'a [BorrowedFd<'a>],
}

/// A started child.
#[derive(Debug)]
pub struct Child {
    /// Refers to this process and no later one of the same number.
    pub pidfd: OwnedFd,
    /// Its number.
    pub pid: i32,
}

const STEPS: [&str; 14] = [
    "moving descriptors",
    "making a session",
    "making mounts private",
    "mounting the root",
    "making a folder in the root",
    "showing shared libraries in the root",
    "entering the root",
    "making the root read-only",
    "setting resource limits",
    "dropping capabilities",
    "changing the user",
    "forbidding new privileges",
    "closing descriptors",
    "running the program",
];

/// Everything the child needs, without pointers into things that could move.
struct Plan<'a> {
    fds: [RawFd; MAX_FDS],
    count: usize,
    program: RawFd,
    jail: &'a CStr,
    libraries: &'a [super::jail::Library],
    folders: &'a [CString],
    uid: u32,
    errors: RawFd,
}

/// Starts `spawn.program` without arguments and environment.
pub fn spawn(spawn: &Spawn<'_>) -> Result<Child, LaunchError> {
    let (errors, errors_child) = nix::unistd::pipe2(nix::fcntl::OFlag::O_CLOEXEC)
        .map_err(|error| LaunchError::host("making a pipe")(error.into()))?;
    let mut fds = [-1; MAX_FDS];
    for (slot, fd) in fds.iter_mut().zip(spawn.fds) {
        *slot = fd.as_raw_fd();
    }
    let folders: Vec<CString> = spawn.program.libraries.iter().flat_map(|library| parents(&library.target)).collect();
    let plan = Plan {
        fds,
        count: spawn.fds.len().min(MAX_FDS),
        program: spawn.program.file.as_raw_fd(),
        jail: spawn.jail,
        libraries: &spawn.program.libraries,
        folders: &folders,
        uid: spawn.uid,
        errors: errors_child.as_raw_fd(),
    };
    let mut pidfd: RawFd = -1;
    let namespaces =
        libc::CLONE_NEWNS | libc::CLONE_NEWPID | libc::CLONE_NEWNET | libc::CLONE_NEWIPC | libc::CLONE_NEWUTS;
    // SAFETY: all-zero is a valid clone_args.
    let mut arguments: libc::clone_args = unsafe { std::mem::zeroed() };
    arguments.flags = namespaces as u64 | libc::CLONE_PIDFD as u64 | CLONE_INTO_CGROUP;
    arguments.pidfd = std::ptr::from_mut(&mut pidfd) as u64;
    arguments.exit_signal = libc::SIGCHLD as u64;
    arguments.cgroup = spawn.cgroup.as_raw_fd() as u64;
    // SAFETY: without CLONE_VM this is a fork: the child gets a copy of this thread's stack and continues below, where it makes
    // only async-signal-safe system calls until exec or _exit. The arguments outlive the call.
    let pid = unsafe { libc::syscall(libc::SYS_clone3, &raw mut arguments, size_of::<libc::clone_args>()) };
    if pid == 0 {
        child(&plan);
    }
    if pid < 0 {
        return Err(LaunchError::host("clone3 of hearth-vmm")(io::Error::last_os_error()));
    }
    drop(errors_child);
    // SAFETY: the kernel has stored a new descriptor there that nobody else owns.
    let pidfd = unsafe { OwnedFd::from_raw_fd(pidfd) };
    let child = Child { pidfd, pid: pid as i32 };
    let mut report = Vec::new();
    let read = File::from(errors).read_to_end(&mut report);
    match (read, report.as_slice()) {
        (Ok(0), _) => Ok(child),
        (Ok(_), [step, errno @ ..]) => {
            let errno = errno.try_into().map_or(libc::EIO, i32::from_ne_bytes);
            let step = STEPS.get(usize::from(*step)).copied().unwrap_or("an unknown step");
            super::process::reap(&child.pidfd);
            Err(LaunchError::Jail { step, source: io::Error::from_raw_os_error(errno) })
        }
        (Err(source), _) => Err(LaunchError::host("reading from the child")(source)),
        (Ok(_), []) => Ok(child),
    }
}

/// `usr/lib` → `usr`, `usr/lib`.
fn parents(path: &CStr) -> Vec<CString> {
    let bytes = path.to_bytes();
    let ends = bytes.iter().enumerate().filter(|(_, byte)| **byte == b'/').map(|(index, _)| index);
    ends.chain([bytes.len()]).filter_map(|end| CString::new(bytes.get(..end)?).ok()).collect()
}

/// Sends the failed step and ends the child.
fn fail(plan: &Plan<'_>, step: u8) -> ! {
    // SAFETY: errno's location is valid; write and _exit take plain values and a live buffer.
    unsafe {
        let errno = *libc::__errno_location();
        let [a, b, c, d] = errno.to_ne_bytes();
        let report = [step, a, b, c, d];
        libc::write(plan.errors, report.as_ptr().cast(), report.len());
        libc::_exit(127)
    }
}

/// The child's way to exec. Only system calls.
fn child(plan: &Plan<'_>) -> ! {
    let check = |ok: bool, step: u8| {
        if !ok {
            fail(plan, step)
        }
    };
    // SAFETY: every call gets plain integers, NUL-terminated strings and structures that live in `plan` or on this stack; the
    // process has one thread, so nothing changes under it. Raw setresuid and friends are used because glibc's would try to
    // reach other threads.
    unsafe {
        let mut parked = [-1; MAX_FDS];
        for (slot, fd) in parked.iter_mut().zip(plan.fds).take(plan.count) {
            *slot = libc::fcntl(fd, libc::F_DUPFD, PARKING);
            check(*slot >= 0, 0);
        }
        let program = libc::fcntl(plan.program, libc::F_DUPFD_CLOEXEC, PARKING);
        let errors = libc::fcntl(plan.errors, libc::F_DUPFD_CLOEXEC, PARKING);
        check(program >= 0 && errors >= 0, 0);
        let plan = &Plan { errors, ..*plan };
        for (target, fd) in (0..).zip(parked).take(plan.count) {
            check(libc::dup2(fd, target) >= 0, 0);
        }
        let mut signals: libc::sigset_t = std::mem::zeroed();
        libc::sigemptyset(&raw mut signals);
        libc::sigprocmask(libc::SIG_SETMASK, &raw const signals, std::ptr::null_mut());
        libc::signal(libc::SIGPIPE, libc::SIG_DFL);
        check(libc::setsid() >= 0, 1);
        enter_root(plan, &check);
        let limits = [
            (libc::RLIMIT_NOFILE, NOFILE),
            (libc::RLIMIT_CORE, 0),
            (libc::RLIMIT_MEMLOCK, 64 << 20),
            (libc::RLIMIT_MSGQUEUE, 0),
        ];
        for (resource, value) in limits {
            let limit = libc::rlimit { rlim_cur: value, rlim_max: value };
            check(libc::setrlimit(resource, &raw const limit) == 0, 8);
        }
        for capability in 0..CAPABILITIES {
            let dropped = libc::prctl(libc::PR_CAPBSET_DROP, capability, 0, 0, 0) == 0;
            check(dropped || *libc::__errno_location() == libc::EINVAL, 9);
        }
        let none = std::ptr::null::<libc::gid_t>();
        check(libc::syscall(libc::SYS_setgroups, 0, none) == 0, 10);
        check(libc::syscall(libc::SYS_setresgid, plan.uid, plan.uid, plan.uid) == 0, 10);
        check(libc::syscall(libc::SYS_setresuid, plan.uid, plan.uid, plan.uid) == 0, 10);
        check(libc::prctl(libc::PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0) == 0, 11);
        let first = plan.count as libc::c_uint;
        let closed = libc::syscall(libc::SYS_close_range, first, libc::c_uint::MAX, libc::CLOSE_RANGE_CLOEXEC);
        check(closed == 0, 12);
        let arguments = [c"hearth-vmm".as_ptr(), std::ptr::null()];
        let environment = [std::ptr::null::<libc::c_char>()];
        libc::syscall(
            libc::SYS_execveat,
            program,
            c"".as_ptr(),
            arguments.as_ptr(),
            environment.as_ptr(),
            libc::AT_EMPTY_PATH,
        );
        fail(plan, 13)
    }
}

/// Replaces the root by an empty, read-only one.
///
/// # Safety
/// For a freshly cloned child in its own mount namespace only.
unsafe fn enter_root(plan: &Plan<'_>, check: &dyn Fn(bool, u8)) {
    const NONE: *const libc::c_char = std::ptr::null();
    let flags = libc::MS_NOSUID | libc::MS_NODEV;
    // SAFETY: strings are NUL-terminated and live in `plan` or in the program; see `child`.
    unsafe {
        check(libc::mount(NONE, c"/".as_ptr(), NONE, libc::MS_REC | libc::MS_PRIVATE, std::ptr::null()) == 0, 2);
        let options = c"size=64k,nr_inodes=16,mode=0555".as_ptr();
        let tmpfs = c"tmpfs".as_ptr();
        check(libc::mount(tmpfs, plan.jail.as_ptr(), tmpfs, flags, options.cast()) == 0, 3);
        check(libc::chdir(plan.jail.as_ptr()) == 0, 3);
        for folder in plan.folders {
            check(libc::mkdir(folder.as_ptr(), 0o755) == 0 || *libc::__errno_location() == libc::EEXIST, 4);
        }
        for library in plan.libraries {
            let target = library.target.as_ptr();
            check(libc::mount(library.source.as_ptr(), target, NONE, libc::MS_BIND, std::ptr::null()) == 0, 5);
            let read_only = libc::MS_REMOUNT | libc::MS_BIND | libc::MS_RDONLY | flags;
            check(libc::mount(NONE, target, NONE, read_only, std::ptr::null()) == 0, 5);
        }
        let dot = c".".as_ptr();
        if libc::syscall(libc::SYS_pivot_root, dot, dot) == 0 {
            check(libc::umount2(dot, libc::MNT_DETACH) == 0, 6);
        } else {
            // The root is an initramfs, which cannot be pivoted away from: cover it instead.
            check(libc::mount(dot, c"/".as_ptr(), NONE, libc::MS_MOVE, std::ptr::null()) == 0, 6);
            check(libc::chroot(dot) == 0, 6);
        }
        check(libc::chdir(c"/".as_ptr()) == 0, 6);
        let read_only = libc::MS_REMOUNT | libc::MS_BIND | libc::MS_RDONLY | flags;
        check(libc::mount(NONE, c"/".as_ptr(), NONE, read_only, std::ptr::null()) == 0, 7);
    }
}
