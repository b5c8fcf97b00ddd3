//! vCPUs: their threads, the exit loop, pausing.

use std::io;
use std::os::unix::thread::JoinHandleExt;
use std::ptr::NonNull;
use std::sync::atomic::{AtomicBool, AtomicU8, Ordering};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use kvm_bindings::kvm_run;
use kvm_ioctls::{VcpuExit, VcpuFd};

use super::KvmError;
use super::coalesced::CoalescedWrites;
use super::exits::{ExitCounters, ExitKind};
use super::stats::KernelCounters;
use crate::bus::Buses;

/// How long a vCPU may take to stop: an exit handler that waits for the host's disk or memory is the slow case.
const STOP_TIMEOUT: Duration = Duration::from_secs(10);

/// Why a vCPU can run no longer.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum VcpuFailure {
    /// The guest's own doing: triple fault, or a state no CPU can enter.
    Crash(String),
    /// KVM or the host.
    Host(String),
}

/// Told once by each vCPU that fails, from its own thread.
pub type OnFailure = Arc<dyn Fn(VcpuFailure) + Send + Sync>;

/// Runs at the start of each vCPU thread, before any guest code (the seccomp filter).
pub type OnThreadStart = Arc<dyn Fn() -> io::Result<()> + Send + Sync>;

/// What the threads are told to do.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u8)]
enum Order {
    Park = 0,
    Run = 1,
}

/// Order and state that all vCPU threads share.
struct Shared {
    /// An [`Order`]; read before each entry into the guest.
    order: AtomicU8,
    /// Number of threads that are parked or have ended.
    parked: Mutex<usize>,
    changed: Condvar,
    /// The machine has ended: no vCPU may enter the guest again.
    over: Arc<AtomicBool>,
    buses: Arc<Buses>,
    coalesced: CoalescedWrites,
    on_failure: OnFailure,
}

impl Shared {
    fn parked(&self) -> MutexGuard<'_, usize> {
        self.parked.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn must_park(&self) -> bool {
        self.order.load(Ordering::Acquire) != Order::Run as u8 || self.over.load(Ordering::Relaxed)
    }

    /// Waits until there is an order to run.
    fn park(&self) {
        let mut parked = self.parked();
        *parked += 1;
        self.changed.notify_all();
        while self.must_park() {
            parked = self.changed.wait(parked).unwrap_or_else(PoisonError::into_inner);
        }
        *parked -= 1;
    }

    /// Counts the thread as parked for ever.
    fn retire(&self) {
        *self.parked() += 1;
        self.changed.notify_all();
    }
}

/// The page KVM shares with this process for one vCPU. It is mapped as long as the vCPU's thread lives, and the thread
/// ends only with the process.
#[derive(Clone, Copy)]
struct RunPage(NonNull<kvm_run>);

// SAFETY: other threads touch only `immediate_exit`, one byte, atomically.
unsafe impl Send for RunPage {}

impl RunPage {
    /// The byte that makes KVM_RUN return at once.
    fn immediate_exit(&self) -> &AtomicU8 {
        // SAFETY: the page is mapped (see the type) and an AtomicU8 has the layout of u8; KVM only reads the byte.
        unsafe { AtomicU8::from_ptr(&raw mut (*self.0.as_ptr()).immediate_exit) }
    }

    /// Bytes of one item of the port access that KVM reported.
    fn port_access_size(&self) -> usize {
        // SAFETY: the page is mapped; called only on the vCPU's thread after KVM_EXIT_IO, when this union member is the valid one.
        usize::from(unsafe { (*self.0.as_ptr()).__bindgen_anon_1.io.size }).max(1)
    }
}

struct Handle {
    thread: JoinHandle<()>,
    run: RunPage,
    exits: Arc<ExitCounters>,
    kernel: KernelCounters,
}

/// All vCPUs of a machine, parked at first.
pub struct Vcpus {
    shared: Arc<Shared>,
    handles: Vec<Handle>,
}

impl Vcpus {
    /// Starts a thread for each of `vcpus`, which must be ready to run. They stay parked until [`Vcpus::run`], and for good
    /// once `over` is true.
    pub fn spawn(
        vcpus: Vec<VcpuFd>,
        buses: Arc<Buses>,
        coalesced: CoalescedWrites,
        over: Arc<AtomicBool>,
        on_failure: OnFailure,
        on_start: OnThreadStart,
    ) -> Result<Self, KvmError> {
        install_kick_handler().map_err(|source| KvmError::Call { call: "sigaction(vCPU kick)".into(), source })?;
        let shared = Arc::new(Shared {
            order: AtomicU8::new(Order::Park as u8),
            parked: Mutex::new(0),
            changed: Condvar::new(),
            over,
            coalesced,
            buses,
            on_failure,
        });
        let mut handles = Vec::with_capacity(vcpus.len());
        for (index, mut fd) in vcpus.into_iter().enumerate() {
            let run = RunPage(NonNull::from(fd.get_kvm_run()));
            let exits = Arc::new(ExitCounters::default());
            let kernel = KernelCounters::open(&fd);
            let (thread_shared, thread_exits, on_start) =
                (Arc::clone(&shared), Arc::clone(&exits), Arc::clone(&on_start));
            let thread = std::thread::Builder::new()
                .name(format!("vcpu{index}"))
                .stack_size(128 << 10)
                .spawn(move || vcpu_thread(fd, run, &thread_shared, &thread_exits, &on_start))
                .map_err(|source| KvmError::Thread { index: index as u8, source })?;
            handles.push(Handle { thread, run, exits, kernel });
        }
        Ok(Self { shared, handles })
    }

    /// Lets all vCPUs run.
    pub fn run(&self) {
        let _parked = self.shared.parked();
        for handle in &self.handles {
            handle.run.immediate_exit().store(0, Ordering::Release);
        }
        self.shared.order.store(Order::Run as u8, Ordering::Release);
        self.shared.changed.notify_all();
    }

    /// Stops all vCPUs and waits until none is in the guest or in an exit handler. Must not be called from a vCPU thread.
    pub fn park(&self) -> Result<(), KvmError> {
        self.shared.order.store(Order::Park as u8, Ordering::Release);
        for handle in &self.handles {
            handle.run.immediate_exit().store(1, Ordering::Release);
            // SAFETY: the thread has not been joined or detached (its handle is here), so its id is valid; the handler of
            // this signal does nothing.
            unsafe { libc::pthread_kill(handle.thread.as_pthread_t(), kick_signal()) };
        }
        let deadline = Instant::now() + STOP_TIMEOUT;
        let mut parked = self.shared.parked();
        while *parked < self.handles.len() {
            let left = deadline.saturating_duration_since(Instant::now());
            if left.is_zero() {
                return Err(KvmError::Stuck(STOP_TIMEOUT.as_millis() as u64));
            }
            parked = self.shared.changed.wait_timeout(parked, left).unwrap_or_else(PoisonError::into_inner).0;
        }
        Ok(())
    }

    /// Exits to this process by kind, and the kernel's own counters (`kvm_` and a name of Linux's `struct kvm_vcpu_stat`), summed
    /// over all vCPUs.
    pub fn exits(&self) -> Vec<(String, u64)> {
        let mut sums = Vec::new();
        for handle in &self.handles {
            handle.exits.add_to(&mut sums);
            handle.kernel.add_to(&mut sums);
        }
        sums
    }
}

fn kick_signal() -> libc::c_int {
    libc::SIGRTMIN()
}

/// The signal's only purpose is to make KVM_RUN return with EINTR.
fn install_kick_handler() -> io::Result<()> {
    extern "C" fn nothing(_: libc::c_int) {}
    // SAFETY: the action is fully initialised, its handler does nothing and so is async-signal-safe; without SA_RESTART
    // the interrupted ioctl returns.
    let result = unsafe {
        let mut action: libc::sigaction = std::mem::zeroed();
        action.sa_sigaction = nothing as extern "C" fn(libc::c_int) as libc::sighandler_t;
        libc::sigaction(kick_signal(), &action, std::ptr::null_mut())
    };
    if result == 0 { Ok(()) } else { Err(io::Error::last_os_error()) }
}

fn vcpu_thread(mut fd: VcpuFd, run: RunPage, shared: &Shared, exits: &ExitCounters, on_start: &OnThreadStart) {
    let failure = match on_start() {
        Ok(()) => loop {
            if shared.must_park() {
                shared.park();
            }
            if let Err(failure) = run_once(&mut fd, run, shared, exits) {
                break failure;
            }
        },
        Err(e) => VcpuFailure::Host(format!("cannot confine a vCPU thread: {e}")),
    };
    (shared.on_failure)(failure);
    shared.retire();
    // The run page must stay mapped for `Vcpus::park`, so the vCPU is not dropped before the process ends.
    std::mem::forget(fd);
}

/// One entry into the guest and what it came back with.
fn run_once(fd: &mut VcpuFd, run: RunPage, shared: &Shared, exits: &ExitCounters) -> Result<(), VcpuFailure> {
    let exit = fd.run();
    // What the guest wrote before comes before what it does now.
    shared.coalesced.apply(&shared.buses);
    let kind = match exit {
        Ok(VcpuExit::IoOut(port, data)) => {
            for item in data.chunks(run.port_access_size()) {
                shared.buses.ports.write(u64::from(port), item);
            }
            ExitKind::IoOut
        }
        Ok(VcpuExit::IoIn(port, data)) => {
            for item in data.chunks_mut(run.port_access_size()) {
                shared.buses.ports.read(u64::from(port), item);
            }
            ExitKind::IoIn
        }
        Ok(VcpuExit::MmioWrite(address, data)) => {
            shared.buses.mmio.write(address, data);
            ExitKind::MmioWrite
        }
        Ok(VcpuExit::MmioRead(address, data)) => {
            shared.buses.mmio.read(address, data);
            ExitKind::MmioRead
        }
        Ok(VcpuExit::IoapicEoi(_)) => ExitKind::IoapicEoi,
        Ok(VcpuExit::Intr) => ExitKind::Interrupted,
        Ok(VcpuExit::Hlt | VcpuExit::IrqWindowOpen | VcpuExit::SetTpr) => ExitKind::Other,
        Ok(VcpuExit::Shutdown) => return Err(VcpuFailure::Crash("the guest took a triple fault".into())),
        Ok(VcpuExit::InternalError) => {
            // SAFETY: this union member is the valid one after KVM_EXIT_INTERNAL_ERROR; the page is mapped.
            let suberror = unsafe { (*run.0.as_ptr()).__bindgen_anon_1.internal.suberror };
            return Err(VcpuFailure::Crash(format!(
                "KVM cannot go on with the guest (internal error {suberror}){}",
                place(fd)
            )));
        }
        Ok(VcpuExit::FailEntry(reason, cpu)) => {
            return Err(VcpuFailure::Crash(format!(
                "the CPU refused the guest's state (reason {reason:#x} on CPU {cpu})"
            )));
        }
        Ok(VcpuExit::SystemEvent(kind, _)) => {
            return Err(VcpuFailure::Crash(format!("KVM reports system event {kind}")));
        }
        Ok(other) => {
            return Err(VcpuFailure::Host(format!("KVM reports an exit this program does not know: {other:?}")));
        }
        Err(e) if matches!(e.errno(), libc::EINTR | libc::EAGAIN) => ExitKind::Interrupted,
        Err(e) => {
            let error = io::Error::from_raw_os_error(e.errno());
            return Err(VcpuFailure::Host(format!("KVM_RUN failed: {error}{}", place(fd))));
        }
    };
    exits.count(kind);
    Ok(())
}

/// Where the guest stood, for the operator.
fn place(fd: &VcpuFd) -> String {
    fd.get_regs().map(|r| format!(", instruction pointer {:#x}", r.rip)).unwrap_or_default()
}
