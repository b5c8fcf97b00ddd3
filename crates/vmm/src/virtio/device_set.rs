//! All PCI devices of one microVM, built from its spec.
//!
//! How the machine uses it: [`DeviceSet::build`] once, hook [`DeviceSet::port_device`] and [`DeviceSet::mmio_devices`] into
//! the port and MMIO buses, [`DeviceSet::start`] the I/O thread, then keep the [`IoThread`] handle for pause, resume,
//! statistics and the end.

use std::fs::File;
use std::ops::Range;
use std::os::fd::OwnedFd;
use std::sync::Arc;
use std::sync::mpsc::{RecvTimeoutError, SyncSender, sync_channel};
use std::thread::JoinHandle;
use std::time::Duration;

use hearth_block::{Engine, RawFile, Volume};
use vm_memory::GuestMemoryMmap;

use crate::bus::BusDevice;
use crate::control::protocol::{DiskStats, NicStats};
use crate::interrupt::{IoEventRegistry, MsiSender};
use crate::pci::{PciBus, PciLayout};
use crate::virtio::VirtioError;
use crate::virtio::backend::Backend;
use crate::virtio::balloon::{self, BalloonBackend};
use crate::virtio::block::{self, BlockBackend};
use crate::virtio::io_thread::{Command, CommandSender, IoDevice, IoLoop, eventfd};
use crate::virtio::net::{self, Link, NetBackend, Tap};
use crate::virtio::rng::{self, RngBackend};
use crate::virtio::shared::DeviceShared;
use crate::virtio::transport::{BAR_BYTES, Profile, VirtioPci};

/// virtio-blk's serial field.
const SERIAL_BYTES: usize = 20;
/// Request queues per disk: with the configuration vector they fit the MSI-X table.
const QUEUES_MAX: u16 = 16;
/// The I/O thread's stack: no recursion, no large buffers.
const STACK_BYTES: usize = 256 * 1024;
/// How often a waiting caller looks whether the I/O thread still lives.
const LIVENESS: Duration = Duration::from_millis(100);

/// One disk: what the guest sees and what is behind it.
pub struct Disk {
    /// Up to 20 ASCII bytes, answered to VIRTIO_BLK_T_GET_ID.
    pub serial: String,
    /// Raw file or block device.
    pub file: File,
    /// Offer VIRTIO_BLK_F_RO and fail writes.
    pub read_only: bool,
    /// Request queues, 1..=16.
    pub queues: u16,
}

/// One network interface.
pub struct Nic {
    /// Station address.
    pub mac: [u8; 6],
    /// MTU offered to the guest, in bytes.
    pub mtu: u16,
    /// A tap opened with `IFF_TAP | IFF_NO_PI | IFF_VNET_HDR`.
    pub tap: OwnedFd,
}

/// Everything on the PCI bus besides the host bridge, in slot order: disks, NICs, entropy source, balloon.
#[derive(Default)]
pub struct DeviceList {
    /// Slots 1.. in this order.
    pub disks: Vec<Disk>,
    /// Slots after the disks.
    pub nics: Vec<Nic>,
    /// `/dev/urandom` or the like for virtio-rng; in the slot after the NICs.
    pub rng: Option<File>,
    /// Offer virtio-balloon for free page reporting; in the slot after the entropy source.
    pub balloon: bool,
}

/// What the machine gives its devices.
#[derive(Clone)]
pub struct Platform {
    /// Where the PCI windows lie in guest physical address space.
    pub layout: PciLayout,
    /// The guest's memory.
    pub memory: Arc<GuestMemoryMmap>,
    /// Delivers MSI messages.
    pub msi: Arc<dyn MsiSender>,
    /// Turns queue notifications into eventfds.
    pub ioevents: Arc<dyn IoEventRegistry>,
}

/// The built devices, before and after their I/O thread starts.
pub struct DeviceSet {
    bus: Arc<PciBus>,
    commands: CommandSender,
    io_loop: Option<IoLoop>,
    on_failure: Option<Box<dyn FnOnce(String) + Send>>,
}

impl DeviceSet {
    /// Builds bus and devices; nothing runs yet and no guest memory is touched.
    pub fn build(devices: DeviceList, platform: Platform) -> Result<Self, VirtioError> {
        let mut builder = Builder::new(platform)?;
        for disk in devices.disks {
            builder.add_disk(disk)?;
        }
        for (index, nic) in devices.nics.into_iter().enumerate() {
            let link = Tap::new(nic.tap).map_err(|(what, source)| VirtioError::Tap { index, what, source })?;
            builder.add_nic(index, nic.mac, nic.mtu, Box::new(link))?;
        }
        if let Some(source) = devices.rng {
            builder.add_rng(source)?;
        }
        if devices.balloon {
            builder.add_balloon()?;
        }
        builder.finish()
    }

    /// The bus, for hot-plug and tests.
    pub fn bus(&self) -> &Arc<PciBus> {
        &self.bus
    }

    /// Configuration access by ports: register for `0xCF8..=0xCFF`.
    pub fn port_device(&self) -> Arc<dyn BusDevice> {
        self.bus.port_device()
    }

    /// ECAM and both BAR windows, as guest physical ranges to register on the MMIO bus.
    pub fn mmio_devices(&self) -> Vec<(Range<u64>, Arc<dyn BusDevice>)> {
        self.bus.mmio_devices()
    }

    /// The loop itself, for tests that turn it by hand.
    #[cfg(test)]
    pub(crate) fn take_io_loop(&mut self) -> IoLoop {
        self.io_loop.take().unwrap()
    }

    /// Calls `told` from the I/O thread if that ends without having been told to: the machine cannot go on. Before `start`.
    pub fn on_failure(&mut self, told: impl FnOnce(String) + Send + 'static) {
        self.on_failure = Some(Box::new(told));
    }

    /// Spawns the I/O thread. `on_start` runs first in that thread (seccomp filter, thread name in logs); its error ends
    /// the thread. Call once; devices answer register accesses before, but queues move only after.
    pub fn start(
        &mut self,
        on_start: impl FnOnce() -> std::io::Result<()> + Send + 'static,
    ) -> Result<IoThread, VirtioError> {
        let io_loop = self.io_loop.take().ok_or(VirtioError::AlreadyStarted)?;
        let on_failure = self.on_failure.take();
        let thread = std::thread::Builder::new()
            .name("io".into())
            .stack_size(STACK_BYTES)
            .spawn(move || {
                let result = on_start()
                    .map_err(|source| VirtioError::Setup { what: "thread start hook", source })
                    .and_then(|()| io_loop.run());
                if let (Err(error), Some(told)) = (&result, on_failure) {
                    told(error.to_string());
                }
                result
            })
            .map_err(|source| VirtioError::Setup { what: "thread", source })?;
        Ok(IoThread { commands: self.commands.clone(), thread: Some(thread) })
    }
}

/// Puts devices on the bus one after the other.
pub(crate) struct Builder {
    platform: Platform,
    bus: Arc<PciBus>,
    commands: CommandSender,
    devices: Vec<IoDevice>,
}

impl Builder {
    pub(crate) fn new(platform: Platform) -> Result<Self, VirtioError> {
        let bus = Arc::new(PciBus::new(platform.layout.clone()));
        Ok(Self { bus, commands: CommandSender::new()?, devices: Vec::new(), platform })
    }

    pub(crate) fn add_disk(&mut self, disk: Disk) -> Result<(), VirtioError> {
        let Disk { serial, file, read_only, queues } = disk;
        let volume = RawFile::new(file, read_only, Engine::Auto)
            .map_err(|source| VirtioError::Volume { serial: serial.clone(), source })?;
        self.add_volume(&serial, Arc::new(volume), queues)
    }

    pub(crate) fn add_volume(&mut self, serial: &str, volume: Arc<dyn Volume>, queues: u16) -> Result<(), VirtioError> {
        if serial.is_empty() || serial.len() > SERIAL_BYTES || !serial.is_ascii() {
            return Err(VirtioError::BadSerial(serial.to_owned()));
        }
        if !(1..=QUEUES_MAX).contains(&queues) {
            return Err(VirtioError::BadQueueCount { serial: serial.to_owned(), queues });
        }
        let profile = block::profile(volume.as_ref(), queues);
        let config = block::config_space(volume.as_ref(), queues);
        let memory = Arc::clone(&self.platform.memory);
        let mut backend = BlockBackend::new(volume, serial, usize::from(queues), &memory);
        backend.open().map_err(|source| VirtioError::Volume { serial: serial.to_owned(), source })?;
        self.add(format!("disk {serial}"), &profile, config, |_| Box::new(backend))
    }

    pub(crate) fn add_nic(
        &mut self,
        index: usize,
        mac: [u8; 6],
        mtu: u16,
        link: Box<dyn Link>,
    ) -> Result<(), VirtioError> {
        if !(68..=65521).contains(&mtu) {
            return Err(VirtioError::BadMtu { index, mtu });
        }
        let memory = Arc::clone(&self.platform.memory);
        self.add(format!("network interface {index}"), &net::profile(), net::config_space(mac, mtu), |shared| {
            Box::new(NetBackend::new(link, shared, mtu, &memory))
        })
    }

    pub(crate) fn add_rng(&mut self, source: File) -> Result<(), VirtioError> {
        let memory = Arc::clone(&self.platform.memory);
        self.add("entropy source".into(), &rng::profile(), Vec::new(), |_| Box::new(RngBackend::new(source, &memory)))
    }

    pub(crate) fn add_balloon(&mut self) -> Result<(), VirtioError> {
        let backend = BalloonBackend::new(&self.platform.memory);
        self.add("balloon".into(), &balloon::profile(), balloon::config_space(), |_| Box::new(backend))
    }

    fn add(
        &mut self,
        name: String,
        profile: &Profile,
        config: Vec<u8>,
        backend: impl FnOnce(Arc<DeviceShared>) -> Box<dyn Backend>,
    ) -> Result<(), VirtioError> {
        let slot = self.bus.free_slot()?;
        let window = &self.platform.layout.mmio64;
        let address = window.start + slot as u64 * BAR_BYTES;
        if address + BAR_BYTES > window.end {
            return Err(VirtioError::WindowTooSmall(slot));
        }
        let queues = profile.queue_sizes.len();
        let shared = Arc::new(DeviceShared::new(queues, config, Arc::clone(&self.platform.msi)));
        let doorbells = (0..queues).map(|_| eventfd().map(Arc::new)).collect::<Result<Vec<_>, _>>()?;
        let function = VirtioPci::new(
            profile,
            self.devices.len(),
            address,
            Arc::clone(&shared),
            &doorbells,
            self.commands.clone(),
            Arc::clone(&self.platform.ioevents),
        );
        let backend = backend(Arc::clone(&shared));
        self.devices.push(IoDevice::new(name, shared, doorbells, backend));
        self.bus.publish(slot, Arc::new(function))?;
        Ok(())
    }

    pub(crate) fn finish(self) -> Result<DeviceSet, VirtioError> {
        let io_loop = IoLoop::new(self.commands.clone(), self.platform.memory, self.devices)?;
        Ok(DeviceSet { bus: self.bus, commands: self.commands, io_loop: Some(io_loop), on_failure: None })
    }
}

/// Counters of all devices, in spec order.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct DeviceStats {
    /// Per disk.
    pub disks: Vec<DiskStats>,
    /// Per NIC.
    pub nics: Vec<NicStats>,
}

/// Handle of the running I/O thread. Dropping it finishes what is in flight and ends the thread without flushing.
pub struct IoThread {
    commands: CommandSender,
    thread: Option<JoinHandle<Result<(), VirtioError>>>,
}

impl IoThread {
    /// Stops taking new requests and waits until those in flight are done. Call with the vCPUs stopped.
    pub fn pause(&self) -> Result<(), VirtioError> {
        self.ask(|done| Command::Pause { done })
    }

    /// Undoes `pause`.
    pub fn resume(&self) -> Result<(), VirtioError> {
        self.ask(|done| Command::Resume { done })
    }

    /// Counters so far.
    pub fn stats(&self) -> Result<DeviceStats, VirtioError> {
        self.ask(|reply| Command::Stats { reply })
    }

    /// Finishes what is in flight, makes every disk durable (fdatasync) and ends the thread.
    pub fn stop(mut self) -> Result<(), VirtioError> {
        let stopped = self.ask(|done| Command::Stop { flush: true, done });
        self.join()?;
        stopped?
    }

    /// True once the thread ended, which before `stop` means that the machine cannot go on.
    pub fn ended(&self) -> bool {
        self.thread.as_ref().is_none_or(JoinHandle::is_finished)
    }

    fn ask<T>(&self, command: impl FnOnce(SyncSender<T>) -> Command) -> Result<T, VirtioError> {
        let (sender, receiver) = sync_channel(1);
        self.commands.send(command(sender));
        loop {
            match receiver.recv_timeout(LIVENESS) {
                Ok(answer) => return Ok(answer),
                Err(RecvTimeoutError::Timeout) if !self.ended() => {}
                Err(_) => return Err(VirtioError::IoThreadGone("it does not answer".into())),
            }
        }
    }

    fn join(&mut self) -> Result<(), VirtioError> {
        match self.thread.take().map(JoinHandle::join) {
            None => Ok(()),
            Some(Ok(result)) => result,
            Some(Err(_)) => Err(VirtioError::IoThreadGone("it panicked".into())),
        }
    }
}

impl Drop for IoThread {
    fn drop(&mut self) {
        if self.thread.is_some() {
            let _ = self.ask(|done| Command::Stop { flush: false, done });
            let _ = self.join();
        }
    }
}
