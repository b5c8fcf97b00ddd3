//! The allow-lists.

use std::collections::BTreeMap;

use seccompiler::{BackendError, SeccompCmpArgLen, SeccompCmpOp, SeccompCondition, SeccompRule};

use super::ThreadKind;
use crate::control::protocol::LOCK_FD;

/// KVM requests after the machine is built (linux/kvm.h).
const KVM_RUN: u64 = 0xae80;
const KVM_SIGNAL_MSI: u64 = 0x4020_aea5;
const KVM_IOEVENTFD: u64 = 0x4040_ae79;
const KVM_GET_REGS: u64 = 0x8090_ae81;
/// Tap offloads, as the guest negotiates them (linux/if_tun.h).
const TUNSETOFFLOAD: u64 = 0x4004_54d0;
/// `io_uring_register` operations (linux/io_uring.h). To enable a ring is the one thing left to do with one that is set up;
/// the others set up the ring of a disk that is attached.
const REGISTER_ENABLE_RINGS: u64 = 12;
const REGISTER_FILES: u64 = 2;
const REGISTER_FILES_UPDATE: u64 = 6;
const REGISTER_RESTRICTIONS: u64 = 11;
const REGISTER_IOWQ_MAX_WORKERS: u64 = 19;
/// Size of a block device in bytes (linux/fs.h).
const BLKGETSIZE64: u64 = 0x8008_1272;

/// What every thread does: memory of its own, locks, time, signals, the end.
const COMMON: [libc::c_long; 20] = [
    libc::SYS_brk,
    libc::SYS_clock_gettime,
    libc::SYS_clock_nanosleep,
    libc::SYS_close,
    libc::SYS_exit,
    libc::SYS_exit_group,
    libc::SYS_futex,
    libc::SYS_getpid,
    libc::SYS_getrandom,
    libc::SYS_gettid,
    libc::SYS_madvise,
    libc::SYS_mremap,
    libc::SYS_munmap,
    libc::SYS_read,
    libc::SYS_restart_syscall,
    libc::SYS_rt_sigprocmask,
    libc::SYS_rt_sigreturn,
    libc::SYS_sched_yield,
    libc::SYS_sigaltstack,
    libc::SYS_write,
];

/// The control thread serves sockets, kicks vCPUs, and opens, grows, freezes and closes the disks it is handed. An NBD disk's epoll
/// set is made here, and its server is talked to here until the I/O thread takes over.
const CONTROL: [libc::c_long; 28] = [
    libc::SYS_accept4,
    libc::SYS_epoll_create1,
    libc::SYS_epoll_ctl,
    libc::SYS_eventfd2,
    libc::SYS_fallocate,
    libc::SYS_fdatasync,
    libc::SYS_fsync,
    libc::SYS_fstat,
    libc::SYS_ftruncate,
    libc::SYS_io_uring_setup,
    libc::SYS_lseek,
    libc::SYS_poll,
    libc::SYS_pread64,
    libc::SYS_preadv,
    libc::SYS_preadv2,
    libc::SYS_pwrite64,
    libc::SYS_pwritev,
    libc::SYS_pwritev2,
    libc::SYS_readv,
    libc::SYS_recvfrom,
    libc::SYS_recvmsg,
    libc::SYS_sendmsg,
    libc::SYS_sendto,
    libc::SYS_statx,
    libc::SYS_tgkill,
    libc::SYS_timerfd_create,
    libc::SYS_timerfd_settime,
    libc::SYS_writev,
];

/// The I/O thread moves disk and network data.
const IO: [libc::c_long; 15] = [
    libc::SYS_epoll_ctl,
    libc::SYS_epoll_pwait,
    libc::SYS_epoll_wait,
    libc::SYS_fallocate,
    libc::SYS_fdatasync,
    libc::SYS_fsync,
    libc::SYS_pread64,
    libc::SYS_preadv,
    libc::SYS_preadv2,
    libc::SYS_pwrite64,
    libc::SYS_pwritev,
    libc::SYS_pwritev2,
    libc::SYS_readv,
    libc::SYS_timerfd_settime,
    libc::SYS_writev,
];

/// What starting a thread takes.
const START_THREADS: [libc::c_long; 4] = [libc::SYS_clone3, libc::SYS_prctl, libc::SYS_rseq, libc::SYS_set_robust_list];

/// Rules by system call; an empty rule list allows the call whatever its arguments.
pub(super) type Rules = BTreeMap<i64, Vec<SeccompRule>>;

/// The list for `kind`.
///
/// The thread pool that replaces io_uring where the host forbids it starts its threads with the first request.
pub(super) fn allowed(kind: ThreadKind) -> Result<Rules, BackendError> {
    let mut rules = Rules::new();
    let more: &[libc::c_long] = match kind {
        ThreadKind::Control => &CONTROL,
        ThreadKind::Vcpu => &[],
        ThreadKind::Io { .. } => &IO,
    };
    for call in COMMON.iter().chain(more) {
        rules.insert(*call, Vec::new());
    }
    let requests: &[u64] = match kind {
        // FIONBIO and terminal settings serve console clients.
        ThreadKind::Control => &[KVM_SIGNAL_MSI, libc::FIONBIO, libc::TCSETS, BLKGETSIZE64],
        ThreadKind::Vcpu => &[KVM_RUN, KVM_SIGNAL_MSI, KVM_IOEVENTFD, KVM_GET_REGS],
        ThreadKind::Io { .. } => &[KVM_SIGNAL_MSI, KVM_IOEVENTFD, TUNSETOFFLOAD],
    };
    // Debug builds look whether a descriptor is open before they close it. Console clients and connections become non-blocking.
    let commands: &[libc::c_int] = match kind {
        // Volumes are locked, switched between direct and buffered I/O, and their shared memory is looked at.
        ThreadKind::Control => &[libc::F_GETFD, libc::F_GETFL, libc::F_SETFL, libc::F_OFD_SETLK, libc::F_GET_SEALS],
        // The last user of a volume unlocks it.
        ThreadKind::Io { .. } => &[libc::F_GETFD, libc::F_OFD_SETLK],
        ThreadKind::Vcpu => &[libc::F_GETFD],
    };
    let commands = commands.iter().map(|command| argument(1, *command as u64)).collect::<Result<_, _>>()?;
    rules.insert(libc::SYS_fcntl, commands);
    rules.insert(libc::SYS_ioctl, requests.iter().map(|request| argument(1, *request)).collect::<Result<_, _>>()?);
    // Memory, but never executable. Shared or file mappings are all made before.
    let not_executable = |index| {
        let mask = SeccompCmpOp::MaskedEq(libc::PROT_EXEC as u64);
        SeccompCondition::new(index, SeccompCmpArgLen::Dword, mask, 0).and_then(|c| SeccompRule::new(vec![c]))
    };
    rules.insert(libc::SYS_mmap, vec![not_executable(2)?]);
    rules.insert(libc::SYS_mprotect, vec![not_executable(2)?]);
    if let ThreadKind::Io { io_uring: true } = kind {
        rules.insert(libc::SYS_io_uring_enter, Vec::new());
        // A layered volume's stage takes its place among the registered files when a snapshot begins.
        let later = vec![argument(1, REGISTER_ENABLE_RINGS)?, argument(1, REGISTER_FILES_UPDATE)?];
        rules.insert(libc::SYS_io_uring_register, later);
    }
    if let ThreadKind::Io { io_uring: false } = kind {
        rules.extend(START_THREADS.map(|call| (call, Vec::new())));
    }
    if kind == ThreadKind::Vcpu {
        // The exit code, in the instance lock.
        rules.insert(libc::SYS_pwrite64, vec![argument(0, LOCK_FD as u64)?]);
    }
    if kind == ThreadKind::Control {
        let set_up = [REGISTER_FILES, REGISTER_RESTRICTIONS, REGISTER_IOWQ_MAX_WORKERS];
        let set_up = set_up.iter().map(|operation| argument(1, *operation)).collect::<Result<_, _>>()?;
        rules.insert(libc::SYS_io_uring_register, set_up);
    }
    Ok(rules)
}

/// Argument number `index` must be `value`.
fn argument(index: u8, value: u64) -> Result<SeccompRule, BackendError> {
    SeccompRule::new(vec![SeccompCondition::new(index, SeccompCmpArgLen::Dword, SeccompCmpOp::Eq, value)?])
}
