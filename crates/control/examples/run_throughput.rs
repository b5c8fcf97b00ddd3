//! How many RunInstances calls per second a control plane acknowledges (each one durable), over real TLS on loopback, with hosts
//! that only say that they are there.
//!
//! `cargo run --release -p hearth-control --example run_throughput -- [calls] [callers] [hosts] [instances per call]`
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::indexing_slicing, clippy::panic)]

use std::time::{Duration, Instant};

use hearth_control::{Control, ControlConfig};
use hearth_proto::v1;
use hearth_types::Credentials;
use rcgen::{CertificateParams, KeyPair};
use tokio_stream::wrappers::ReceiverStream;
use tokio_util::sync::CancellationToken;
use tonic::Request;
use tonic::transport::{Certificate, Channel, ClientTlsConfig, Endpoint, Identity};
use v1::agent_message::Message as Up;
use v1::agent_service_client::AgentServiceClient;
use v1::instance_service_client::InstanceServiceClient;

type Error = Box<dyn std::error::Error + Send + Sync>;

fn argument(index: usize, default: usize) -> usize {
    std::env::args().nth(index).map_or(default, |text| text.parse().expect("a number"))
}

fn pem(der: &[u8]) -> String {
    use base64::Engine;
    let text = base64::engine::general_purpose::STANDARD.encode(der);
    let lines: Vec<&str> = text.as_bytes().chunks(64).map(|line| std::str::from_utf8(line).unwrap()).collect();
    format!("-----BEGIN CERTIFICATE-----\n{}\n-----END CERTIFICATE-----\n", lines.join("\n"))
}

struct Cloud {
    url: String,
    credentials: Credentials,
}

impl Cloud {
    async fn channel(&self, identity: Option<Identity>) -> Result<Channel, Error> {
        let mut tls = ClientTlsConfig::new()
            .ca_certificate(Certificate::from_pem(&self.credentials.ca_certificate))
            .domain_name("localhost");
        if let Some(identity) = identity {
            tls = tls.identity(identity);
        }
        Ok(Endpoint::from_shared(self.url.clone())?.tls_config(tls)?.connect().await?)
    }

    fn authorized<T>(&self, message: T) -> Request<T> {
        let mut request = Request::new(message);
        let value = format!("Bearer {}", self.credentials.token).parse().unwrap();
        request.metadata_mut().insert("authorization", value);
        request
    }

    /// A host that takes orders and does nothing.
    async fn add_host(&self, token: String, index: usize) -> Result<(), Error> {
        let key = KeyPair::generate()?;
        let csr = CertificateParams::new(vec![])?.serialize_request(&key)?;
        let enroll = v1::EnrollRequest {
            token,
            certificate_request: csr.der().to_vec().into(),
            host_name: format!("host-{index}"),
        };
        let joined = AgentServiceClient::new(self.channel(None).await?).enroll(enroll).await?.into_inner();
        let chain: String = joined.certificate_chain.iter().map(|der| pem(der)).collect();
        let mut client =
            AgentServiceClient::new(self.channel(Some(Identity::from_pem(chain, key.serialize_pem()))).await?);
        let (up, messages) = tokio::sync::mpsc::channel(4);
        let capacity =
            v1::Resources { vcpus: 1_000_000, memory_mib: 1 << 40, ecu_milli: 1 << 40, instance_store_bytes: 1 << 50 };
        let hello = v1::AgentHello {
            host_id: joined.host_id,
            boot_id: "boot".into(),
            capacity: Some(capacity),
            availability_zone: "local-1a".into(),
            instance_cidr: "10.0.0.0/12".into(),
            ..Default::default()
        };
        up.send(v1::AgentMessage { message: Some(Up::Hello(hello)) }).await?;
        up.send(v1::AgentMessage { message: Some(Up::FullReport(v1::FullReport::default())) }).await?;
        let mut down = client.session(ReceiverStream::new(messages)).await?.into_inner();
        tokio::spawn(async move {
            loop {
                tokio::select! {
                    message = down.message() => if !matches!(message, Ok(Some(_))) { return },
                    () = tokio::time::sleep(Duration::from_secs(3)) => {
                        let beat = Up::Heartbeat(v1::Heartbeat::default());
                        let _ = up.send(v1::AgentMessage { message: Some(beat) }).await;
                    }
                }
            }
        });
        Ok(())
    }

    async fn import(&self) -> Result<String, Error> {
        use v1::import_image_request::Message;
        let header = v1::ImportImageHeader {
            name: "empty".into(),
            format: "raw".into(),
            file_bytes: 1 << 20,
            ..Default::default()
        };
        let messages = [Message::Header(header), Message::Chunk(vec![1; 1 << 20].into())];
        let messages = messages.map(|message| v1::ImportImageRequest { message: Some(message) });
        let mut client = v1::image_service_client::ImageServiceClient::new(self.channel(None).await?);
        let mut answers = client.import_image(self.authorized(tokio_stream::iter(messages))).await?.into_inner();
        let mut id = String::new();
        while let Some(answer) = answers.message().await? {
            id = answer.image.map_or(id, |image| image.image_id);
        }
        Ok(id)
    }
}

#[tokio::main]
async fn main() -> Result<(), Error> {
    let (calls, callers, hosts, per_call) = (argument(1, 5000), argument(2, 64), argument(3, 20), argument(4, 1));
    let dir = tempfile::tempdir()?;
    let mut config = ControlConfig::new(dir.path());
    config.listen = ([127, 0, 0, 1], 0).into();
    config.max_instances_per_account = u32::MAX;
    let control = Control::start(config.clone()).await?;
    let url = format!("https://{}", control.local_addr());
    let mut tokens = Vec::new();
    for _ in 0..hosts {
        tokens.push(control.create_join_token(Duration::from_secs(600)).await?.reveal());
    }
    let credentials = serde_json::from_slice(&std::fs::read(config.admin_credentials_path())?)?;
    let shutdown = CancellationToken::new();
    let serving = tokio::spawn(control.serve(shutdown.clone()));
    let cloud = std::sync::Arc::new(Cloud { url, credentials });
    for (index, token) in tokens.into_iter().enumerate() {
        cloud.add_host(token, index).await?;
    }
    let image_id = cloud.import().await?;

    let begun = Instant::now();
    let mut tasks = Vec::new();
    for caller in 0..callers {
        let (cloud, image_id) = (cloud.clone(), image_id.clone());
        tasks.push(tokio::spawn(async move {
            let mut client = InstanceServiceClient::new(cloud.channel(None).await?);
            let mut times = Vec::new();
            for call in 0..calls / callers {
                let request = v1::RunInstancesRequest {
                    image_id: image_id.clone(),
                    instance_type: "t3.nano".into(),
                    client_token: format!("{caller}-{call}"),
                    min_count: per_call as u32,
                    max_count: per_call as u32,
                    ..Default::default()
                };
                let asked = Instant::now();
                client.run_instances(cloud.authorized(request)).await?;
                times.push(asked.elapsed());
            }
            Ok::<_, Error>(times)
        }));
    }
    let mut times = Vec::new();
    for task in tasks {
        times.extend(task.await??);
    }
    let seconds = begun.elapsed().as_secs_f64();
    times.sort();
    let at = |part: f64| times[((times.len() - 1) as f64 * part) as usize].as_secs_f64() * 1e3;
    println!("{} calls of {per_call} instances, {callers} callers, {hosts} hosts: {seconds:.2} s", times.len());
    println!(
        "{:.0} calls/s, {:.0} instances/s",
        times.len() as f64 / seconds,
        (times.len() * per_call) as f64 / seconds
    );
    println!("answer after p50 {:.2} ms, p99 {:.2} ms", at(0.5), at(0.99));
    shutdown.cancel();
    serving.await??;
    Ok(())
}
