//! A host without virtual machines: it says that it does what it is told, at once, and remembers it over sessions.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use hearth_proto::v1;
use hearth_snapshot::{
    CHUNK_BYTES, ChunkStore, Epoch, KeyDomain, KeyDomainId, Manifest, ManifestSpec, ManifestWriter, ObjectStore,
    SnapshotKey,
};
use parking_lot::Mutex;
use rcgen::{CertificateParams, KeyPair};
use tokio::sync::mpsc;
use tokio::task::JoinHandle;
use tokio_stream::wrappers::ReceiverStream;
use tonic::Status;
use tonic::transport::{Channel, Identity};
use v1::agent_message::Message as Up;
use v1::agent_service_client::AgentServiceClient;
use v1::control_message::Message as Down;
use v1::object_service_client::ObjectServiceClient;
use v1::{ObservedState, RunState};

use crate::cloud::{Cloud, PATIENCE};

/// What the host has of one instance.
#[derive(Clone, Debug)]
pub struct Had {
    pub desired: v1::DesiredInstance,
    pub report: v1::InstanceReport,
}

/// How the host behaves.
#[derive(Clone, Debug, Default)]
pub struct Manners {
    /// Take orders and say nothing.
    pub silent: bool,
    /// Refuse every launch with this reason code.
    pub refuse: Option<String>,
    /// Stay in PREPARING.
    pub slow: bool,
    /// The guests hold on to volumes that they are asked to let go of.
    pub busy: bool,
    /// Attached volumes stay on their way.
    pub slow_volumes: bool,
    /// Say nothing about volumes that are to leave.
    pub keep_volumes: bool,
    /// Say that there is nothing of volumes that are to leave; the first of them may have been uploaded before.
    pub forget_volumes: Option<Forget>,
    /// Volumes cannot be made at backends, for this reason.
    pub refuse_volumes: Option<String>,
    /// How far snapshots get.
    pub snapshots: Snapshots,
    /// How far bundles get.
    pub bundles: Snapshots,
}

/// What a host has done with volumes of which it says that they are gone.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Forget {
    /// They were uploaded, and the report got lost.
    Uploaded,
    /// Nothing.
    Lost,
}

/// How far a host gets with snapshots.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub enum Snapshots {
    #[default]
    Complete,
    /// The point in time is fixed, nothing more.
    Freeze,
    /// Nothing is said.
    Silent,
    Fail,
}

#[derive(Default)]
pub struct Memory {
    pub manners: Manners,
    pub has: BTreeMap<String, Had>,
    pub epoch: u64,
    pub highest_term: u64,
    sequence: u64,
    /// Every instance that ever ran here.
    pub ever_ran: std::collections::BTreeSet<String>,
    /// Volumes that left, as they were reported; told again when asked again.
    pub left: BTreeMap<String, v1::VolumeReport>,
    /// What was told of volumes that are to leave.
    pub wishes: Vec<v1::DesiredVolume>,
    /// Snapshot sets that are not cancelled or complete.
    pub sets: BTreeMap<String, v1::DesiredSnapshotSet>,
    pub cancelled: Vec<String>,
    /// Bundles that are not called off.
    pub bundles: BTreeMap<String, v1::DesiredBundle>,
    /// Last report of each snapshot that has not ended.
    pub snapshots: BTreeMap<String, v1::SnapshotReport>,
    /// Content that guests wrote since the last snapshot, by volume and chunk.
    pub written: BTreeMap<String, BTreeMap<u64, u8>>,
    /// Snapshots that the host is to have whole.
    pub fills: Vec<v1::BaseSnapshot>,
}

#[derive(Clone)]
pub struct FakeAgent {
    pub host_id: String,
    pub hello: v1::AgentHello,
    pub memory: Arc<Mutex<Memory>>,
    objects: Arc<dyn ObjectStore>,
    identity: (String, String),
}

/// An open session.
pub struct Session {
    pub up: mpsc::Sender<v1::AgentMessage>,
    task: JoinHandle<Status>,
}

impl Drop for Session {
    fn drop(&mut self) {
        self.task.abort();
    }
}

impl Session {
    /// Why the control plane ended it.
    pub async fn ended(mut self) -> Status {
        tokio::time::timeout(PATIENCE, &mut self.task).await.expect("the session goes on").unwrap()
    }

    pub async fn send(&self, message: Up) {
        self.up.send(v1::AgentMessage { message: Some(message) }).await.unwrap();
    }
}

pub fn pem(label: &str, der: &[u8]) -> String {
    use base64::Engine;
    let text = base64::engine::general_purpose::STANDARD.encode(der);
    let lines: Vec<&str> = text.as_bytes().chunks(64).map(|line| std::str::from_utf8(line).unwrap()).collect();
    format!("-----BEGIN {label}-----\n{}\n-----END {label}-----\n", lines.join("\n"))
}

/// Asks for a certificate.
pub async fn enroll(cloud: &Cloud, token: &str, name: &str) -> Result<(String, (String, String)), Status> {
    let key = KeyPair::generate().unwrap();
    let request = CertificateParams::new(vec![]).unwrap().serialize_request(&key).unwrap();
    let mut client = AgentServiceClient::new(cloud.channel().await);
    let answer = client
        .enroll(v1::EnrollRequest {
            token: token.into(),
            certificate_request: request.der().to_vec().into(),
            host_name: name.into(),
        })
        .await?
        .into_inner();
    let chain: String = answer.certificate_chain.iter().map(|der| pem("CERTIFICATE", der)).collect();
    Ok((answer.host_id, (chain, key.serialize_pem())))
}

impl FakeAgent {
    pub async fn join(cloud: &Cloud, name: &str) -> Self {
        let token = cloud.join_token().await.reveal();
        let (host_id, identity) = enroll(cloud, &token, name).await.unwrap();
        let capacity = v1::Resources { vcpus: 64, memory_mib: 32768, ecu_milli: 64000, instance_store_bytes: 1 << 40 };
        let hello = v1::AgentHello {
            host_id: host_id.clone(),
            host_name: name.into(),
            boot_id: format!("boot-of-{name}"),
            agent_version: "0.1.0".into(),
            kernel_version: "6.1.0".into(),
            capacity: Some(capacity),
            vcpu_overcommit_percent: 100,
            availability_zone: "local-1a".into(),
            instance_cidr: "172.30.0.0/20".into(),
            ..Default::default()
        };
        Self { host_id, hello, memory: Arc::default(), objects: cloud.objects.clone(), identity }
    }

    pub async fn client(&self, cloud: &Cloud) -> AgentServiceClient<Channel> {
        let identity = Identity::from_pem(&self.identity.0, &self.identity.1);
        let tls = cloud.tls().identity(identity);
        AgentServiceClient::new(cloud.endpoint(tls).connect().await.unwrap())
    }

    pub async fn object_client(&self, cloud: &Cloud) -> ObjectServiceClient<Channel> {
        let identity = Identity::from_pem(&self.identity.0, &self.identity.1);
        let tls = cloud.tls().identity(identity);
        ObjectServiceClient::new(cloud.endpoint(tls).connect().await.unwrap())
    }

    /// Joins and connects.
    pub async fn connected(cloud: &Cloud, name: &str) -> (Self, Session) {
        let agent = Self::join(cloud, name).await;
        let session = agent.connect(cloud).await.unwrap();
        (agent, session)
    }

    /// Opens a session and works in it until it ends.
    pub async fn connect(&self, cloud: &Cloud) -> Result<Session, Status> {
        let mut client = self.client(cloud).await;
        let (up, messages) = mpsc::channel(64);
        let (hello, full) = {
            let mut memory = self.memory.lock();
            memory.epoch += 1;
            memory.sequence = 0;
            let hello =
                v1::AgentHello { agent_epoch: memory.epoch, highest_term: memory.highest_term, ..self.hello.clone() };
            for had in memory.has.values_mut() {
                had.report.sequence = 0;
            }
            let instances = memory.has.values().map(|had| had.report.clone()).collect();
            let snapshots = memory.snapshots.values().cloned().collect();
            (hello, v1::FullReport { sequence: 0, instances, volumes: Vec::new(), snapshots, fills: Vec::new() })
        };
        up.send(v1::AgentMessage { message: Some(Up::Hello(hello)) }).await.unwrap();
        up.send(v1::AgentMessage { message: Some(Up::FullReport(full)) }).await.unwrap();
        let mut down = client.session(ReceiverStream::new(messages)).await?.into_inner();
        let agent = self.clone();
        let sender = up.clone();
        let task = tokio::spawn(async move {
            loop {
                tokio::select! {
                    message = down.message() => match message {
                        Ok(Some(message)) => agent.obey(message, &sender, &mut client).await,
                        Ok(None) => return Status::ok("ended"),
                        Err(status) => return status,
                    },
                    () = tokio::time::sleep(Duration::from_millis(500)) => {
                        let beat = Up::Heartbeat(v1::Heartbeat { sequence: 0 });
                        let _ = sender.send(v1::AgentMessage { message: Some(beat) }).await;
                    }
                }
            }
        });
        Ok(Session { up, task })
    }

    async fn obey(
        &self,
        message: v1::ControlMessage,
        up: &mpsc::Sender<v1::AgentMessage>,
        client: &mut AgentServiceClient<Channel>,
    ) {
        {
            let mut memory = self.memory.lock();
            assert!(message.term >= memory.highest_term, "an older leader gives orders");
            memory.highest_term = message.term;
        }
        match message.message.unwrap() {
            Down::Desired(all) => {
                for desired in all.instances {
                    self.take(desired, up).await;
                }
                for volume in all.volumes {
                    self.let_go(volume, up).await;
                }
                for set in all.snapshot_sets {
                    self.take_set(set, up).await;
                }
                for bundle in all.bundles {
                    self.take_bundle(bundle, up).await;
                }
                self.memory.lock().fills = all.fills.unwrap_or_default().snapshots;
            }
            Down::Instance(desired) => self.take(desired, up).await,
            Down::Volume(volume) => self.let_go(volume, up).await,
            Down::SnapshotSet(set) => self.take_set(set, up).await,
            Down::CancelSnapshotSet(cancel) => {
                let mut memory = self.memory.lock();
                if let Some(set) = memory.sets.remove(&cancel.set_id) {
                    for snapshot in set.snapshots {
                        memory.snapshots.remove(&snapshot.snapshot_id);
                    }
                }
                memory.cancelled.push(cancel.set_id);
            }
            Down::Bundle(bundle) => self.take_bundle(bundle, up).await,
            Down::CancelBundle(cancel) => {
                let mut memory = self.memory.lock();
                memory.bundles.remove(&cancel.bundle_id);
                memory.cancelled.push(cancel.bundle_id);
            }
            Down::GetConsoleOutput(command) => {
                let output = format!("console of {}\n", command.instance_id).into();
                let report = v1::ConsoleOutputReport { request_id: command.request_id, output, error: String::new() };
                self.say(up, Up::ConsoleOutput(report)).await;
            }
            Down::OpenConsole(command) => {
                let client = client.clone();
                tokio::spawn(crate::console::echo_console(client, command));
            }
            Down::Fills(fills) => self.memory.lock().fills = fills.snapshots,
            Down::ReportAll(_) => {}
        }
    }

    async fn say(&self, up: &mpsc::Sender<v1::AgentMessage>, message: Up) {
        if !self.memory.lock().manners.silent {
            let _ = up.send(v1::AgentMessage { message: Some(message) }).await;
        }
    }

    async fn take(&self, desired: v1::DesiredInstance, up: &mpsc::Sender<v1::AgentMessage>) {
        let reports = self.memory.lock().take(desired);
        for report in reports {
            self.say(up, Up::Report(report)).await;
        }
    }

    fn chunks(&self, domain: &v1::KeyDomain) -> ChunkStore {
        let secret: [u8; 32] = domain.secret[..].try_into().expect("a secret of 32 bytes");
        ChunkStore::new(self.objects.clone(), KeyDomain::new(KeyDomainId::new(&domain.name).unwrap(), &secret))
    }

    /// Uploads what guests wrote over what was there before.
    async fn upload(
        &self,
        volume: &v1::HostVolume,
        parent: Option<&v1::BaseSnapshot>,
        domain: &v1::KeyDomain,
        id: &str,
        epoch: u32,
        written: BTreeMap<u64, u8>,
    ) -> String {
        let store = self.chunks(domain);
        let base = parent;
        let parent = match parent {
            Some(base) => {
                let root = base.root.parse().unwrap();
                let id = SnapshotKey::new(&base.snapshot_id).unwrap();
                Some(Manifest::load(&*self.objects, &id, Some(&root)).await.expect("the parent is there"))
            }
            None => None,
        };
        let spec =
            ManifestSpec { id: SnapshotKey::new(id).unwrap(), size_bytes: volume.size_bytes, epoch: Epoch(epoch) };
        // From another key domain nothing can be taken over.
        let (parent, before) = match parent {
            Some(parent) if parent.domain() != store.domain().id() => (None, Some(parent)),
            parent => (parent, None),
        };
        let mut writer = ManifestWriter::new(spec, parent.as_ref()).unwrap();
        if let (Some(before), Some(base)) = (before, base) {
            let from = self.chunks(base.key_domain.as_ref().unwrap());
            for chunk in before.chunks().filter(|chunk| !written.contains_key(chunk)) {
                let content = before.read_chunk(&from, chunk).await.unwrap().unwrap();
                writer.set(chunk, store.put_chunk(Epoch(epoch), content).await.unwrap()).unwrap();
            }
        }
        for (chunk, byte) in written {
            let content = Bytes::from(vec![byte; CHUNK_BYTES]);
            writer.set(chunk, store.put_chunk(Epoch(epoch), content).await.unwrap()).unwrap();
        }
        writer.commit(&store).await.unwrap().root_hash.to_string()
    }

    /// Publishes a manifest without content.
    pub async fn publish_empty(&self, spec: ManifestSpec) {
        let domain = KeyDomain::new(KeyDomainId::new("plain").unwrap(), &[7; 32]);
        let store = ChunkStore::new(self.objects.clone(), domain);
        ManifestWriter::new(spec, None).unwrap().commit(&store).await.unwrap();
    }

    /// Root hash of a manifest in the store.
    pub async fn root_of(&self, id: &str) -> String {
        let id = SnapshotKey::new(id).unwrap();
        Manifest::load(&*self.objects, &id, None).await.unwrap().root_hash().to_string()
    }

    async fn let_go(&self, desired: v1::DesiredVolume, up: &mpsc::Sender<v1::AgentMessage>) {
        let volume = desired.volume.clone().unwrap();
        let known = {
            let mut memory = self.memory.lock();
            memory.wishes.push(desired.clone());
            if memory.manners.keep_volumes {
                return;
            }
            memory.left.get(&volume.volume_id).filter(|left| left.observed_generation == desired.generation).cloned()
        };
        let report = match known {
            Some(known) => known,
            None => {
                let mut report = v1::VolumeReport {
                    volume_id: volume.volume_id.clone(),
                    observed_generation: desired.generation,
                    ..Default::default()
                };
                let (forget, written) = {
                    let mut memory = self.memory.lock();
                    (memory.manners.forget_volumes, memory.written.remove(&volume.volume_id).unwrap_or_default())
                };
                if forget == Some(Forget::Lost) {
                    report.set_outcome(v1::VolumeOutcome::Gone);
                } else if desired.wish() == v1::VolumeWish::Created {
                    report.error = self.memory.lock().manners.refuse_volumes.clone().unwrap_or_default();
                    report.set_outcome(match report.error.is_empty() {
                        true => v1::VolumeOutcome::Created,
                        false => v1::VolumeOutcome::Failed,
                    });
                } else if desired.wish() == v1::VolumeWish::Released {
                    let domain = desired.key_domain.clone().unwrap();
                    let parent = desired.parent.as_ref();
                    report.root =
                        self.upload(&volume, parent, &domain, &desired.manifest_id, desired.epoch, written).await;
                    report.set_outcome(v1::VolumeOutcome::Released);
                    if forget == Some(Forget::Uploaded) {
                        report.root.clear();
                        report.set_outcome(v1::VolumeOutcome::Gone);
                    }
                } else {
                    report.set_outcome(v1::VolumeOutcome::Gone);
                }
                self.memory.lock().left.insert(volume.volume_id.clone(), report.clone());
                report
            }
        };
        self.say(up, Up::Volume(report)).await;
    }

    async fn take_bundle(&self, desired: v1::DesiredBundle, up: &mpsc::Sender<v1::AgentMessage>) {
        let manner = {
            let mut memory = self.memory.lock();
            memory.bundles.insert(desired.bundle_id.clone(), desired.clone());
            memory.manners.bundles
        };
        let mut report = v1::BundleReport { bundle_id: desired.bundle_id.clone(), ..Default::default() };
        report.set_state(v1::ObservedBundle::Storing);
        (report.done_bytes, report.total_bytes) = (1, 4);
        if manner == Snapshots::Silent {
            return;
        }
        self.say(up, Up::Bundle(report.clone())).await;
        match manner {
            Snapshots::Complete => {
                let spec = hearth_snapshot::BundleSpec {
                    prefix: desired.prefix.clone(),
                    name: desired.name.clone(),
                    disk_bytes: 1 << 20,
                    attributes: serde_json::from_str(&desired.attributes_json).unwrap(),
                };
                let disk = tempfile::NamedTempFile::new().unwrap();
                std::fs::write(disk.path(), crate::cloud::disk_bytes()).unwrap();
                let source = hearth_snapshot::FileSource::open(disk.path()).unwrap();
                let made = hearth_snapshot::write_bundle(&*self.objects, spec, &source, Arc::new(|_, _| {})).await;
                report.manifest_sha256 = made.unwrap().manifest_sha256;
                report.set_state(v1::ObservedBundle::Complete);
            }
            Snapshots::Fail => {
                report.error = "as it was told to".into();
                report.set_state(v1::ObservedBundle::Failed);
            }
            Snapshots::Freeze | Snapshots::Silent => return,
        }
        self.say(up, Up::Bundle(report)).await;
    }

    async fn take_set(&self, set: v1::DesiredSnapshotSet, up: &mpsc::Sender<v1::AgentMessage>) {
        let manner = {
            let mut memory = self.memory.lock();
            memory.sets.insert(set.set_id.clone(), set.clone());
            memory.manners.snapshots
        };
        for snapshot in &set.snapshots {
            let mut report = v1::SnapshotReport {
                snapshot_id: snapshot.snapshot_id.clone(),
                total_chunks: 4,
                done_chunks: 1,
                ..Default::default()
            };
            match manner {
                Snapshots::Silent => continue,
                Snapshots::Fail => {
                    report.set_state(v1::ObservedSnapshot::Failed);
                    report.error = "as it was told to".into();
                }
                Snapshots::Freeze | Snapshots::Complete => {
                    report.set_state(v1::ObservedSnapshot::Frozen);
                    self.memory.lock().snapshots.insert(snapshot.snapshot_id.clone(), report.clone());
                }
            }
            self.say(up, Up::Snapshot(report)).await;
        }
        if manner == Snapshots::Complete {
            self.finish_set(&set.set_id, up).await;
        }
    }

    /// Uploads the snapshots of a set and says so.
    pub async fn finish_set(&self, set: &str, up: &mpsc::Sender<v1::AgentMessage>) {
        let set = self.memory.lock().sets.remove(set).expect("the set is known");
        for snapshot in set.snapshots {
            let volume = snapshot.volume.clone().unwrap();
            let written = self.memory.lock().written.remove(&volume.volume_id).unwrap_or_default();
            let bytes = (written.len() * CHUNK_BYTES) as u64;
            let domain = snapshot.key_domain.clone().unwrap();
            let parent = snapshot.parent.as_ref();
            let root = self.upload(&volume, parent, &domain, &snapshot.snapshot_id, snapshot.epoch, written).await;
            let mut report = v1::SnapshotReport {
                snapshot_id: snapshot.snapshot_id.clone(),
                total_chunks: 4,
                done_chunks: 4,
                root,
                incremental_bytes: bytes,
                full_bytes: bytes,
                ..Default::default()
            };
            report.set_state(v1::ObservedSnapshot::Completed);
            self.memory.lock().snapshots.remove(&snapshot.snapshot_id);
            self.say(up, Up::Snapshot(report)).await;
        }
    }

    /// Chunks of a volume that a guest has written since the last snapshot.
    pub fn write(&self, volume: &str, chunk: u64, byte: u8) {
        self.memory.lock().written.entry(volume.into()).or_default().insert(chunk, byte);
    }

    /// Changes what the host saw of an instance and reports it.
    pub async fn observe(&self, session: &Session, id: &str, change: impl FnOnce(&mut v1::InstanceReport)) {
        let report = {
            let mut memory = self.memory.lock();
            memory.sequence += 1;
            let sequence = memory.sequence;
            let had = memory.has.get_mut(id).unwrap();
            had.report.sequence = sequence;
            change(&mut had.report);
            had.report.clone()
        };
        session.send(Up::Report(report)).await;
    }

    pub fn running(&self) -> Vec<String> {
        let memory = self.memory.lock();
        let running = memory.has.iter().filter(|(_, had)| had.report.state() == ObservedState::Running);
        running.map(|(id, _)| id.clone()).collect()
    }
}

impl Memory {
    fn take(&mut self, desired: v1::DesiredInstance) -> Vec<v1::InstanceReport> {
        let id = desired.instance_id.clone();
        let before = self.has.get(&id).cloned();
        if before.as_ref().is_some_and(|had| had.desired.generation > desired.generation) {
            return Vec::new();
        }
        let was_running = before.as_ref().is_some_and(|had| had.report.state() == ObservedState::Running);
        let mut report = before.map(|had| had.report).unwrap_or_default();
        report.instance_id = id.clone();
        report.observed_generation = desired.generation;
        let mut states = Vec::new();
        match desired.run() {
            RunState::Running if self.manners.refuse.is_some() => states.push(ObservedState::Failed),
            RunState::Running if self.manners.slow => states.push(ObservedState::Preparing),
            RunState::Running => {
                if !was_running {
                    states.push(ObservedState::Preparing);
                }
                states.push(ObservedState::Running);
            }
            RunState::Stopped => states.extend([ObservedState::Stopping, ObservedState::Stopped]),
            _ => states.push(ObservedState::Gone),
        }
        let mut reports = Vec::new();
        let slots = desired.spec.as_ref().map(|spec| spec.volumes.clone()).unwrap_or_default();
        for state in states {
            report.volumes = match state {
                ObservedState::Running => slots.iter().map(|slot| self.attachment(slot)).collect(),
                _ => Vec::new(),
            };
            self.sequence += 1;
            report.sequence = self.sequence;
            report.state = state.into();
            report.guest_powered_off = false;
            report.guest_responded = state == ObservedState::Running;
            report.reason = None;
            report.progress = None;
            match state {
                ObservedState::Running => {
                    let rebooted = desired.reboot_generation > report.observed_reboot_generation;
                    if !was_running || rebooted {
                        report.boot_count += 1;
                    }
                    report.observed_reboot_generation = desired.reboot_generation;
                    self.ever_ran.insert(id.clone());
                }
                ObservedState::Preparing => {
                    report.progress = Some(v1::Progress { done_bytes: 1, total_bytes: 2, step: "copying".into() });
                }
                ObservedState::Failed => {
                    let code = self.manners.refuse.clone().unwrap_or_default();
                    report.reason = Some(v1::StateReason { code, message: "as it was told to".into() });
                }
                _ => {}
            }
            reports.push(report.clone());
        }
        if report.state() == ObservedState::Gone {
            self.has.remove(&id);
        } else {
            self.has.insert(id, Had { desired, report });
        }
        reports
    }
}

impl Memory {
    fn attachment(&self, slot: &v1::AttachedVolume) -> v1::AttachedVolumeReport {
        use v1::ObservedAttachment as Seen;
        let volume = slot.volume.clone().unwrap_or_default();
        let state = match slot.detach() {
            _ if self.manners.slow_volumes => Seen::Attaching,
            v1::DetachWish::Unspecified => Seen::Attached,
            v1::DetachWish::Ask if self.manners.busy => Seen::Busy,
            v1::DetachWish::Ask | v1::DetachWish::Force => Seen::Detached,
        };
        v1::AttachedVolumeReport {
            volume_id: volume.volume_id,
            attach_generation: volume.attach_generation,
            state: state.into(),
            size_bytes: volume.size_bytes,
            ..Default::default()
        }
    }
}
