//! The session: desired state down, reports up.

use std::collections::HashSet;
use std::sync::Arc;
use std::time::Duration;

use hearth_proto::v1::{
    AgentHello, AgentMessage, ConsoleOutputReport, ControlMessage, DesiredHost, DesiredVolume, Heartbeat,
    OpenConsoleCommand, agent_message, control_message,
};
use hearth_types::InstanceId;
use tokio::sync::mpsc;
use tokio::time::MissedTickBehavior;
use tokio_stream::wrappers::ReceiverStream;

use super::{Connection, Link, LinkError, console};
use crate::epoch::Epoch;
use crate::instance::Host;
use crate::reports::AnyReport;
use crate::storage::Keyring;
use crate::supervisor::Supervisor;

/// How often the control plane hears from a quiet agent.
const HEARTBEAT: Duration = Duration::from_secs(5);
/// Messages that wait to be sent.
const QUEUE: usize = 64;

/// What a host says of itself at the start of each session.
#[derive(Clone, Debug)]
pub struct Announcement(pub AgentHello);

/// One session after the other with the control plane.
pub struct Session {
    /// The instances.
    pub supervisor: Arc<Supervisor>,
    /// What they share.
    pub host: Arc<Host>,
    /// Terms that have been obeyed.
    pub epoch: Arc<Epoch>,
    /// Who we are.
    pub announcement: Announcement,
    /// For calls beside the session.
    pub link: Arc<Link>,
}

impl Session {
    /// Runs one session until it ends; the error says why.
    pub async fn run(&self, connection: Connection) -> LinkError {
        let mut client = connection.agent();
        let (out, messages) = mpsc::channel(QUEUE);
        let mut reports = self.host.reports.watch();
        let hello = AgentHello { highest_term: self.epoch.highest_term(), ..self.announcement.0.clone() };
        let full = self.host.reports.full();
        let mut sent = full.sequence;
        for message in [agent_message::Message::Hello(hello), agent_message::Message::FullReport(full)] {
            if send(&out, message).await.is_err() {
                return LinkError::Ended("the queue is closed".into());
            }
        }
        let mut inbound = match client.session(ReceiverStream::new(messages)).await {
            Ok(answer) => answer.into_inner(),
            Err(status) => return LinkError::status(&status),
        };
        self.link.set(Some(connection));
        tracing::info!("the session with the control plane is up");
        let mut heartbeat = tokio::time::interval(HEARTBEAT);
        heartbeat.set_missed_tick_behavior(MissedTickBehavior::Delay);
        loop {
            let message = tokio::select! {
                message = inbound.message() => match message {
                    Ok(Some(message)) => {
                        if let Err(error) = self.obey(message, &out).await {
                            return error;
                        }
                        continue;
                    }
                    Ok(None) => return LinkError::Ended("closed by the control plane".into()),
                    Err(status) => return LinkError::status(&status),
                },
                _ = heartbeat.tick() => vec![agent_message::Message::Heartbeat(Heartbeat { sequence: sent })],
                _ = reports.changed() => self.news(&mut sent),
            };
            for message in message {
                if send(&out, message).await.is_err() {
                    return LinkError::Ended("the connection is gone".into());
                }
            }
        }
    }

    fn news(&self, sent: &mut u64) -> Vec<agent_message::Message> {
        let (last, reports) = self.host.reports.after(*sent);
        *sent = last;
        let message = |report| match report {
            AnyReport::Instance(report) => agent_message::Message::Report(report),
            AnyReport::Volume(report) => agent_message::Message::Volume(report),
            AnyReport::Snapshot(report) => agent_message::Message::Snapshot(report),
            AnyReport::Bundle(report) => agent_message::Message::Bundle(report),
            AnyReport::Fill(report) => agent_message::Message::Fill(report),
        };
        reports.into_iter().map(message).collect()
    }

    async fn obey(&self, message: ControlMessage, out: &mpsc::Sender<AgentMessage>) -> Result<(), LinkError> {
        let known = self.epoch.highest_term();
        if message.term < known {
            return Err(LinkError::Ended(format!("its term {} is over, {known} has been obeyed", message.term)));
        }
        // On disk before anything of that term is done.
        let epoch = self.epoch.clone();
        let kept = blocking(move || epoch.obey(message.term)).await?;
        kept.map_err(|error| LinkError::Ended(format!("its term cannot be kept: {error}")))?;
        let supervisor = self.supervisor.clone();
        match message.message {
            Some(control_message::Message::Desired(mut desired)) => {
                self.keyring().take_host(&mut desired);
                self.apply_storage(&mut desired);
                blocking(move || supervisor.apply_host(desired)).await?
            }
            Some(control_message::Message::Instance(mut instance)) => {
                self.keyring().take_instance(&mut instance);
                blocking(move || supervisor.apply(instance)).await?
            }
            Some(control_message::Message::Volume(mut volume)) => {
                self.keyring().take_volume(&mut volume);
                self.host.snapshots.leave(volume);
            }
            Some(control_message::Message::SnapshotSet(mut set)) => {
                self.keyring().take_set(&mut set);
                self.host.snapshots.make(set);
            }
            Some(control_message::Message::CancelSnapshotSet(set)) => self.host.snapshots.cancel(&set.set_id),
            Some(control_message::Message::Bundle(bundle)) => self.host.snapshots.bundle(bundle),
            Some(control_message::Message::CancelBundle(bundle)) => {
                self.host.snapshots.keep_bundles(|id| id != bundle.bundle_id);
            }
            Some(control_message::Message::Fills(mut fills)) => {
                self.keyring().take_fills(&mut fills);
                self.host.fills.want(fills.snapshots);
            }
            Some(control_message::Message::GetConsoleOutput(command)) => {
                let report = self.console_output(command.request_id, &command.instance_id);
                // If it cannot be sent the session ends, which is noticed elsewhere.
                let _ = send(out, agent_message::Message::ConsoleOutput(report)).await;
            }
            Some(control_message::Message::OpenConsole(command)) => self.open_console(command),
            Some(control_message::Message::ReportAll(_)) => {
                let full = self.host.reports.full();
                let _ = send(out, agent_message::Message::FullReport(full)).await;
            }
            // A newer control plane; what it wants shows in desired state.
            None => tracing::warn!("the control plane sent a message that this agent does not know"),
        }
        Ok(())
    }

    fn keyring(&self) -> &Keyring {
        self.host.volumes.bases().keyring()
    }

    /// Takes over what is to become of volumes and snapshots.
    fn apply_storage(&self, desired: &mut DesiredHost) {
        let (volumes, sets) = (std::mem::take(&mut desired.volumes), std::mem::take(&mut desired.snapshot_sets));
        let of_volume = |volume: &DesiredVolume| volume.volume.as_ref().map(|volume| volume.volume_id.clone());
        let named: HashSet<String> = volumes.iter().filter_map(of_volume).collect();
        let snapshots: HashSet<String> =
            sets.iter().flat_map(|set| &set.snapshots).map(|wanted| wanted.snapshot_id.clone()).collect();
        self.host.reports.forget_others(|id| named.contains(id), |id| snapshots.contains(id));
        let named: HashSet<String> = sets.iter().map(|set| set.set_id.clone()).collect();
        self.host.snapshots.keep(|id| named.contains(id));
        let bundles = std::mem::take(&mut desired.bundles);
        let named: HashSet<String> = bundles.iter().map(|bundle| bundle.bundle_id.clone()).collect();
        self.host.snapshots.keep_bundles(|id| named.contains(id));
        bundles.into_iter().for_each(|bundle| self.host.snapshots.bundle(bundle));
        self.host.fills.want(desired.fills.take().unwrap_or_default().snapshots);
        sets.into_iter().for_each(|set| self.host.snapshots.make(set));
        volumes.into_iter().for_each(|volume| self.host.snapshots.leave(volume));
    }

    /// The id of an instance that is here.
    fn known(&self, id: &str) -> Result<InstanceId, String> {
        let id: InstanceId = id.parse().map_err(|error: hearth_types::id::IdError| error.to_string())?;
        if self.supervisor.knows(&id) { Ok(id) } else { Err(format!("{id} is not on this host")) }
    }

    fn console_output(&self, request_id: u64, id: &str) -> ConsoleOutputReport {
        match self.known(id).and_then(|id| console::output(&self.host.layout.console_ring(&id))) {
            Ok(output) => ConsoleOutputReport { request_id, output: output.into(), error: String::new() },
            Err(error) => ConsoleOutputReport { request_id, error, ..ConsoleOutputReport::default() },
        }
    }

    fn open_console(&self, command: OpenConsoleCommand) {
        let Some(client) = self.link.client() else { return };
        // An instance that is not here has no socket, and the relay says so.
        let socket = match self.known(&command.instance_id) {
            Ok(id) => self.host.layout.console_socket(&id),
            Err(_) => self.host.layout.run_root().join("none"),
        };
        tokio::spawn(async move { console::relay(client, command.session_id, &socket).await });
    }
}

/// Runs file work off the runtime's own threads.
async fn blocking<T: Send + 'static>(work: impl FnOnce() -> T + Send + 'static) -> Result<T, LinkError> {
    tokio::task::spawn_blocking(work).await.map_err(|error| LinkError::Ended(error.to_string()))
}

async fn send(out: &mpsc::Sender<AgentMessage>, message: agent_message::Message) -> Result<(), ()> {
    out.send(AgentMessage { message: Some(message) }).await.map_err(|_| ())
}
