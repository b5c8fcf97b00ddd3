//! The loop of one instance.

mod ending;

use std::sync::Arc;
use std::time::Duration;

use hearth_proto::v1::{self, DesiredInstance, InstanceReport, ObservedState, RunState};
use hearth_types::{InstanceId, StateReason};
use hearth_vmm::control::protocol::Event;
use tokio::sync::watch;
use tokio::time::{Instant, sleep, sleep_until};

use super::restart::Restarts;
use super::start::{StartError, console_total, metadata, ready, start};
use super::volumes::Slots;
use super::{Attachment, Host, Spec};
use crate::launch::{DiskControl, DiskEvents, Found, Vmm, VmmEnd, disk_queues};
use crate::state::{Hold, InstanceRecord, Phase};
use crate::storage::Running;

/// How often a guest that has not answered yet is looked at.
const LOOK_FOR_ANSWER: Duration = Duration::from_secs(1);
/// Failed starts in a row after which an instance is reported as failed.
const MOST_START_FAILURES: u32 = 5;
/// Longest pause between tries.
const LONGEST_PAUSE: Duration = Duration::from_secs(30);

/// Newest wish for an instance. Lower generations than the newest are not sent.
pub type Wishes = watch::Receiver<DesiredInstance>;

/// What there is to do.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Goal {
    Run,
    Stop,
    Terminate,
}

/// Why waiting for something ended.
enum Woken {
    End(VmmEnd),
    Wish,
    Disk(Event),
    Time,
}

/// One instance's task.
pub struct InstanceTask {
    host: Arc<Host>,
    id: InstanceId,
    record: InstanceRecord,
    spec: Result<Spec, String>,
    wishes: Wishes,
    vmm: Option<Box<dyn Vmm>>,
    events: Option<DiskEvents>,
    slots: Slots,
    /// Volumes are not as wanted yet.
    volumes_pending: bool,
    started: Instant,
    restarts: Restarts,
    start_failures: u32,
    responded: bool,
    /// Why the next step waits, for the report.
    waiting_for: Option<String>,
}

impl InstanceTask {
    /// A task for a record that is on disk.
    pub fn new(host: Arc<Host>, record: InstanceRecord, wishes: Wishes) -> Self {
        let spec = parse(&record.desired);
        let task = Self {
            host,
            id: record.instance_id.clone(),
            record,
            spec,
            wishes,
            vmm: None,
            events: None,
            slots: Slots::default(),
            volumes_pending: false,
            started: Instant::now(),
            restarts: Restarts::default(),
            start_failures: 0,
            responded: false,
            waiting_for: None,
        };
        // Until it has looked, the record's word counts: what a full report lacks counts as lost.
        task.publish();
        task
    }

    /// Works until the instance is gone (or the task is dropped, which leaves its VMM running).
    pub async fn run(mut self) {
        self.take_wish().await;
        while let Err(error) = self.recover().await {
            tracing::warn!(instance = %self.id, error, "looking for the instance's VMM");
            sleep(LOOK_FOR_ANSWER).await;
        }
        loop {
            self.take_wish().await;
            self.publish();
            match (self.goal(), self.vmm.is_some()) {
                (Goal::Terminate, _) => {
                    if self.terminate().await {
                        return;
                    }
                }
                // A stop that has begun is finished, also by the next agent, whatever is wanted by then.
                (Goal::Run, _) if self.record.phase == Phase::Stopping => self.stop().await,
                (Goal::Run, false) => self.start().await,
                (Goal::Run, true) => self.supervise().await,
                (Goal::Stop, true) => self.stop().await,
                (Goal::Stop, false) if self.record.phase != Phase::Stopped => self.stop().await,
                (Goal::Stop, false) => {
                    if self.wishes.changed().await.is_err() {
                        return;
                    }
                }
            }
        }
    }

    fn goal(&self) -> Goal {
        let desired = &self.record.desired;
        let held = self.record.hold.as_ref().is_some_and(|(generation, _)| *generation >= desired.generation);
        match desired.run() {
            // There is no way back from half deleted.
            _ if self.record.phase == Phase::Deleting => Goal::Terminate,
            RunState::Terminated => Goal::Terminate,
            RunState::Running if !held => Goal::Run,
            RunState::Running | RunState::Stopped | RunState::Unspecified => Goal::Stop,
        }
    }

    /// Takes over the newest wish and makes it durable.
    async fn take_wish(&mut self) {
        let newest = self.wishes.borrow_and_update().clone();
        if newest.generation <= self.record.desired.generation {
            return;
        }
        let spec = parse(&newest);
        if self.record.hold.as_ref().is_some_and(|(generation, _)| *generation < newest.generation) {
            self.record.hold = None;
            self.restarts = Restarts::default();
            self.start_failures = 0;
        }
        self.record.desired = newest;
        self.spec = spec;
        self.save().await;
    }

    /// Writes the record; goes on trying when the disk is full or broken, because acting without it would forget.
    async fn save(&mut self) {
        self.host.step("before saving").await;
        let mut pause = Duration::from_millis(100);
        // Syncing a file may take seconds on a busy disk; other instances go on meanwhile.
        let write = |task: &Self| {
            let (record, layout) = (task.record.clone(), task.host.layout.clone());
            blocking(move || record.save(&layout))
        };
        while let Err(error) = write(self).await {
            tracing::error!(instance = %self.id, %error, "the instance's record cannot be written");
            sleep(pause).await;
            pause = (pause * 2).min(LONGEST_PAUSE);
        }
        self.host.step("after saving").await;
    }

    async fn enter(&mut self, phase: Phase) {
        if self.record.phase != phase {
            self.record.phase = phase;
            self.save().await;
        }
    }

    fn publish(&self) {
        let desired = &self.record.desired;
        let hold = self.record.hold.as_ref().map(|(_, hold)| hold);
        let state = match (self.record.phase, hold, self.goal()) {
            (Phase::Deleting, ..) => ObservedState::Stopping,
            (Phase::Stopped, Some(Hold::Failed(_)), Goal::Stop) => ObservedState::Failed,
            (Phase::Stopped, _, Goal::Run) | (Phase::Starting, ..) => ObservedState::Preparing,
            (Phase::Stopped, ..) => ObservedState::Stopped,
            (Phase::Running, ..) => ObservedState::Running,
            (Phase::Stopping, ..) => ObservedState::Stopping,
        };
        let reason = match (hold, &self.waiting_for) {
            (Some(Hold::Failed(reason)), _) => Some(reason.clone()),
            (Some(Hold::PoweredOff), _) => {
                let code = StateReason::INSTANCE_INITIATED_SHUTDOWN;
                Some(StateReason::new(code, format!("{code}: Instance initiated shutdown")))
            }
            (None, Some(text)) => Some(StateReason::new(StateReason::INTERNAL_ERROR, text)),
            (None, None) => None,
        };
        let progress = match state {
            ObservedState::Preparing => self.host.reports.get(&self.id).and_then(|report| report.progress),
            _ => None,
        };
        self.host.reports.publish(
            &self.id,
            InstanceReport {
                observed_generation: desired.generation,
                state: state.into(),
                reason: reason.map(|reason| v1::StateReason { code: reason.code, message: reason.message }),
                progress,
                guest_powered_off: hold == Some(&Hold::PoweredOff),
                observed_reboot_generation: self.record.observed_reboot_generation,
                guest_responded: self.responded && state == ObservedState::Running,
                boot_count: self.record.boot_count,
                volumes: self.spec.as_ref().map_or(Vec::new(), |spec| {
                    self.slots.reports(self.vmm.is_some(), self.record.phase == Phase::Stopped, &spec.volumes)
                }),
                ..InstanceReport::default()
            },
        );
    }

    /// After a start of the agent: looks what became of the VMM.
    async fn recover(&mut self) -> Result<(), String> {
        let was_running = !matches!(self.record.phase, Phase::Starting | Phase::Stopped);
        match self.host.launcher.find(&self.id, was_running).await.map_err(|error| error.to_string())? {
            Found::Running(vmm) => {
                tracing::info!(instance = %self.id, "adopted the running VMM");
                let mut vmm = vmm;
                self.events = vmm.take_events();
                let disks = vmm.disks();
                self.vmm = Some(vmm);
                if let Ok(spec) = &self.spec {
                    self.slots.adopt(&self.host.volumes, &spec.volumes, &disks).await;
                    self.volumes_pending = true;
                    let running = running(spec, disks);
                    if let Some((serial, _)) = &running.bundle_root
                        && let Err(error) = running.disks.thaw(serial, true).await
                    {
                        tracing::debug!(instance = %self.id, %error, "ending a freeze");
                    }
                    self.host.snapshots.running(&self.id, running);
                }
                self.started = Instant::now();
                if let Ok(spec) = &self.spec {
                    self.host.admission.book(&self.id, spec.resources);
                    if let Some(wire) = &self.record.desired.spec {
                        let metadata = metadata(&self.host, &self.id, spec, wire);
                        if let Err(error) = self.host.network.register(metadata).await {
                            tracing::error!(instance = %self.id, %error, "its metadata and DHCP are not answered");
                        }
                    }
                }
                if matches!(self.record.phase, Phase::Starting | Phase::Stopped) {
                    self.note_boot();
                    self.enter(Phase::Running).await;
                }
            }
            Found::Ended(end) if self.record.phase == Phase::Running => {
                let end = end.unwrap_or(VmmEnd::Died);
                tracing::info!(instance = %self.id, ?end, "the VMM has ended while no agent ran");
                self.handle_end(end).await;
            }
            Found::Ended(_) => {}
        }
        Ok(())
    }

    fn note_boot(&mut self) {
        self.record.boot_count = self.record.boot_count.saturating_add(1);
        if let Some(generation) = self.record.rebooting_to.take() {
            self.record.observed_reboot_generation = self.record.observed_reboot_generation.max(generation);
        }
    }

    /// Puts the instance on hold at the wish it has.
    async fn hold(&mut self, hold: Hold) {
        tracing::info!(instance = %self.id, ?hold, "not started again until something else is wanted");
        self.record.hold = Some((self.record.desired.generation, hold));
        self.record.rebooting_to = None;
        self.save().await;
    }

    async fn start(&mut self) {
        let spec = match &self.spec {
            Ok(spec) => spec.clone(),
            Err(error) => {
                let reason =
                    StateReason::new(StateReason::INTERNAL_ERROR, format!("the specification is wrong: {error}"));
                return self.hold(Hold::Failed(reason)).await;
            }
        };
        if let Err(short) = self.host.admission.take(&self.id, spec.resources) {
            let reason = StateReason::new(StateReason::INSUFFICIENT_CAPACITY, short);
            return self.hold(Hold::Failed(reason)).await;
        }
        if self.record.phase != Phase::Running {
            self.enter(Phase::Starting).await;
        }
        // A reboot that was asked for by now is done with by this start.
        let wanted = self.record.desired.reboot_generation;
        if wanted > self.record.observed_reboot_generation {
            self.record.rebooting_to = Some(wanted);
        }
        self.responded = false;
        self.publish();
        let (host, id) = (self.host.clone(), self.id.clone());
        let ready = {
            let made = self.record.volumes_made.clone();
            let waiting = ready(&host, &id, &spec, &made);
            tokio::pin!(waiting);
            loop {
                tokio::select! {
                    ready = &mut waiting => break Some(ready),
                    changed = self.wishes.changed() => {
                        self.take_wish().await;
                        if changed.is_err() || self.goal() != Goal::Run {
                            break None;
                        }
                        self.publish();
                    }
                }
            }
        };
        let started = match ready {
            None => return,
            Some(Err(error)) => Err(error),
            Some(Ok(ready)) => {
                let wire = self.record.desired.spec.clone().unwrap_or_default();
                start(&host, &id, &spec, &wire, self.record.slot, ready).await
            }
        };
        match started {
            Ok(mut started) => {
                self.events = started.vmm.take_events();
                self.host.snapshots.running(&self.id, running(&spec, started.vmm.disks()));
                self.vmm = Some(started.vmm);
                self.slots.begin(started.slots);
                self.volumes_pending = true;
                self.started = Instant::now();
                self.start_failures = 0;
                self.waiting_for = None;
                self.record.console_start = started.console_start;
                self.note_boot();
                self.record.phase = Phase::Running;
                self.record.volumes_made = self.slots.made();
                self.save().await;
                tracing::info!(instance = %self.id, boot_count = self.record.boot_count, "the guest runs");
            }
            Err(error) => self.start_failed(error).await,
        }
    }

    async fn start_failed(&mut self, error: StartError) {
        let message = match error {
            StartError::Permanent(reason) => {
                self.clean_up().await;
                return self.hold(Hold::Failed(reason)).await;
            }
            StartError::Unbootable(why) => {
                self.clean_up().await;
                return self.hold(Hold::Failed(self.unbootable(&why))).await;
            }
            StartError::Waiting(reason) => reason,
            StartError::Transient(message) => {
                self.start_failures += 1;
                tracing::warn!(instance = %self.id, message, failures = self.start_failures, "starting the instance failed");
                self.clean_up().await;
                if self.start_failures >= MOST_START_FAILURES {
                    return self.hold(Hold::Failed(StateReason::new(StateReason::INTERNAL_ERROR, message))).await;
                }
                message
            }
        };
        self.waiting_for = Some(message);
        self.publish();
        let pause = Duration::from_secs(1u64 << self.start_failures.min(5)).min(LONGEST_PAUSE);
        self.pause(pause).await;
        self.waiting_for = None;
    }

    /// The image is to blame for a first start; afterwards, what the guest did to its root volume.
    fn unbootable(&self, why: &str) -> StateReason {
        match self.record.boot_count {
            0 => StateReason::new(StateReason::INVALID_IMAGE, why),
            _ => StateReason::new(
                StateReason::CLIENT_INTERNAL_ERROR,
                format!("the root volume, which has booted before, does not boot any more: {why}"),
            ),
        }
    }

    /// Waits, but not longer than until something else is wanted.
    async fn pause(&mut self, time: Duration) {
        let until = Instant::now() + time;
        while let Woken::Wish = self.wait(until).await {
            if self.goal() != Goal::Run {
                return;
            }
        }
    }

    /// Waits for the VMM's end, a new wish (which is taken), or the time.
    async fn wait(&mut self, until: Instant) -> Woken {
        let woken = {
            let vmm = &mut self.vmm;
            let end = async {
                match vmm {
                    Some(vmm) => vmm.wait().await,
                    None => std::future::pending().await,
                }
            };
            tokio::select! {
                end = end => Woken::End(end),
                changed = self.wishes.changed() => match changed {
                    Ok(()) => Woken::Wish,
                    // Nobody will wish any more: the agent ends.
                    Err(_) => std::future::pending().await,
                },
                event = next_event(&mut self.events) => Woken::Disk(event),
                () = sleep_until(until) => Woken::Time,
            }
        };
        match &woken {
            Woken::End(_) => self.no_vmm().await,
            Woken::Disk(event) => {
                self.slots.hear(event);
                self.volumes_pending = true;
                self.publish();
            }
            Woken::Wish => {
                self.take_wish().await;
                self.publish();
            }
            Woken::Time => {}
        }
        woken
    }

    /// Watches a running guest until something has to be done.
    async fn supervise(&mut self) {
        while self.goal() == Goal::Run {
            if self.record.desired.reboot_generation > self.record.observed_reboot_generation {
                return self.reboot().await;
            }
            if self.volumes_pending {
                self.approach_volumes().await;
            }
            let quiet = self.responded && !self.volumes_pending;
            let until = if quiet { Duration::from_secs(3600) } else { LOOK_FOR_ANSWER };
            match self.wait(Instant::now() + until).await {
                Woken::End(end) => return self.handle_end(end).await,
                Woken::Wish => self.volumes_pending = true,
                Woken::Disk(_) => {}
                Woken::Time if !self.responded => self.look_for_answer(),
                Woken::Time => {}
            }
        }
    }

    /// Attaches, detaches and changes volumes of the running guest.
    async fn approach_volumes(&mut self) {
        let (Some(vmm), Ok(spec)) = (&self.vmm, &self.spec) else { return };
        let disks = vmm.disks();
        let queues = disk_queues(spec.vcpus);
        let (volumes, snapshots) = (&self.host.volumes, &self.host.snapshots);
        let is_root = |slot: &Attachment| spec.is_root(slot);
        self.volumes_pending = self.slots.approach(&spec.volumes, volumes, snapshots, &disks, queues, is_root).await;
        let made = self.slots.made();
        if self.record.volumes_made != made {
            self.record.volumes_made = made;
            self.save().await;
        }
        self.publish();
    }

    fn look_for_answer(&mut self) {
        let console = std::fs::File::open(self.host.layout.console_ring(&self.id)).ok();
        let wrote =
            console.and_then(|ring| console_total(&ring)).is_some_and(|total| total > self.record.console_start);
        if wrote || self.host.network.has_lease(&self.id) {
            self.responded = true;
            self.publish();
        }
    }

    /// The power button (a guest powers off by it), then a fresh VMM.
    async fn reboot(&mut self) {
        self.record.rebooting_to = Some(self.record.desired.reboot_generation);
        self.save().await;
        tracing::info!(instance = %self.id, "rebooting");
        self.end_vmm(self.host.stop_timeout).await;
    }
}

/// The next thing that a VMM tells of its disks.
async fn next_event(events: &mut Option<DiskEvents>) -> Event {
    match events {
        Some(receiver) => match receiver.recv().await {
            Some(event) => event,
            // The connection is over, and the VMM with it: that is noticed by its end.
            None => std::future::pending().await,
        },
        None => std::future::pending().await,
    }
}

/// Runs file work off the runtime's own threads.
async fn blocking<T: Send + 'static>(work: impl FnOnce() -> T + Send + 'static) -> T {
    match tokio::task::spawn_blocking(work).await {
        Ok(result) => result,
        // The runtime ends, and this task with it.
        Err(_) => std::future::pending().await,
    }
}

/// A running VMM as snapshots and bundles need to know it.
fn running(spec: &Spec, disks: Arc<dyn DiskControl>) -> Running {
    let bundle_root = spec.bundle_root.as_ref().map(|bundle| (bundle.serial.clone(), bundle.size_bytes));
    Running { disks, bundle_root }
}

fn parse(desired: &DesiredInstance) -> Result<Spec, String> {
    Spec::parse(desired.spec.as_ref().ok_or("it is missing")?)
}

/// Reports that nothing of an instance is here.
pub fn report_gone(host: &Host, id: &InstanceId, desired: &DesiredInstance, boot_count: u32) {
    host.reports.publish(
        id,
        InstanceReport {
            observed_generation: desired.generation,
            state: ObservedState::Gone.into(),
            observed_reboot_generation: desired.reboot_generation,
            boot_count,
            ..InstanceReport::default()
        },
    );
}
