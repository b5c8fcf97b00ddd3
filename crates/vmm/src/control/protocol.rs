//! The messages between the host agent and one VMM process.
//!
//! Transport: an `AF_UNIX` `SOCK_SEQPACKET` socket, one message per packet, encoded with postcard. The VMM inherits a
//! *listening* socket as file descriptor 3 (so that a restarted agent can connect again) and serves one connection at a
//! time; a new connection replaces the old one. File descriptors travel as `SCM_RIGHTS` with the message that names them:
//! an [`FdIndex`] is a position in that array. The VMM never opens a path itself.

use serde::{Deserialize, Serialize};

/// Refused when the two sides differ: both are installed together, only a re-adopted VMM can be older than its agent.
pub const PROTOCOL_VERSION: u16 = 4;

/// File descriptor number at which the VMM inherits its listening control socket.
pub const CONTROL_LISTENER_FD: i32 = 3;

/// File descriptor number at which the VMM inherits the instance's lock file, if its parent has one. The parent holds an
/// exclusive `flock` on it; the VMM keeps the descriptor open until it ends and with it the lock, so that nobody starts a
/// second VMM for the instance. Just before it exits, the VMM writes its [`exit`] code as a little-endian `i32` at offset 0
/// (the parent empties the file before the start): an agent that was away learns from it how the VMM ended. A VMM that was
/// killed leaves the file empty. A closed descriptor 4 is no error.
pub const LOCK_FD: i32 = 4;

/// Largest message either side sends, in bytes.
pub const MAX_MESSAGE_BYTES: usize = 64 * 1024;

/// Position of a file descriptor in the `SCM_RIGHTS` array of the same message.
pub type FdIndex = u8;

/// Everything one microVM is made of. Sent once, with all file descriptors.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct MachineSpec {
    /// EC2-style instance id (`i-` + 17 hex digits); SMBIOS asset tag.
    pub instance_id: String,
    /// SMBIOS system UUID; its text form starts with `ec2`. The system serial number is the same text.
    pub uuid: [u8; 16],
    /// SMBIOS product name, e.g. `t3.micro`.
    pub instance_type: String,
    /// Virtual CPUs, 1..=32.
    pub vcpus: u8,
    /// Guest memory in MiB, at least 128.
    pub memory_mib: u64,
    /// What to boot.
    pub boot: BootSpec,
    /// Virtio block devices in guest order; the first is the root disk.
    pub disks: Vec<DiskSpec>,
    /// Virtio network devices in guest order.
    pub nics: Vec<NicSpec>,
    /// COM1.
    pub console: ConsoleSpec,
    /// An open `/dev/kvm`.
    pub kvm: FdIndex,
    /// An open `/dev/urandom` (or other entropy source) for virtio-rng; absent = no rng device.
    pub rng: Option<FdIndex>,
}

/// Kernel, initrd and command line, as the agent found them in the root disk or was given them.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct BootSpec {
    /// Kernel image: an ELF vmlinux with a PVH note, or a bzImage. Told apart by content.
    pub kernel: FdIndex,
    /// Initial RAM disk.
    pub initrd: Option<FdIndex>,
    /// Kernel command line without trailing NUL, at most 2047 bytes.
    pub cmdline: String,
}

/// One virtio block device.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct DiskSpec {
    /// Up to 20 ASCII bytes: the volume id without its hyphen (`vol` + 17 hex digits).
    pub serial: String,
    /// Where its bytes are.
    pub backing: DiskBacking,
    /// Offer VIRTIO_BLK_F_RO and fail writes.
    pub read_only: bool,
    /// Request queues, 1..=16.
    pub queues: u16,
}

/// What is behind a disk.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum DiskBacking {
    /// A raw file or block device, opened read-write unless the disk is read-only.
    Raw {
        /// It.
        file: FdIndex,
    },
    /// A volume of its own blocks over a shared base; see docs/storage.md.
    Layered(Box<LayeredSpec>),
    /// An export of an NBD server; see docs/storage.md.
    Nbd(Box<NbdSpec>),
}

/// A volume that is served by somebody else.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct NbdSpec {
    /// A connected stream socket whose other end begins the NBD negotiation: the server itself, or who ends TLS for it.
    pub socket: FdIndex,
    /// Name of the export; the empty one is the server's default.
    pub export: String,
    /// Rate limits.
    pub limits: DiskLimits,
}

/// The files and terms of a layered volume.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct LayeredSpec {
    /// The volume's own blocks.
    pub data: FdIndex,
    /// Its map. The VMM locks it; the sender must close its own copy of the descriptor.
    pub map: FdIndex,
    /// Where the other blocks are read from; absent when there are none.
    pub base: Option<BaseSpec>,
    /// An eventfd that the agent writes after it set presence bits.
    pub wake: FdIndex,
    /// Key of `data`, when the volume is encrypted.
    pub key: Option<DiskKey>,
    /// Attachment generation: refused when the map has seen a newer one.
    pub generation: u64,
    /// Rate limits.
    pub limits: DiskLimits,
    /// Use direct I/O for `data` where the file system has it.
    pub direct: bool,
}

/// The shared base of a volume's snapshot.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct BaseSpec {
    /// Content of the chunks that are present.
    pub data: FdIndex,
    /// A memfd sealed against shrinking, with one bit per chunk in little-endian u64 words, set after the chunk was written.
    pub presence: FdIndex,
    /// Key of `data`, when the base is stored encrypted.
    pub key: Option<DiskKey>,
}

/// An AES-256-XTS key. Never printed.
#[derive(Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct DiskKey {
    /// Key of the data.
    pub data: [u8; 32],
    /// Key of the tweaks; must differ from the other.
    pub tweak: [u8; 32],
}

impl std::fmt::Debug for DiskKey {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("DiskKey(..)")
    }
}

/// Most a disk may do; 0 = not limited.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct DiskLimits {
    /// Operations per second; a request counts once per started 256 KiB.
    pub iops: u64,
    /// Bytes read and written per second.
    pub bytes_per_second: u64,
}

/// One disk of a [`Command::Freeze`].
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct FreezeSpec {
    /// [`DiskSpec::serial`] of a layered disk.
    pub serial: String,
    /// An empty file that takes chunks as they were, each at its offset on the volume.
    pub stage: FdIndex,
    /// Frozen set and progress, at least `hearth_block::staged_bytes` long.
    pub staged: FdIndex,
}

/// One virtio network device.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct NicSpec {
    /// Station address.
    pub mac: [u8; 6],
    /// MTU offered to the guest, in bytes.
    pub mtu: u16,
    /// A tap opened with `IFF_TAP | IFF_NO_PI | IFF_VNET_HDR`.
    pub tap: FdIndex,
}

/// COM1's two host sides.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct ConsoleSpec {
    /// A file of `CONSOLE_RING_HEADER + capacity` bytes that keeps the last output; see `console_ring`.
    pub ring: FdIndex,
    /// A listening `SOCK_STREAM` socket: each client gets the ring's backlog, then live output; its input reaches the guest.
    pub listener: FdIndex,
}

/// Agent to VMM.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Request {
    /// Chosen by the agent, echoed in the [`Reply`].
    pub id: u64,
    /// What to do.
    pub command: Command,
}

/// The verbs of the control socket.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum Command {
    /// First message on every connection; answered by [`Outcome::Hello`].
    Hello {
        /// The agent's [`PROTOCOL_VERSION`].
        version: u16,
    },
    /// Build the machine (not yet running). Only once per process.
    Create(Box<MachineSpec>),
    /// Let the vCPUs run.
    Start,
    /// Stop the vCPUs where they are; devices finish what is in flight.
    Pause,
    /// Undo `Pause`.
    Resume,
    /// Press the ACPI power button.
    PowerButton,
    /// Counters and state; answered by [`Outcome::Stats`].
    Stats,
    /// Put a disk into a free PCI slot and tell the guest. Answered when the disk is on the bus; the guest finds it soon after.
    /// Refused when the serial is in use or all slots are, and nothing has changed then.
    AttachDisk(Box<DiskSpec>),
    /// Take a disk away. Answered at once; [`Event::DiskDetached`] tells when its backing is free. May be repeated, also with
    /// `force` after without.
    ///
    /// Without `force` the guest is asked to let go of it, which may take for ever: a guest that does not answer keeps the
    /// disk. With `force` requests in flight finish, writes are flushed, and from then on the guest gets errors; the dead
    /// disk keeps its PCI slot until the guest lets go of it.
    DetachDisk {
        /// [`DiskSpec::serial`].
        serial: String,
        /// Do not wait for the guest.
        force: bool,
    },
    /// Make a disk larger, also its file, and show the guest its new capacity. An NBD server must have made its export larger
    /// before, and unless the disk was connected anew since, a [`Command::ConnectVolume`] must come first: NBD tells the length
    /// only when a connection begins.
    ResizeDisk {
        /// [`DiskSpec::serial`].
        serial: String,
        /// New size, a multiple of 512 and not less than the old one.
        bytes: u64,
    },
    /// New rate limits for a layered or an NBD disk, from now on.
    SetDiskLimits {
        /// [`DiskSpec::serial`].
        serial: String,
        /// Them.
        limits: DiskLimits,
    },
    /// Fix the point in time of a snapshot of these layered disks, all at one instant, while the guest runs. Answered by
    /// [`Outcome::Frozen`] when it is fixed: all of them are frozen, or on an error none. One freeze at a time, and it ends when
    /// the connection does before it is answered.
    Freeze {
        /// The disks.
        disks: Vec<FreezeSpec>,
    },
    /// Copy these chunks of a frozen disk to its stage soon. Their bits in `staged` and [`Event::ChunksStaged`] tell when each
    /// is there.
    StageChunks {
        /// [`DiskSpec::serial`].
        serial: String,
        /// Chunk numbers.
        chunks: Vec<u64>,
    },
    /// Chunks of a layered disk's base have come. An agent that has the disk's eventfd writes that instead; one that was
    /// restarted has lost it.
    ChunksCame {
        /// [`DiskSpec::serial`].
        serial: String,
    },
    /// End a freeze.
    Thaw {
        /// [`DiskSpec::serial`].
        serial: String,
        /// The snapshot failed: the next one has to have the frozen chunks too.
        restore_dirty: bool,
    },
    /// Flush disks and exit with [`exit::KILLED`], whatever the guest does.
    Kill,
    /// A new connection for an NBD disk: the answer to [`Event::ConnectVolume`], or what [`Command::ResizeDisk`] needs. Kept until it
    /// is needed; a later one replaces it.
    ConnectVolume {
        /// [`DiskSpec::serial`].
        serial: String,
        /// As [`NbdSpec::socket`].
        socket: FdIndex,
    },
}

/// VMM to agent.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub enum Message {
    /// Answers one [`Request`].
    Reply(Reply),
    /// Pushed unasked.
    Event(Event),
}

/// Answer to the request with the same id.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Reply {
    /// [`Request::id`].
    pub id: u64,
    /// Result, or an error text an operator can act on.
    pub outcome: Result<Outcome, String>,
}

/// What a request yields.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub enum Outcome {
    /// Done, nothing to tell.
    Done,
    /// Who is there.
    Hello {
        /// The VMM's [`PROTOCOL_VERSION`].
        version: u16,
        /// Instance id of the machine, empty before `Create`.
        instance_id: String,
        /// Where the machine stands.
        state: MachineState,
    },
    /// Counters.
    Stats(Box<Stats>),
    /// The point in time is fixed.
    Frozen {
        /// Number of frozen chunks per disk, in the order of the command.
        chunks: Vec<u64>,
        /// How long writes waited for it, in microseconds, on the disk where that was longest.
        held_us: u64,
    },
}

/// Life of the machine inside one VMM process.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum MachineState {
    /// No `Create` yet.
    Empty,
    /// Built, vCPUs not started.
    Created,
    /// vCPUs run.
    Running,
    /// vCPUs stopped by `Pause`.
    Paused,
}

/// Pushed by the VMM; the exit code of the process says the same for an agent that was away.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum Event {
    /// The guest powered off by ACPI S5; the process exits with [`exit::POWER_OFF`].
    PoweredOff,
    /// The guest asked for a reset; the process exits with [`exit::RESET`].
    Reset,
    /// A vCPU hit a triple fault or an unrecoverable state; the process exits with [`exit::GUEST_CRASH`].
    GuestCrashed,
    /// The guest kernel reported a panic (pvpanic); it may still reset by itself. Told once.
    GuestPanicked,
    /// A disk that was to be detached has left the machine; its files are closed.
    DiskDetached {
        /// [`DiskSpec::serial`].
        serial: String,
        /// All its writes were made durable. False only when the host's file system failed.
        durable: bool,
    },
    /// Requests wait for chunks of a disk's base. Chunks still waited for are told again to each new connection.
    FetchChunks {
        /// [`DiskSpec::serial`].
        serial: String,
        /// Chunk numbers, at most 4096 in one event.
        chunks: Vec<u64>,
    },
    /// Chunks of a frozen disk are complete in its stage. Not repeated: `staged` tells the same.
    ChunksStaged {
        /// [`DiskSpec::serial`].
        serial: String,
        /// Chunk numbers, at most 4096 in one event.
        chunks: Vec<u64>,
    },
    /// Requests to a disk wait or fail. While it lasts it is told again to each new connection.
    VolumeImpaired {
        /// [`DiskSpec::serial`].
        serial: String,
        /// Why.
        cause: VolumeCause,
    },
    /// Nothing waits any more.
    VolumeRecovered {
        /// [`DiskSpec::serial`].
        serial: String,
    },
    /// An NBD disk has lost its connection, or a new one was no good; its requests wait for [`Command::ConnectVolume`]. Told again
    /// to each new agent while no connection has come.
    ConnectVolume {
        /// [`DiskSpec::serial`].
        serial: String,
    },
}

/// Why a volume cannot make progress or lost its promise.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum VolumeCause {
    /// The host's file system is full: writes wait and are repeated.
    NoSpace,
    /// A chunk of the base did not come for some seconds: requests for it wait.
    ChunkUnavailable {
        /// The chunk.
        chunk: u64,
    },
    /// Making writes durable failed: all further writes and flushes fail. Final.
    SyncFailed {
        /// Error number.
        errno: i32,
    },
    /// Copying to the stage failed: the snapshot in progress is lost, the volume goes on.
    StageFailed {
        /// Error number.
        errno: i32,
    },
    /// The connection to the volume's server is lost: requests wait for a new one.
    Disconnected,
}

/// Counters since `Create`.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct Stats {
    /// Exits to the VMM by kind, e.g. `io_out`, `mmio_write`; and the kernel's own counters over all vCPUs, e.g. `kvm_exits`,
    /// `kvm_halt_exits` (names of Linux's `struct kvm_vcpu_stat`).
    pub exits: Vec<(String, u64)>,
    /// Where guest RAM lies in the VMM's address space, as start and length in bytes: what to leave out when the VMM's own
    /// memory is summed up; see `memory_use`.
    pub guest_ram: Vec<(u64, u64)>,
    /// Nanoseconds from process start until `Start` was done.
    pub start_ns: u64,
    /// Per disk: those of the spec in its order, then attached ones. A disk is left out from when its detachment began to
    /// return its backing.
    pub disks: Vec<DiskStats>,
    /// Per NIC, in spec order.
    pub nics: Vec<NicStats>,
}

/// One disk's counters.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct DiskStats {
    /// Which disk: [`DiskSpec::serial`].
    pub serial: String,
    /// Completed requests.
    pub read_ops: u64,
    /// Completed requests.
    pub write_ops: u64,
    /// Bytes.
    pub read_bytes: u64,
    /// Bytes.
    pub write_bytes: u64,
    /// Completed FLUSH requests.
    pub flush_ops: u64,
    /// Requests answered with an error.
    pub errors: u64,
}

/// One NIC's counters, as the guest sees directions.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct NicStats {
    /// Packets to the guest.
    pub rx_packets: u64,
    /// Bytes to the guest.
    pub rx_bytes: u64,
    /// Packets from the guest.
    pub tx_packets: u64,
    /// Bytes from the guest.
    pub tx_bytes: u64,
}

/// Exit codes of the `hearth-vmm` process.
pub mod exit {
    /// The guest powered off (ACPI S5).
    pub const POWER_OFF: i32 = 0;
    /// Wrong invocation or broken control message before `Create`.
    pub const USAGE: i32 = 2;
    /// The guest asked for a reset; start a fresh process to reboot.
    pub const RESET: i32 = 10;
    /// Triple fault, KVM internal error or shutdown exit.
    pub const GUEST_CRASH: i32 = 11;
    /// `Kill` was obeyed.
    pub const KILLED: i32 = 12;
    /// The host failed (out of memory, KVM ioctl, lost backing file).
    pub const HOST_ERROR: i32 = 13;
    /// A seccomp rule was broken (SIGSYS handler), or another internal bug.
    pub const INTERNAL: i32 = 14;
}
