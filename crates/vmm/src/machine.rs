//! One machine: built from its spec and file descriptors, started, paused, asked to power off, counted, ended.

mod disks;

use std::fs::File;
use std::io;
use std::os::fd::OwnedFd;
use std::os::unix::net::UnixListener;
use std::sync::Arc;
use std::time::{Duration, Instant};

pub use disks::Freezing;

use crate::acpi::ged::{EventLine, GenericEventDevice, PCI_HOTPLUG, POWER_BUTTON};
use crate::acpi::power::{self, PowerRegisters};
use crate::boot::{self, BootError, Images, Placement, smbios};
use crate::bus::{BusDevice, BusError, Buses};
use crate::console::{Console, ConsoleOutput};
use crate::console_ring::RingError;
use crate::control::protocol::{FdIndex, MachineSpec, MachineState, Stats};
use crate::events::{EventQueue, EventSink, MachineEvent};
use crate::kvm::coalesced::CoalescedWrites;
use crate::kvm::irq::KvmInterrupts;
use crate::kvm::vcpu::{VcpuFailure, Vcpus};
use crate::kvm::vm::{MAX_VCPUS, Vm};
use crate::kvm::{KvmError, call, cpuid};
use crate::legacy::ioapic::{IoApic, Pin};
use crate::legacy::pvpanic::PanicPort;
use crate::legacy::serial::SerialPort;
use crate::mem::layout::{self, RamLayout, gsi, port};
use crate::mem::{Memory, MemoryError};
use crate::pci::PciLayout;
use crate::sandbox::{self, Filter, SandboxError, ThreadKind};
use crate::virtio::{DeviceList, DeviceSet, IoThread, Nic, Platform, VirtioError};

/// Why a machine cannot be built or do what was asked.
#[derive(Debug, thiserror::Error)]
pub enum MachineError {
    /// The spec contradicts itself or the descriptors that came with it.
    #[error("bad machine spec: {0}")]
    Spec(String),
    /// Not possible in this state.
    #[error("the machine is {actual:?}; this needs it to be {needed}")]
    State {
        /// Where it stands.
        actual: MachineState,
        /// Where it must stand.
        needed: &'static str,
    },
    /// The engine behind a disk.
    #[error("disk {serial}: {source}")]
    Volume {
        /// Which disk.
        serial: String,
        /// Cause.
        source: hearth_block::BlockError,
    },
    /// KVM.
    #[error(transparent)]
    Kvm(#[from] KvmError),
    /// Guest memory.
    #[error(transparent)]
    Memory(#[from] MemoryError),
    /// Kernel, initrd, command line.
    #[error(transparent)]
    Boot(#[from] BootError),
    /// Disks, NICs, entropy source.
    #[error(transparent)]
    Virtio(#[from] VirtioError),
    /// The system call filters.
    #[error(transparent)]
    Sandbox(#[from] SandboxError),
    /// Console ring.
    #[error(transparent)]
    Console(#[from] RingError),
    /// Two devices at one address: a bug.
    #[error(transparent)]
    Bus(#[from] BusError),
    /// Another host call.
    #[error("cannot {action}: {source}")]
    Host {
        /// What was tried.
        action: &'static str,
        /// The host's answer.
        source: io::Error,
    },
}

fn host(action: &'static str) -> impl FnOnce(io::Error) -> MachineError {
    move |source| MachineError::Host { action, source }
}

/// Most disks and NICs together that have a PCI slot beside the host bridge, the entropy source and the balloon.
const MAX_DEVICES: usize = 29;

/// The descriptors of a `Create` message; each may be taken once.
pub struct Descriptors(Vec<Option<OwnedFd>>);

impl Descriptors {
    /// In the order of the `SCM_RIGHTS` array.
    pub fn new(fds: Vec<OwnedFd>) -> Self {
        Self(fds.into_iter().map(Some).collect())
    }

    fn take(&mut self, index: FdIndex, what: &str) -> Result<OwnedFd, MachineError> {
        let count = self.0.len();
        let slot = self.0.get_mut(usize::from(index));
        slot.ok_or_else(|| MachineError::Spec(format!("the {what} is descriptor {index}, but only {count} came")))?
            .take()
            .ok_or_else(|| {
                MachineError::Spec(format!("the {what} is descriptor {index}, which something else uses already"))
            })
    }
}

/// Checks everything about a spec that can be checked without its descriptors.
pub fn validate(spec: &MachineSpec) -> Result<(), MachineError> {
    let bad = |text: String| Err(MachineError::Spec(text));
    if !(1..=MAX_VCPUS).contains(&spec.vcpus) {
        return Err(KvmError::VcpuCount(spec.vcpus).into());
    }
    if spec.disks.len() + spec.nics.len() > MAX_DEVICES {
        return bad(format!(
            "{} disks and network interfaces; at most {MAX_DEVICES} fit",
            spec.disks.len() + spec.nics.len()
        ));
    }
    spec.disks.iter().try_for_each(disks::validate)?;
    if let Some(nic) = spec.nics.iter().find(|nic| nic.mac.first().is_some_and(|b| b & 1 != 0) || nic.mtu < 68) {
        return bad(format!("network interface {:02x?} has a group address or an MTU of {} bytes", nic.mac, nic.mtu));
    }
    Ok(())
}

/// A machine with its devices. Its vCPUs and I/O have their own threads; the owner calls these methods from one thread.
pub struct Machine {
    state: MachineState,
    instance_id: String,
    started: Option<Duration>,
    born: Instant,
    memory: Memory,
    control_filter: Filter,
    vcpus: Vcpus,
    io: IoThread,
    events: Arc<EventQueue>,
    serial: Arc<SerialPort>,
    ged: Arc<GenericEventDevice>,
    console: Console,
}

impl Machine {
    /// Builds the machine; its vCPUs wait. `placement` is how kernel and initrd get into memory, `born` when the process started.
    pub fn create(
        spec: &MachineSpec,
        mut fds: Descriptors,
        placement: Placement,
        born: Instant,
    ) -> Result<Self, MachineError> {
        validate(spec)?;
        let vm = Vm::new(fds.take(spec.kvm, "kvm device")?)?;
        let memory = Memory::new(spec.memory_mib)?;
        let bits = cpuid::physical_address_bits(vm.supported_cpuid());
        if memory.layout().pci_mmio64() + layout::PCI_MMIO64_SIZE
            > 1u64.checked_shl(u32::from(bits)).unwrap_or(u64::MAX)
        {
            let text = format!("{} MiB of memory do not fit into this host's {bits}-bit addresses", spec.memory_mib);
            return Err(MachineError::Spec(text));
        }
        vm.set_memory(&memory)?;
        let events = Arc::new(EventQueue::new().map_err(host("make an eventfd"))?);
        let sink: Arc<dyn EventSink> = Arc::clone(&events) as Arc<dyn EventSink>;
        let interrupts = Arc::new(KvmInterrupts::new(vm.fd()));

        let ring = File::from(fds.take(spec.console.ring, "console ring")?);
        let output = Arc::new(ConsoleOutput::new(&ring)?);
        let listener = UnixListener::from(fds.take(spec.console.listener, "console listener")?);
        let console = Console::new(Arc::clone(&output), Some(listener)).map_err(host("listen for console clients"))?;

        let ioapic = Arc::new(IoApic::new(Arc::clone(&interrupts) as _));
        let serial_line = Arc::new(Pin::new(Arc::clone(&ioapic), gsi::COM1));
        let serial = Arc::new(SerialPort::new(serial_line, output).map_err(host("make an eventfd"))?);
        let ged = Arc::new(GenericEventDevice::new(Arc::new(Pin::new(Arc::clone(&ioapic), gsi::GED))));

        let devices = take_devices(spec, &mut fds)?;
        let platform = Platform {
            layout: pci_layout(memory.layout()),
            memory: Arc::new(memory.ram().clone()),
            msi: Arc::clone(&interrupts) as _,
            ioevents: interrupts,
            hotplug_line: Arc::new(EventLine::new(Arc::clone(&ged), PCI_HOTPLUG)),
            events: Arc::clone(&sink),
        };
        let mut devices = DeviceSet::build(devices, platform)?;

        let buses = Arc::new(Buses::default());
        let ports: [(u16, u16, Arc<dyn BusDevice>); 4] = [
            (port::COM1, port::COM1_LEN, Arc::clone(&serial) as _),
            (port::PVPANIC, 1, Arc::new(PanicPort::new(Arc::clone(&sink)))),
            (port::ACPI_POWER, port::ACPI_POWER_LEN, Arc::new(PowerRegisters::new(Arc::clone(&sink)))),
            (port::PCI_CONFIG, port::PCI_CONFIG_LEN, devices.port_device()),
        ];
        for (start, length, device) in ports {
            buses.ports.insert(u64::from(start), u64::from(length), device)?;
        }
        buses.mmio.insert(layout::IOAPIC, layout::IOAPIC_SIZE, ioapic)?;
        buses.mmio.insert(layout::GED, layout::GED_SIZE, Arc::clone(&ged) as _)?;
        buses.mmio.insert(layout::PCI_HOTPLUG, layout::PCI_HOTPLUG_SIZE, devices.hotplug_device())?;
        for (range, device) in devices.mmio_devices() {
            buses.mmio.insert(range.start, range.end.saturating_sub(range.start), device)?;
        }

        let kernel = File::from(fds.take(spec.boot.kernel, "kernel")?);
        let initrd = spec.boot.initrd.map(|index| fds.take(index, "initrd").map(File::from)).transpose()?;
        let identity =
            smbios::Identity { uuid: spec.uuid, instance_type: &spec.instance_type, instance_id: &spec.instance_id };
        smbios::write(&memory, &identity)?;
        memory.write(layout::RESET_VECTOR, &power::reset_vector(port::ACPI_POWER))?;
        let rsdp = crate::acpi::tables::write(&memory, spec.vcpus, devices.hotplug_slots())?;
        let images = Images { kernel: &kernel, initrd: initrd.as_ref(), cmdline: &spec.boot.cmdline, placement };
        let entry = boot::load(&memory, &images, rsdp)?;
        boot::start::write_tables(&memory, entry)?;

        let mut vcpu_fds = Vec::with_capacity(usize::from(spec.vcpus));
        for index in 0..spec.vcpus {
            let fd = vm.create_vcpu(index)?;
            let topology = cpuid::Topology { index, count: spec.vcpus };
            let table = cpuid::for_vcpu(vm.supported_cpuid(), topology, vm.has_tsc_deadline())?;
            fd.set_cpuid2(&table).map_err(call("KVM_SET_CPUID2"))?;
            boot::start::set_msrs(&fd)?;
            boot::start::set_extended_state(&fd, &table)?;
            if index == 0 {
                boot::start::set_registers(&fd, entry)?;
            }
            vcpu_fds.push(fd);
        }
        let first = vcpu_fds.first().ok_or(KvmError::VcpuCount(spec.vcpus))?;
        let coalesced = CoalescedWrites::new(&vm.fd(), first)?;
        let io_sink = Arc::clone(&sink);
        devices.on_failure(move |text| io_sink.raise(MachineEvent::HostFailed(text)));
        let on_failure = Arc::new(move |failure| {
            sink.raise(match failure {
                VcpuFailure::Crash(text) => MachineEvent::Crashed(text),
                VcpuFailure::Host(text) => MachineEvent::HostFailed(text),
            });
        });
        sandbox::settle_allocator();
        sandbox::install_trap_handler().map_err(host("install a signal handler"))?;
        let vcpu_filter = Filter::new(ThreadKind::Vcpu)?;
        let confine_vcpu = Arc::new(move || vcpu_filter.apply().map_err(io::Error::other));
        let vcpus = Vcpus::spawn(vcpu_fds, buses, coalesced, events.over(), on_failure, confine_vcpu)?;
        let io_filter = Filter::new(ThreadKind::Io { io_uring: sandbox::io_uring_allowed() })?;
        let io = devices.start(move || io_filter.apply().map_err(io::Error::other))?;
        Ok(Self {
            state: MachineState::Created,
            instance_id: spec.instance_id.clone(),
            started: None,
            born,
            memory,
            control_filter: Filter::new(ThreadKind::Control)?,
            vcpus,
            io,
            events,
            serial,
            ged,
            console,
        })
    }

    fn need(&self, states: &[MachineState], needed: &'static str) -> Result<(), MachineError> {
        if states.contains(&self.state) { Ok(()) } else { Err(MachineError::State { actual: self.state, needed }) }
    }

    /// Lets the vCPUs run for the first time. From here on the calling thread is confined as the control thread.
    pub fn start(&mut self) -> Result<(), MachineError> {
        self.need(&[MachineState::Created], "created")?;
        self.control_filter.apply()?;
        self.vcpus.run();
        self.started = Some(self.born.elapsed());
        self.state = MachineState::Running;
        Ok(())
    }

    /// Stops vCPUs, then devices.
    pub fn pause(&mut self) -> Result<(), MachineError> {
        self.need(&[MachineState::Running], "running")?;
        let paused = self.vcpus.park().map_err(MachineError::from).and_then(|()| Ok(self.io.pause()?));
        if let Err(error) = paused {
            self.vcpus.run();
            return Err(error);
        }
        self.state = MachineState::Paused;
        Ok(())
    }

    /// Undoes [`Machine::pause`].
    pub fn resume(&mut self) -> Result<(), MachineError> {
        self.need(&[MachineState::Paused], "paused")?;
        self.io.resume()?;
        self.vcpus.run();
        self.state = MachineState::Running;
        Ok(())
    }

    /// Presses the ACPI power button. A paused guest sees it when it is resumed.
    pub fn power_button(&self) -> Result<(), MachineError> {
        self.need(&[MachineState::Running, MachineState::Paused], "running")?;
        self.ged.raise(POWER_BUTTON).map_err(host("interrupt the guest"))
    }

    /// Counters.
    pub fn stats(&self) -> Result<Stats, MachineError> {
        let devices = self.io.stats()?;
        let start_ns = self.started.map_or(0, |d| d.as_nanos() as u64);
        let guest_ram = self.memory.host_ranges();
        Ok(Stats { exits: self.vcpus.exits(), guest_ram, start_ns, disks: devices.disks, nics: devices.nics })
    }

    /// Stops everything and makes disks durable. The process ends next.
    pub fn end(self) -> Result<(), MachineError> {
        // A vCPU that does not stop must not keep the disks from being flushed.
        let parked = self.vcpus.park();
        self.io.stop()?;
        Ok(parked?)
    }

    /// Where it stands.
    pub fn state(&self) -> MachineState {
        self.state
    }

    /// Its instance id.
    pub fn instance_id(&self) -> &str {
        &self.instance_id
    }

    /// What happens to it.
    pub fn events(&self) -> &Arc<EventQueue> {
        &self.events
    }

    /// COM1.
    pub fn serial(&self) -> &SerialPort {
        &self.serial
    }

    /// COM1's host side.
    pub fn console(&mut self) -> &mut Console {
        &mut self.console
    }

    /// COM1's host side, to look at.
    pub fn console_ref(&self) -> &Console {
        &self.console
    }
}

fn take_devices(spec: &MachineSpec, fds: &mut Descriptors) -> Result<DeviceList, MachineError> {
    let mut devices = DeviceList::default();
    for disk in &spec.disks {
        devices.disks.push(disks::take(disk, fds)?);
    }
    for nic in &spec.nics {
        devices.nics.push(Nic { mac: nic.mac, mtu: nic.mtu, tap: fds.take(nic.tap, "tap")? });
    }
    devices.rng = spec.rng.map(|index| fds.take(index, "entropy source").map(File::from)).transpose()?;
    devices.balloon = true;
    Ok(devices)
}

fn pci_layout(ram: RamLayout) -> PciLayout {
    let mmio64 = ram.pci_mmio64();
    PciLayout {
        ecam: layout::PCI_ECAM..layout::PCI_ECAM + layout::PCI_ECAM_SIZE,
        mmio32: layout::PCI_MMIO32..layout::PCI_MMIO32 + layout::PCI_MMIO32_SIZE,
        mmio64: mmio64..mmio64 + layout::PCI_MMIO64_SIZE,
    }
}
