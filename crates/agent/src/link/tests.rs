//! Enrolment and sessions against a small control plane made here.

use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use hearth_proto::v1::agent_service_server::{AgentService, AgentServiceServer};
use hearth_proto::v1::{self, AgentMessage, ControlMessage, ObservedState, RunState, agent_message, control_message};
use hearth_types::{CONTROL_SERVER_NAME, HostId, InstanceId, JoinToken};
use parking_lot::Mutex;
use rcgen::{BasicConstraints, CertificateParams, CertificateSigningRequestParams, IsCa, Issuer, KeyPair};
use rustls::pki_types::CertificateSigningRequestDer;
use sha2::{Digest, Sha256};
use tokio::sync::{broadcast, mpsc};
use tokio_stream::wrappers::{BroadcastStream, ReceiverStream, TcpListenerStream};
use tokio_stream::{Stream, StreamExt};
use tonic::transport::{Certificate, Identity as TlsIdentity, Server, ServerTlsConfig};
use tonic::{Request, Response, Status, Streaming};

use super::*;
use crate::epoch::Epoch;
use crate::instance::tests::world::{Agent, Wanted, World, id};

type Out<T> = std::pin::Pin<Box<dyn Stream<Item = Result<T, Status>> + Send>>;

struct Control {
    issuer: Issuer<'static, KeyPair>,
    ca_der: Vec<u8>,
    host: HostId,
    token: JoinToken,
    up: mpsc::Sender<agent_message::Message>,
    down: broadcast::Sender<ControlMessage>,
    console_input: Mutex<Vec<Bytes>>,
}

#[derive(Clone)]
struct Service(Arc<Control>);

#[tonic::async_trait]
impl AgentService for Service {
    async fn enroll(&self, request: Request<v1::EnrollRequest>) -> Result<Response<v1::EnrollResponse>, Status> {
        let request = request.into_inner();
        if request.token != self.0.token.reveal() {
            return Err(Status::unauthenticated("the join token is unknown"));
        }
        let csr = CertificateSigningRequestDer::from(request.certificate_request.to_vec());
        let csr = CertificateSigningRequestParams::from_der(&csr).unwrap();
        let leaf = csr.signed_by(&self.0.issuer).unwrap();
        let certificate_chain = vec![leaf.der().to_vec().into(), self.0.ca_der.clone().into()];
        Ok(Response::new(v1::EnrollResponse { host_id: self.0.host.to_string(), certificate_chain }))
    }

    async fn renew_certificate(
        &self,
        _: Request<v1::RenewCertificateRequest>,
    ) -> Result<Response<v1::RenewCertificateResponse>, Status> {
        Err(Status::unavailable("not now"))
    }

    type SessionStream = Out<ControlMessage>;
    async fn session(
        &self,
        request: Request<Streaming<AgentMessage>>,
    ) -> Result<Response<Out<ControlMessage>>, Status> {
        if request.peer_certs().is_none_or(|certificates| certificates.is_empty()) {
            return Err(Status::unauthenticated("a client certificate is needed"));
        }
        let (up, mut messages) = (self.0.up.clone(), request.into_inner());
        tokio::spawn(async move {
            while let Ok(Some(message)) = messages.message().await {
                if up.send(message.message.unwrap()).await.is_err() {
                    return;
                }
            }
        });
        let down = BroadcastStream::new(self.0.down.subscribe()).map(|m| m.map_err(|_| Status::internal("lagged")));
        Ok(Response::new(Box::pin(down)))
    }

    type ConsoleRelayStream = Out<v1::ConsoleRelayDown>;
    async fn console_relay(
        &self,
        request: Request<Streaming<v1::ConsoleRelayUp>>,
    ) -> Result<Response<Self::ConsoleRelayStream>, Status> {
        let mut messages = request.into_inner();
        let control = self.0.clone();
        let (down, stream) = mpsc::channel(4);
        tokio::spawn(async move {
            while let Ok(Some(message)) = messages.message().await {
                control.console_input.lock().push(format!("{}|{}|", message.session_id, message.error).into());
                control.console_input.lock().push(message.data);
                let data = Bytes::from_static(b"typed");
                if down.send(Ok(v1::ConsoleRelayDown { data })).await.is_err() {
                    return;
                }
            }
        });
        Ok(Response::new(Box::pin(ReceiverStream::new(stream))))
    }
}

struct Running {
    control: Arc<Control>,
    endpoint: String,
    up: mpsc::Receiver<agent_message::Message>,
}

impl Running {
    /// A control plane whose certificate has this name.
    async fn start(name: &str) -> Self {
        let key = KeyPair::generate().unwrap();
        let mut params = CertificateParams::default();
        params.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
        let ca = params.self_signed(&key).unwrap();
        let issuer = Issuer::new(params, key);
        let server_key = KeyPair::generate().unwrap();
        let leaf = CertificateParams::new(vec![name.to_owned()]).unwrap().signed_by(&server_key, &issuer).unwrap();
        let tls = ServerTlsConfig::new()
            .identity(TlsIdentity::from_pem(format!("{}{}", leaf.pem(), ca.pem()), server_key.serialize_pem()))
            .client_ca_root(Certificate::from_pem(ca.pem()))
            .client_auth_optional(true);
        let (up_in, up) = mpsc::channel(1000);
        let control = Arc::new(Control {
            issuer,
            ca_der: ca.der().to_vec(),
            host: HostId::generate().unwrap(),
            token: JoinToken { ca_sha256: Sha256::digest(ca.der()).into(), secret: [7; 32] },
            up: up_in,
            down: broadcast::Sender::new(100),
            console_input: Mutex::default(),
        });
        let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
        let endpoint = format!("https://{}", listener.local_addr().unwrap());
        let service = AgentServiceServer::new(Service(control.clone()));
        let server = Server::builder().tls_config(tls).unwrap().add_service(service);
        tokio::spawn(server.serve_with_incoming(TcpListenerStream::new(listener)));
        Self { control, endpoint, up }
    }

    async fn enroll(&self) -> Result<Identity, LinkError> {
        enroll(std::slice::from_ref(&self.endpoint), &self.control.token, "test").await
    }

    async fn next(&mut self) -> agent_message::Message {
        tokio::time::timeout(Duration::from_secs(20), self.up.recv()).await.expect("nothing came").unwrap()
    }

    /// The next report of an instance in that state.
    async fn report(&mut self, instance: &InstanceId, state: ObservedState) -> v1::InstanceReport {
        loop {
            if let agent_message::Message::Report(report) = self.next().await
                && report.instance_id == instance.as_str()
                && report.state() == state
            {
                return report;
            }
        }
    }

    fn say(&self, term: u64, message: control_message::Message) {
        self.control.down.send(ControlMessage { term, message: Some(message) }).unwrap();
    }
}

fn session(agent: &Agent, identity: &Identity) -> Session {
    let hello = v1::AgentHello { host_id: identity.host_id.to_string(), ..v1::AgentHello::default() };
    Session {
        supervisor: agent.supervisor.clone(),
        host: agent.host.clone(),
        epoch: Arc::new(Epoch::begin(&agent.host.layout).unwrap()),
        announcement: Announcement(hello),
        link: Arc::new(Link::default()),
    }
}

#[tokio::test]
async fn a_host_joins_and_keeps_its_identity_to_itself() {
    let control = Running::start(CONTROL_SERVER_NAME).await;
    let identity = control.enroll().await.unwrap();
    assert_eq!(identity.host_id, control.control.host);
    let folder = tempfile::tempdir().unwrap();
    let layout = crate::state::Layout::new(folder.path(), folder.path());
    identity.save(&layout).unwrap();
    use std::os::unix::fs::PermissionsExt;
    assert_eq!(layout.identity().metadata().unwrap().permissions().mode() & 0o777, 0o600);
    assert_eq!(Identity::load(&layout).unwrap(), Some(identity.clone()));
    assert!(!format!("{identity:?}").contains(&hex::encode(&identity.key)));
    assert!(renewal_due(&identity).unwrap() > Duration::from_secs(3600));
}

#[tokio::test]
async fn only_the_right_cluster_is_joined() {
    let control = Running::start(CONTROL_SERVER_NAME).await;
    let endpoints = [control.endpoint.clone()];
    let other = JoinToken { ca_sha256: [1; 32], ..control.control.token.clone() };
    let error = enroll(&endpoints, &other, "test").await.unwrap_err();
    assert!(matches!(&error, LinkError::Connect { reason, .. } if reason.contains("not the cluster")), "{error}");
    let used = JoinToken { secret: [8; 32], ..control.control.token.clone() };
    assert!(matches!(enroll(&endpoints, &used, "test").await, Err(LinkError::Refused(_))));
    // Another certificate of the same authority, an agent's for instance, is not the control plane.
    let impostor = Running::start("agent.hearth.internal").await;
    assert!(matches!(impostor.enroll().await, Err(LinkError::Connect { .. })));
    // Nor is the control plane of another cluster, once joined.
    let identity = control.enroll().await.unwrap();
    let stranger = Running::start(CONTROL_SERVER_NAME).await;
    let tls = mutual(&identity).unwrap();
    assert!(matches!(connect(&[stranger.endpoint], &tls).await, Err(LinkError::Connect { .. })));
    for wrong in ["http://127.0.0.1:1", "nonsense", "https://127.0.0.1:1"] {
        assert!(matches!(connect(&[wrong.to_owned()], &tls).await, Err(LinkError::Connect { .. })), "{wrong}");
    }
    connect(&["https://127.0.0.1:1".to_owned(), control.endpoint.clone()], &tls).await.unwrap();
}

#[tokio::test]
async fn a_session_brings_wishes_down_and_reports_up() {
    let mut control = Running::start(CONTROL_SERVER_NAME).await;
    let identity = control.enroll().await.unwrap();
    let (world, mut wanted) = (World::new(), Wanted::default());
    let agent = Agent::start(&world);
    let session = session(&agent, &identity);
    let client = connect(&identity.endpoints, &mutual(&identity).unwrap()).await.unwrap();
    let epoch = session.epoch.clone();
    let running = tokio::spawn(async move { session.run(client).await });
    assert!(
        matches!(control.next().await, agent_message::Message::Hello(hello) if hello.host_id == identity.host_id.as_str())
    );
    assert!(matches!(control.next().await, agent_message::Message::FullReport(full) if full.instances.is_empty()));
    assert!(matches!(control.next().await, agent_message::Message::Heartbeat(_)));

    let one = id(1);
    wanted.want(&one, RunState::Running);
    control.say(5, control_message::Message::Desired(wanted.all()));
    assert_eq!(control.report(&one, ObservedState::Running).await.observed_generation, 1);
    assert_eq!(epoch.highest_term(), 5);

    control.say(5, control_message::Message::ReportAll(v1::ReportAll {}));
    loop {
        if let agent_message::Message::FullReport(full) = control.next().await {
            assert_eq!(full.instances.len(), 1);
            break;
        }
    }
    for (number, instance) in (1..).zip([id(1), id(2)]) {
        let command = v1::GetConsoleOutputCommand { request_id: number, instance_id: instance.to_string() };
        control.say(5, control_message::Message::GetConsoleOutput(command));
        loop {
            if let agent_message::Message::ConsoleOutput(output) = control.next().await {
                assert_eq!((output.request_id, output.error.is_empty()), (number, number == 1));
                break;
            }
        }
    }
    // A leader of the past is not obeyed.
    control.say(4, control_message::Message::Instance(wanted.want(&one, RunState::Terminated)));
    let error = running.await.unwrap();
    assert!(error.to_string().contains("term 4 is over, 5"), "{error}");
    assert!(world.runs(&one));
}

#[tokio::test]
async fn a_session_needs_a_certificate() {
    let control = Running::start(CONTROL_SERVER_NAME).await;
    let identity = control.enroll().await.unwrap();
    let world = World::new();
    let agent = Agent::start(&world);
    let session = session(&agent, &identity);
    let tls = super::connect::pinned(control.control.token.ca_sha256).unwrap();
    let client = connect(&identity.endpoints, &tls).await.unwrap();
    let error = session.run(client).await;
    assert!(matches!(error, LinkError::Refused(_)), "{error}");
}

#[tokio::test]
async fn a_console_is_relayed_both_ways_and_a_missing_one_is_told() {
    use tokio::io::{AsyncReadExt, AsyncWriteExt};
    let control = Running::start(CONTROL_SERVER_NAME).await;
    let identity = control.enroll().await.unwrap();
    let client = connect(&identity.endpoints, &mutual(&identity).unwrap()).await.unwrap().agent();
    let folder = tempfile::tempdir().unwrap();
    let socket = folder.path().join("console.sock");
    let listener = tokio::net::UnixListener::bind(&socket).unwrap();
    let relayed = {
        let (client, socket) = (client.clone(), socket.clone());
        tokio::spawn(async move { console::relay(client, "s1".into(), &socket).await })
    };
    let (mut guest, _) = listener.accept().await.unwrap();
    guest.write_all(b"login: ").await.unwrap();
    let mut typed = [0u8; 5];
    guest.read_exact(&mut typed).await.unwrap();
    assert_eq!(&typed, b"typed");
    let said = || control.control.console_input.lock().concat();
    while !String::from_utf8_lossy(&said()).contains("login: ") {
        tokio::time::sleep(Duration::from_millis(10)).await;
    }
    drop(guest);
    relayed.await.unwrap();
    assert!(said().starts_with(b"s1||"));
    console::relay(client, "s2".into(), &folder.path().join("none")).await;
    while !String::from_utf8_lossy(&said()).contains("s2|the instance has no console now") {
        tokio::time::sleep(Duration::from_millis(10)).await;
    }
}
