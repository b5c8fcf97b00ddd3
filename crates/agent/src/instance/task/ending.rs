//! How what runs of an instance ends, and the instance.

use std::time::Duration;

use hearth_proto::v1::RunState;
use hearth_types::StateReason;
use tokio::time::{Instant, sleep};

use super::super::restart::Next;
use super::{Goal, InstanceTask, LONGEST_PAUSE, LOOK_FOR_ANSWER, Woken, blocking, report_gone};
use crate::instance_store::{self, InstanceStoreError};
use crate::launch::VmmEnd;
use crate::state::{Hold, Phase};
use crate::storage::is_network;

/// How often the power button is pressed while a guest is to shut down: one that is still booting misses the first.
const PRESS_AGAIN: Duration = Duration::from_secs(3);

impl InstanceTask {
    /// The VMM is gone, and with it all that it had open.
    pub(super) async fn no_vmm(&mut self) {
        self.vmm = None;
        self.events = None;
        self.slots.end();
        self.host.snapshots.ended(&self.id);
        self.close_network_volumes().await;
    }

    /// Ends what serves volumes of backends to a VMM that is gone.
    async fn close_network_volumes(&self) {
        let Ok(spec) = &self.spec else { return };
        for attachment in spec.volumes.iter().filter(|attachment| is_network(&attachment.volume)) {
            // The generation keeps a later attachment safe from what goes on here.
            if let Err(error) = self.host.volumes.network().close(&attachment.volume).await {
                tracing::warn!(instance = %self.id, volume = %attachment.id, %error, "what serves a volume");
            }
        }
    }

    pub(super) async fn handle_end(&mut self, end: VmmEnd) {
        self.no_vmm().await;
        self.responded = false;
        if self.record.rebooting_to.is_some() || self.goal() != Goal::Run {
            return;
        }
        let next = self.restarts.after(end, self.started.elapsed());
        tracing::info!(instance = %self.id, ?end, ?next, "the VMM has ended");
        match next {
            Next::PowerOff => self.hold(Hold::PoweredOff).await,
            Next::Restart(delay) => {
                self.clean_up().await;
                self.publish();
                self.pause(delay).await;
            }
            Next::GiveUp => {
                let text = format!("{}: its VMM does not stay up (last: {end:?})", StateReason::INTERNAL_ERROR);
                self.hold(Hold::Failed(StateReason::new(StateReason::INTERNAL_ERROR, text))).await;
            }
        }
    }

    /// Shuts the guest down, or kills it after `grace`, or sooner if that is wanted meanwhile.
    pub(super) async fn end_vmm(&mut self, grace: Duration) {
        if self.vmm.is_none() {
            return;
        }
        let begun = Instant::now();
        let mut press = begun;
        loop {
            let desired = &self.record.desired;
            let limit = match desired.run() {
                RunState::Running => grace,
                _ if desired.force => Duration::ZERO,
                RunState::Terminated => grace.min(self.host.terminate_timeout),
                _ => grace,
            };
            let deadline = begun + limit;
            if Instant::now() >= deadline {
                break;
            }
            if Instant::now() >= press {
                press = Instant::now() + PRESS_AGAIN;
                if let Some(vmm) = &self.vmm
                    && let Err(error) = vmm.power_button().await
                {
                    tracing::warn!(instance = %self.id, %error, "the power button cannot be pressed");
                }
            }
            if let Woken::End(_) = self.wait(deadline.min(press)).await {
                return;
            }
        }
        if let Some(vmm) = &mut self.vmm {
            tracing::info!(instance = %self.id, "ending the VMM");
            self.host.step("before killing").await;
            vmm.kill().await;
            vmm.wait().await;
        }
        self.no_vmm().await;
    }

    /// Ends what runs, deletes what does not outlive a stop.
    pub(super) async fn stop(&mut self) {
        self.enter(Phase::Stopping).await;
        self.publish();
        self.end_vmm(self.host.stop_timeout).await;
        self.host.step("after the end of the VMM").await;
        self.clean_up().await;
        self.host.network.unregister(&self.id).await;
        let mut pause = Duration::from_millis(100);
        while let Err(error) = self.delete_instance_store().await {
            tracing::warn!(instance = %self.id, %error, "an instance-store disk cannot be deleted");
            sleep(pause).await;
            pause = (pause * 2).min(LONGEST_PAUSE);
        }
        self.host.admission.release(&self.id);
        self.record.rebooting_to = None;
        self.responded = false;
        self.enter(Phase::Stopped).await;
    }

    async fn delete_instance_store(&self) -> Result<(), InstanceStoreError> {
        let disks = self.spec.as_ref().map_or(0, |spec| spec.instance_store.len());
        let (host, id) = (self.host.clone(), self.id.clone());
        blocking(move || {
            (0..disks).try_for_each(|index| instance_store::delete(&host.layout.ephemeral_disk(&id, index)))
        })
        .await
    }

    /// Removes cgroup and sockets, and what served volumes of backends; goes on trying, since the next VMM needs both.
    pub(super) async fn clean_up(&mut self) {
        self.close_network_volumes().await;
        let mut pause = Duration::from_millis(100);
        while let Err(error) = self.host.launcher.clean_up(&self.id).await {
            tracing::warn!(instance = %self.id, %error, "cleaning up after a VMM");
            sleep(pause).await;
            pause = (pause * 2).min(LONGEST_PAUSE);
        }
        self.host.step("after cleaning up").await;
    }

    /// Deletes everything; `true` when nothing is left.
    pub(super) async fn terminate(&mut self) -> bool {
        self.enter(Phase::Deleting).await;
        self.publish();
        self.end_vmm(self.host.terminate_timeout).await;
        self.clean_up().await;
        self.host.network.unregister(&self.id).await;
        self.host.admission.release(&self.id);
        let (folder, gone) = (self.host.layout.instance(&self.id), self.host.layout.gone(&self.id));
        // Renamed first: a half deleted instance must not come back with half of its disks.
        let renamed = std::fs::rename(&folder, &gone);
        self.host.step("after renaming").await;
        let instances = self.host.layout.instances();
        let deleted = match renamed {
            Ok(()) => {
                blocking(move || {
                    std::fs::remove_dir_all(&gone)?;
                    crate::state::sync_dir(&instances)
                })
                .await
            }
            Err(error) => Err(error),
        };
        if let Err(error) = deleted {
            tracing::warn!(instance = %self.id, %error, "deleting the instance");
            if folder.exists() {
                sleep(LOOK_FOR_ANSWER).await;
                return false;
            }
            // What is left has a name that the next sweep knows.
        }
        report_gone(&self.host, &self.id, &self.record.desired, self.record.boot_count);
        tracing::info!(instance = %self.id, "gone");
        true
    }
}
