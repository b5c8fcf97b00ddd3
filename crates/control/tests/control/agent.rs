//! A host without virtual machines: it says that it does what it is told, at once, and remembers it over sessions.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::Duration;

use hearth_proto::v1;
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
}

#[derive(Clone)]
pub struct FakeAgent {
    pub host_id: String,
    pub hello: v1::AgentHello,
    pub memory: Arc<Mutex<Memory>>,
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
        Self { host_id, hello, memory: Arc::default(), identity }
    }

    pub async fn client(&self, cloud: &Cloud) -> AgentServiceClient<Channel> {
        let identity = Identity::from_pem(&self.identity.0, &self.identity.1);
        let tls = cloud.tls().identity(identity);
        AgentServiceClient::new(cloud.endpoint(tls).connect().await.unwrap())
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
            (hello, v1::FullReport { sequence: 0, instances })
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
            }
            Down::Instance(desired) => self.take(desired, up).await,
            Down::GetConsoleOutput(command) => {
                let output = format!("console of {}\n", command.instance_id).into();
                let report = v1::ConsoleOutputReport { request_id: command.request_id, output, error: String::new() };
                self.say(up, Up::ConsoleOutput(report)).await;
            }
            Down::OpenConsole(command) => {
                let client = client.clone();
                tokio::spawn(echo_console(client, command));
            }
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
        for state in states {
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

/// Says back in capitals what it hears.
async fn echo_console(mut client: AgentServiceClient<Channel>, command: v1::OpenConsoleCommand) {
    let (up, messages) = mpsc::channel(16);
    let hello = v1::ConsoleRelayUp {
        session_id: command.session_id,
        data: format!("{} login: ", command.instance_id).into(),
        error: String::new(),
    };
    up.send(hello).await.unwrap();
    let Ok(down) = client.console_relay(ReceiverStream::new(messages)).await else { return };
    let mut down = down.into_inner();
    while let Ok(Some(message)) = down.message().await {
        let data = message.data.to_ascii_uppercase().into();
        if up.send(v1::ConsoleRelayUp { data, ..Default::default() }).await.is_err() {
            return;
        }
    }
}
