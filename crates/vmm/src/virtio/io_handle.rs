//! The control thread's hold on the I/O thread.

use std::os::fd::OwnedFd;
use std::sync::Arc;
use std::sync::mpsc::{RecvTimeoutError, SyncSender, sync_channel};
use std::thread::JoinHandle;
use std::time::Duration;

#[cfg(test)]
use hearth_block::Volume;
use hearth_block::{LayeredVolume, RateLimits, SECTOR_BYTES};

use super::VirtioError;
use super::device_set::{DeviceStats, Disk};
use super::factory::{Factory, MadeDisk};
use super::hotplug::{Arrival, DiskCondition, DiskEvent, DiskNotice, Hotplug};
use super::io_thread::Command;
#[cfg(test)]
use super::volume::OpenVolume;

/// How often a waiting caller looks whether the I/O thread still lives.
const LIVENESS: Duration = Duration::from_millis(100);

/// Handle of the running I/O thread. Dropping it finishes what is in flight and ends the thread without flushing.
pub struct IoThread {
    factory: Factory,
    hotplug: Arc<Hotplug>,
    thread: Option<JoinHandle<Result<(), VirtioError>>>,
}

impl IoThread {
    pub(super) fn new(factory: Factory, hotplug: Arc<Hotplug>, thread: JoinHandle<Result<(), VirtioError>>) -> Self {
        Self { factory, hotplug, thread: Some(thread) }
    }

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

    /// Puts a disk into the lowest free slot and tells the guest.
    ///
    /// # Errors
    /// A bad serial or one that is in use, a backing that cannot be opened, no free slot. Nothing has changed then.
    pub fn attach_disk(&self, disk: Disk) -> Result<(), VirtioError> {
        self.hotplug.check_serial(&disk.serial)?;
        self.attach(self.factory.make_disk(disk)?)
    }

    /// The same over any volume.
    #[cfg(test)]
    pub(super) fn attach_volume(&self, serial: &str, volume: Arc<dyn Volume>, queues: u16) -> Result<(), VirtioError> {
        self.hotplug.check_serial(serial)?;
        self.attach(self.factory.make_volume(self.factory.next_id(), serial, OpenVolume::plain(volume), queues)?)
    }

    fn attach(&self, disk: MadeDisk) -> Result<(), VirtioError> {
        let (arrival, device) = Arrival::of(disk);
        self.ask(|done| Command::Add { device: Box::new(device), done })??;
        let slot = self.hotplug.publish(arrival)?;
        self.hotplug.announce(slot)
    }

    /// Asks the guest to let go of a disk, or with `force` takes its volume away first. [`IoThread::note`] tells the end.
    /// May be repeated, also with `force` after without.
    pub fn detach_disk(&self, serial: &str, force: bool) -> Result<(), VirtioError> {
        if force { self.hotplug.force_removal(serial) } else { self.hotplug.ask_removal(serial) }
    }

    /// Shows the guest that a disk has grown to `bytes`; its file is made to have them.
    pub fn resize_disk(&self, serial: &str, bytes: u64) -> Result<(), VirtioError> {
        let (device, volume) = self.hotplug.volume(serial)?;
        let volume = volume.volume;
        let from = volume.size_bytes();
        if bytes < from || !bytes.is_multiple_of(SECTOR_BYTES) {
            return Err(VirtioError::Shrink { serial: serial.to_owned(), from, to: bytes });
        }
        if bytes == from {
            return Ok(());
        }
        volume.grow(bytes).map_err(|source| VirtioError::Volume { serial: serial.to_owned(), source })?;
        self.ask(|done| Command::Resize { device, bytes, done })?;
        self.hotplug.show_capacity(serial, bytes)
    }

    /// The layered engine of a disk.
    pub fn layered(&self, serial: &str) -> Result<Arc<LayeredVolume>, VirtioError> {
        Ok(self.hotplug.layered(serial)?.volume)
    }

    /// New rate limits for a layered or an NBD disk.
    pub fn set_rate_limits(&self, serial: &str, limits: RateLimits) -> Result<(), VirtioError> {
        let (_, volume) = self.hotplug.volume(serial)?;
        if volume.set_rate_limits(limits) { Ok(()) } else { Err(VirtioError::NoLimits(serial.to_owned())) }
    }

    /// A new connection, a non-blocking stream socket, for an NBD disk.
    pub fn connect_volume(&self, serial: &str, socket: OwnedFd) -> Result<(), VirtioError> {
        let (_, volume) = self.hotplug.volume(serial)?;
        if volume.connect(socket) { Ok(()) } else { Err(VirtioError::NotNbd(serial.to_owned())) }
    }

    /// Takes in what happened to a disk; what the agent is to be told.
    pub fn note(&self, event: DiskEvent) -> Option<DiskNotice> {
        self.hotplug.note(event)
    }

    /// What an agent that comes back has to know of the disks.
    pub fn conditions(&self) -> Vec<DiskCondition> {
        self.hotplug.conditions()
    }

    /// Ends the thread once the host has finished what it works on, and makes every disk durable.
    pub fn stop(mut self) -> Result<(), VirtioError> {
        let stopped = self.ask(|done| Command::Stop { done });
        self.join()?;
        let durable = self.hotplug.close_all();
        stopped?;
        if durable { Ok(()) } else { Err(VirtioError::NotDurable) }
    }

    /// True once the thread ended, which before `stop` means that the machine cannot go on.
    pub fn ended(&self) -> bool {
        self.thread.as_ref().is_none_or(JoinHandle::is_finished)
    }

    fn ask<T>(&self, command: impl FnOnce(SyncSender<T>) -> Command) -> Result<T, VirtioError> {
        let (sender, receiver) = sync_channel(1);
        self.factory.commands.send(command(sender));
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
            let _ = self.ask(|done| Command::Stop { done });
            let _ = self.join();
        }
    }
}
