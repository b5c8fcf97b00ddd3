//! Sessions of agents: desired state down, reports up. One per host, the newest wins. Reports are read first and desired state is
//! sent afterwards, so that what a full report lacks was really not there before this session asked for it.

use std::collections::{BTreeMap, HashMap, HashSet};
use std::sync::Arc;
use std::time::Duration;

use futures::StreamExt;
use hearth_proto::record::v1 as rec;
use hearth_proto::v1;
use hearth_store::Txn;
use hearth_types::HostId;
use ipnet::Ipv4Net;
use tokio::sync::{Notify, mpsc, oneshot};
use tokio_stream::wrappers::ReceiverStream;
use tokio_util::sync::CancellationToken;
use tonic::{Code, Status, Streaming};
use v1::agent_message::Message as Up;
use v1::control_message::Message as Down;

use super::{bundle, fast_restore, reports, snapshot_set, volume_reports};
use crate::api_error::{ApiError, ApiResult};
use crate::check;
use crate::clock;
use crate::core::{Core, encode};
use crate::keys;
use crate::life::{self, Origin};
use crate::live::{COMMAND_QUEUE, SessionHandle};
use crate::tables::{SCHEMA_VERSION, Tables};

const HELLO_TIMEOUT: Duration = Duration::from_secs(30);
/// How long desired state waits for the first full report.
const FULL_REPORT_TIMEOUT: Duration = Duration::from_secs(5);
/// Reports of a full report that are written at the same time.
const PARALLEL_REPORTS: usize = 32;
/// Most instances in a full report.
const MAX_INSTANCES: usize = 20_000;
const MAX_TEXT_CHARS: usize = 255;
/// Most volume backends of a host.
const MAX_BACKENDS: usize = 64;
/// Messages on the way to an agent.
const OUT_QUEUE: usize = 16;

type Out = mpsc::Sender<Result<v1::ControlMessage, Status>>;

/// Takes the hello, registers the session and lets it run by itself.
pub(crate) async fn open(
    core: Arc<Core>,
    host: HostId,
    mut messages: Streaming<v1::AgentMessage>,
) -> ApiResult<ReceiverStream<Result<v1::ControlMessage, Status>>> {
    let first = tokio::time::timeout(HELLO_TIMEOUT, messages.message()).await;
    let Ok(Ok(Some(v1::AgentMessage { message: Some(Up::Hello(hello)) }))) = first else {
        return Err(ApiError::invalid("hello", "must be the first message of a session"));
    };
    let host = host.to_string();
    check_hello(&core, &host, &hello)?;
    let (commands_in, commands) = mpsc::channel(COMMAND_QUEUE);
    let end = CancellationToken::new();
    let epoch = hello.agent_epoch;
    let (handle, kick) = core.live.open(&host, epoch, commands_in, end.clone()).map_err(|later| {
        let message = format!("epoch {epoch} of the agent is over, epoch {later} has a session");
        ApiError::new(Code::FailedPrecondition, "OutdatedAgent", message).with("agent_epoch", later)
    })?;
    let registered = Registered { core: core.clone(), host: host.clone(), number: handle.number };
    write_hello(&core, &host, &hello, &end).await?;
    core.host_changed(&host);
    tracing::info!(host, session = handle.number, epoch = hello.agent_epoch, boot_id = hello.boot_id, "session begins");
    let (out, stream) = mpsc::channel(OUT_QUEUE);
    let (ready, is_ready) = oneshot::channel();
    let sender = Sender {
        core: core.clone(),
        host: host.clone(),
        out,
        sent: HashMap::new(),
        sent_volumes: HashMap::new(),
        sent_sets: HashSet::new(),
        sent_bundles: HashSet::new(),
        sent_fills: Vec::new(),
    };
    core.tasks.spawn(sender.run(commands, kick, is_ready, end.clone()));
    let tasks = core.tasks.clone();
    let receiver = Receiver { core, host, epoch: hello.agent_epoch, handle, ready: Some(ready), registered };
    tasks.spawn(receiver.run(messages, end));
    Ok(ReceiverStream::new(stream))
}

fn check_hello(core: &Core, host: &str, hello: &v1::AgentHello) -> ApiResult<()> {
    if hello.host_id != host {
        return Err(ApiError::unauthorized(format!(
            "the certificate is that of host {host}, not of {:.40}",
            hello.host_id
        )));
    }
    if hello.highest_term > core.term() {
        let message = format!(
            "the agent has obeyed term {}, this control plane has term {}: another one leads",
            hello.highest_term,
            core.term()
        );
        return Err(ApiError::new(Code::FailedPrecondition, "OutdatedLeader", message).with("term", core.term()));
    }
    let texts = [
        ("boot_id", &hello.boot_id),
        ("agent_version", &hello.agent_version),
        ("kernel_version", &hello.kernel_version),
        ("availability_zone", &hello.availability_zone),
    ];
    for (field, text) in texts {
        check::text(field, text, MAX_TEXT_CHARS)?;
    }
    if hello.volume_backends.len() > MAX_BACKENDS {
        return Err(ApiError::invalid("volume_backends", format!("has more than {MAX_BACKENDS} names")));
    }
    hello.volume_backends.iter().try_for_each(|name| check::text("volume_backends", name, MAX_TEXT_CHARS))?;
    if hello.boot_id.is_empty() {
        return Err(ApiError::missing("boot_id"));
    }
    if hello.capacity.is_none() {
        return Err(ApiError::missing("capacity"));
    }
    hello.instance_cidr.parse::<Ipv4Net>().map_err(|_| {
        ApiError::invalid("instance_cidr", format!("'{:.40}' is not an IPv4 network", hello.instance_cidr))
    })?;
    check::tags(&hello.labels).map_err(|error| ApiError::invalid("labels", error.to_string()))
}

/// Notes what the host says of itself, unless its next session has begun meanwhile: that one has the last word.
async fn write_hello(core: &Core, host: &str, hello: &v1::AgentHello, end: &CancellationToken) -> ApiResult<()> {
    let status = rec::HostStatus {
        schema_version: SCHEMA_VERSION,
        connected: true,
        last_seen_ms: clock::now_ms(),
        boot_id: hello.boot_id.clone(),
        agent_epoch: hello.agent_epoch,
        agent_version: hello.agent_version.clone(),
        kernel_version: hello.kernel_version.clone(),
        capacity: hello.capacity,
        vcpu_overcommit_percent: hello.vcpu_overcommit_percent,
        availability_zone: hello.availability_zone.clone(),
        instance_cidr: hello.instance_cidr.clone(),
        labels: hello.labels.clone(),
        volume_backends: hello.volume_backends.clone(),
    };
    if let Some((_, Some(known))) = core.tables().host(host) {
        if known.boot_id != hello.boot_id {
            tracing::warn!(
                host,
                before = known.boot_id,
                now = hello.boot_id,
                "the host has rebooted; its VMMs are gone"
            );
        }
        if known.agent_epoch > hello.agent_epoch {
            tracing::warn!(
                host,
                before = known.agent_epoch,
                now = hello.agent_epoch,
                "the agent's state is an older copy"
            );
        }
    }
    let key = keys::host_status(host);
    core.update(|tables| {
        if end.is_cancelled() {
            return Err(ApiError::unavailable("a newer session of the host has taken its place"));
        }
        let Some((_, known)) = tables.host(host) else {
            return Err(ApiError::unauthorized(format!("host {host} has been removed; join it again")));
        };
        let txn = Txn::new()
            .compare_exists(keys::host_spec(host))
            .compare_mod_revision(&key, known.map_or(0, |known| known.revision))
            .put(&key, encode(&status));
        Ok((Some(txn), ()))
    })
    .await
}

/// Unregisters the session when it is dropped, however it ended.
struct Registered {
    core: Arc<Core>,
    host: String,
    number: u64,
}

impl Drop for Registered {
    fn drop(&mut self) {
        if !self.core.live.close(&self.host, self.number) {
            return;
        }
        self.core.host_changed(&self.host);
        // When the whole program ends there is nothing left that could run it, and the next start finds out by itself.
        let Ok(runtime) = tokio::runtime::Handle::try_current() else { return };
        let (core, host) = (self.core.clone(), self.host.clone());
        self.core.tasks.spawn_on(async move { disconnected(&core, &host).await }, &runtime);
    }
}

/// Notes in the store that a host is gone, and in the books when it has been gone for too long.
async fn disconnected(core: &Arc<Core>, host: &str) {
    let noted = core
        .update(|tables| {
            let Some((_, Some(status))) = tables.host(host) else { return Ok((None, ())) };
            if core.live.connected(host) {
                return Ok((None, ()));
            }
            let new = rec::HostStatus {
                connected: false,
                last_seen_ms: core.live.last_seen_ms(host),
                ..(*status.value).clone()
            };
            let key = keys::host_status(host);
            Ok((Some(Txn::new().compare_mod_revision(&key, status.revision).put(&key, encode(&new))), ()))
        })
        .await;
    if let Err(error) = noted {
        tracing::debug!(host, %error, "the end of a session could not be noted");
    }
    tokio::select! {
        () = tokio::time::sleep(core.config.host_timeout + Duration::from_millis(10)) => {}
        () = core.stop.cancelled() => return,
    }
    if !core.live.is_up(host) && core.tables().host(host).is_some() {
        tracing::warn!(
            host,
            "the host has not come back; it takes no new instances, those on it are impaired and stay there"
        );
        core.host_changed(host);
    }
}

/// What a host should have and has not been told: of each instance the generation, and the rest where that is not in `sent`.
/// Terminated instances are in it until the host has reported them gone.
fn desired_instances(
    tables: &Tables,
    host: &str,
    sent: &HashMap<String, u64>,
) -> (HashMap<String, u64>, Vec<v1::DesiredInstance>) {
    let mut generations = HashMap::new();
    let mut news = Vec::new();
    for id in tables.instances_on.get(host).into_iter().flatten() {
        let Some((spec, status)) = tables.instance(id) else { continue };
        if life::state_of(&spec, status.as_deref()).is_final() {
            continue;
        }
        if sent.get(id) != Some(&spec.generation) {
            news.push(life::desired(&spec));
        }
        generations.insert(id.clone(), spec.generation);
    }
    for (id, eviction) in tables.evictions.get(host).into_iter().flatten() {
        if sent.get(id) != Some(&eviction.generation) {
            news.push(reports::evicted(id, eviction));
        }
        generations.insert(id.clone(), eviction.generation);
    }
    (generations, news)
}

/// The downward half.
struct Sender {
    core: Arc<Core>,
    host: String,
    out: Out,
    /// Generation that the agent has been told, by instance.
    sent: HashMap<String, u64>,
    /// The same of volumes that are to leave.
    sent_volumes: HashMap<String, u64>,
    /// Snapshot sets that it has been told of.
    sent_sets: HashSet<String>,
    /// Bundles that it has been told of.
    sent_bundles: HashSet<String>,
    /// Snapshots that it is to have whole, as it has been told.
    sent_fills: Vec<v1::BaseSnapshot>,
}

/// Volumes that are to leave a host, or to be made at their backend.
fn leaving<'a>(tables: &'a Tables, host: &str) -> impl Iterator<Item = &'a rec::VolumeSpec> {
    // What is being uploaded of a volume is read from its files.
    let being_made = tables.snapshots.values().filter(|entry| snapshot_set::is_being_made(entry.status.as_deref()));
    let needed: HashSet<&str> = being_made
        .filter_map(|entry| entry.spec.as_ref().filter(|spec| spec.host_id == host))
        .map(|spec| spec.volume_id.as_str())
        .collect();
    let here = tables.volumes_on.get(host).into_iter().flatten();
    here.filter_map(|id| tables.volumes.get(id)).map(|spec| &*spec.value).filter(move |spec| {
        (spec.deleting || spec.releasing || spec.creating) && !needed.contains(spec.volume_id.as_str())
    })
}

/// Snapshots that a host makes, by set.
fn snapshot_sets<'a>(tables: &'a Tables, host: &str) -> BTreeMap<&'a str, Vec<&'a rec::SnapshotSpec>> {
    let mut sets: BTreeMap<&str, Vec<&rec::SnapshotSpec>> = BTreeMap::new();
    for entry in tables.snapshots.values() {
        let Some(spec) = entry.spec.as_ref().filter(|spec| spec.host_id == host) else { continue };
        if snapshot_set::is_being_made(entry.status.as_deref()) {
            sets.entry(&spec.set_id).or_default().push(spec);
        }
    }
    sets
}

impl Sender {
    async fn run(
        mut self,
        mut commands: mpsc::Receiver<Down>,
        kick: Arc<Notify>,
        ready: oneshot::Receiver<()>,
        end: CancellationToken,
    ) {
        let (core, out) = (self.core.clone(), self.out.clone());
        tokio::select! {
            () = end.cancelled() => {}
            () = core.stop.cancelled() => {}
            () = out.closed() => {}
            () = self.pump(&mut commands, &kick, ready) => {}
        }
        // Ends the receiving half too.
        end.cancel();
        let _ = out.try_send(Err(ApiError::unavailable("this session has ended; open a new one").into()));
    }

    async fn pump(&mut self, commands: &mut mpsc::Receiver<Down>, kick: &Notify, ready: oneshot::Receiver<()>) {
        // A closed channel means that the other half ended.
        let _ = tokio::time::timeout(FULL_REPORT_TIMEOUT, ready).await;
        let news = self.take_news();
        let desired = v1::DesiredHost {
            instances: news.instances,
            volumes: news.volumes,
            snapshot_sets: news.sets,
            bundles: news.bundles,
            fills: news.fills,
        };
        if !self.send(Down::Desired(desired)).await {
            return;
        }
        loop {
            let alive = tokio::select! {
                command = commands.recv() => match command {
                    Some(command) => self.send(command).await,
                    None => false,
                },
                () = kick.notified() => self.send_changes().await,
            };
            if !alive {
                return;
            }
        }
    }

    /// What has changed since the last look.
    fn take_news(&mut self) -> News {
        let tables = self.core.tables();
        let storage = &self.core.storage;
        let (generations, mut instances) = desired_instances(&tables, &self.host, &self.sent);
        self.sent = generations;
        instances.iter_mut().for_each(|desired| storage.complete_instance(desired));
        let mut volumes = Vec::new();
        let mut generations = HashMap::new();
        for spec in leaving(&tables, &self.host) {
            if self.sent_volumes.get(&spec.volume_id) != Some(&spec.generation) {
                volumes.push(storage.desired_volume(spec));
            }
            generations.insert(spec.volume_id.clone(), spec.generation);
        }
        self.sent_volumes = generations;
        let wanted = snapshot_sets(&tables, &self.host);
        let sets =
            wanted.iter().filter(|(id, _)| !self.sent_sets.contains(**id)).map(|(id, specs)| v1::DesiredSnapshotSet {
                set_id: (*id).to_owned(),
                instance_id: specs.first().map(|spec| spec.instance_id.clone()).unwrap_or_default(),
                snapshots: specs.iter().map(|spec| storage.desired_snapshot(spec)).collect(),
            });
        let sets = sets.collect();
        let cancelled = self.sent_sets.iter().filter(|id| !wanted.contains_key(id.as_str())).cloned().collect();
        self.sent_sets = wanted.keys().map(|id| (*id).to_owned()).collect();
        let mut bundles: Vec<v1::DesiredBundle> = bundle::desired(&tables, &self.host).collect();
        let wanted: HashSet<String> = bundles.iter().map(|bundle| bundle.bundle_id.clone()).collect();
        let cancelled_bundles = self.sent_bundles.iter().filter(|id| !wanted.contains(*id)).cloned().collect();
        bundles.retain(|bundle| !self.sent_bundles.contains(&bundle.bundle_id));
        self.sent_bundles = wanted;
        let wanted = fast_restore::desired(&tables, &self.host);
        let fills = (wanted != self.sent_fills).then(|| storage.desired_fills(&wanted));
        self.sent_fills = wanted;
        News { instances, volumes, sets, cancelled, bundles, cancelled_bundles, fills }
    }

    async fn send_changes(&mut self) -> bool {
        let news = self.take_news();
        let instances = news.instances.into_iter().map(Down::Instance);
        let volumes = news.volumes.into_iter().map(Down::Volume);
        let sets = news.sets.into_iter().map(Down::SnapshotSet);
        let cancelled = news.cancelled.into_iter();
        let cancelled = cancelled.map(|set_id| Down::CancelSnapshotSet(v1::CancelSnapshotSet { set_id }));
        let bundles = news.bundles.into_iter().map(Down::Bundle);
        let called_off = news.cancelled_bundles.into_iter();
        let called_off = called_off.map(|bundle_id| Down::CancelBundle(v1::CancelBundle { bundle_id }));
        let fills = news.fills.into_iter().map(Down::Fills);
        let rest = bundles.chain(called_off).chain(fills);
        for message in sets.chain(cancelled).chain(instances).chain(volumes).chain(rest) {
            if !self.send(message).await {
                return false;
            }
        }
        true
    }

    async fn send(&self, message: Down) -> bool {
        let message = v1::ControlMessage { term: self.core.term(), message: Some(message) };
        self.out.send(Ok(message)).await.is_ok()
    }
}

/// What an agent has not been told yet.
struct News {
    instances: Vec<v1::DesiredInstance>,
    volumes: Vec<v1::DesiredVolume>,
    sets: Vec<v1::DesiredSnapshotSet>,
    /// Sets that it need not go on with.
    cancelled: Vec<String>,
    bundles: Vec<v1::DesiredBundle>,
    cancelled_bundles: Vec<String>,
    /// All that it is to have whole, when that has changed.
    fills: Option<v1::DesiredFills>,
}

/// The upward half.
struct Receiver {
    core: Arc<Core>,
    host: String,
    epoch: u64,
    handle: SessionHandle,
    /// Told when the first full report has been worked in.
    ready: Option<oneshot::Sender<()>>,
    registered: Registered,
}

impl Receiver {
    async fn run(mut self, mut messages: Streaming<v1::AgentMessage>, end: CancellationToken) {
        let why = loop {
            let message = tokio::select! {
                () = end.cancelled() => break "a newer session, or the end of the stream".to_owned(),
                message = tokio::time::timeout(self.core.config.session_timeout, messages.message()) => message,
            };
            match message {
                Err(_) => break "silence".to_owned(),
                Ok(Ok(None)) => break "the agent ended it".to_owned(),
                Ok(Err(status)) => break status.message().to_owned(),
                Ok(Ok(Some(message))) => {
                    self.core.live.seen(&self.host);
                    if let Some(message) = message.message {
                        self.handle_message(message).await;
                    }
                }
            }
        };
        end.cancel();
        tracing::info!(host = self.host, session = self.registered.number, why, "session ends");
    }

    async fn handle_message(&mut self, message: Up) {
        match message {
            Up::Hello(_) => tracing::warn!(host = self.host, "a second hello in one session is ignored"),
            Up::Heartbeat(_) => {}
            Up::Report(report) => self.take(report).await,
            Up::FullReport(report) => self.take_all(report).await,
            Up::Volume(report) => self.take_volume(report).await,
            Up::Snapshot(report) => self.take_snapshot(report).await,
            Up::Bundle(report) => self.take_bundle(report).await,
            Up::Fill(report) => self.take_fill(report),
            Up::ConsoleOutput(report) => self.core.consoles.answer(&self.host, report),
        }
    }

    fn origin(&self) -> Origin<'_> {
        Origin { host_id: &self.host, agent_epoch: self.epoch, now_ms: clock::now_ms() }
    }

    async fn take(&self, report: v1::InstanceReport) {
        match reports::apply(&self.core, self.origin(), &report).await {
            Ok(None) => {}
            Ok(Some(command)) => {
                let mut command = command;
                self.core.storage.complete_instance(&mut command);
                // A session whose queue is full gets it with its next snapshot.
                let _ = self.handle.commands.try_send(Down::Instance(command));
            }
            Err(error) => {
                tracing::warn!(host = self.host, instance = report.instance_id, %error, "a report could not be worked in")
            }
        }
    }

    async fn take_volume(&self, report: v1::VolumeReport) {
        let volume = report.volume_id.clone();
        if let Err(error) = volume_reports::apply_volume(&self.core, &self.host, report).await {
            tracing::warn!(host = self.host, volume, %error, "a report could not be worked in");
        }
    }

    async fn take_snapshot(&self, report: v1::SnapshotReport) {
        let snapshot = report.snapshot_id.clone();
        if let Err(error) = volume_reports::apply_snapshot(&self.core, &self.host, report).await {
            tracing::warn!(host = self.host, snapshot, %error, "a report could not be worked in");
        }
    }

    fn take_fill(&self, report: v1::FillReport) {
        if fast_restore::is_wanted(&self.core.tables(), &self.host, &report.snapshot_id) {
            self.core.fills.report(&self.host, report);
        }
    }

    async fn take_bundle(&self, report: v1::BundleReport) {
        let bundle = report.bundle_id.clone();
        if let Err(error) = bundle::apply_report(&self.core, &self.host, report).await {
            tracing::warn!(host = self.host, bundle, %error, "a report could not be worked in");
        }
    }

    async fn take_all(&mut self, report: v1::FullReport) {
        if report.instances.len() > MAX_INSTANCES {
            tracing::warn!(
                host = self.host,
                count = report.instances.len(),
                "a full report is too long; it is ignored"
            );
            return;
        }
        for volume in report.volumes {
            self.take_volume(volume).await;
        }
        self.core.fills.forget(&self.host);
        report.fills.into_iter().for_each(|fill| self.take_fill(fill));
        let staged: HashSet<String> = report.snapshots.iter().map(|report| report.snapshot_id.clone()).collect();
        for snapshot in report.snapshots {
            self.take_snapshot(snapshot).await;
        }
        let there: HashSet<String> = report.instances.iter().map(|report| report.instance_id.clone()).collect();
        futures::stream::iter(report.instances).for_each_concurrent(PARALLEL_REPORTS, |report| self.take(report)).await;
        // Later full reports cross with desired state on its way down; only the first one can tell what was lost.
        let Some(ready) = self.ready.take() else { return };
        let missing: Vec<String> = {
            let tables = self.core.tables();
            let placed = tables.instances_on.get(&self.host).into_iter().flatten();
            let evicted = tables.evictions.get(&self.host).into_iter().flat_map(|of_host| of_host.keys());
            placed.chain(evicted).filter(|id| !there.contains(*id)).cloned().collect()
        };
        for id in missing {
            if let Err(error) = reports::apply_missing(&self.core, self.origin(), &id).await {
                tracing::warn!(host = self.host, instance = id, %error, "a loss could not be worked in");
            }
        }
        if let Err(error) = volume_reports::settle_missing(&self.core, &self.host, &staged).await {
            tracing::warn!(host = self.host, %error, "lost snapshots could not be worked in");
        }
        // The sending half may have given up waiting.
        let _ = ready.send(());
    }
}
