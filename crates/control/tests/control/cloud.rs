//! One control plane and its users.

use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use hearth_control::{Control, ControlConfig, ControlError};
use hearth_proto::v1;
use hearth_store::Store;
use hearth_types::{Credentials, JoinToken};
use tokio::task::JoinHandle;
use tokio_util::sync::CancellationToken;
use tonic::metadata::MetadataValue;
use tonic::service::Interceptor;
use tonic::service::interceptor::InterceptedService;
use tonic::transport::{Certificate, Channel, ClientTlsConfig, Endpoint};
use tonic::{Request, Status};
use tonic_types::StatusExt;
use v1::account_service_client::AccountServiceClient;
use v1::host_service_client::HostServiceClient;
use v1::image_service_client::ImageServiceClient;
use v1::instance_service_client::InstanceServiceClient;
use v1::instance_type_service_client::InstanceTypeServiceClient;
use v1::key_pair_service_client::KeyPairServiceClient;
use v1::snapshot_service_client::SnapshotServiceClient;
use v1::storage_service_client::StorageServiceClient;
use v1::tag_service_client::TagServiceClient;
use v1::volume_service_client::VolumeServiceClient;

/// Longest wait for something that must happen.
pub const PATIENCE: Duration = Duration::from_secs(60);

/// Adds the bearer token.
#[derive(Clone)]
pub struct Bearer(pub Option<String>);

impl Interceptor for Bearer {
    fn call(&mut self, mut request: Request<()>) -> Result<Request<()>, Status> {
        if let Some(text) = &self.0 {
            let value = MetadataValue::try_from(text.as_str()).unwrap();
            request.metadata_mut().insert("authorization", value);
        }
        Ok(request)
    }
}

pub type Wire = InterceptedService<Channel, Bearer>;

/// A user of one account.
#[derive(Clone)]
pub struct User {
    pub instances: InstanceServiceClient<Wire>,
    pub images: ImageServiceClient<Wire>,
    pub hosts: HostServiceClient<Wire>,
    pub keys: KeyPairServiceClient<Wire>,
    pub tags: TagServiceClient<Wire>,
    pub accounts: AccountServiceClient<Wire>,
    pub types: InstanceTypeServiceClient<Wire>,
    pub volumes: VolumeServiceClient<Wire>,
    pub snapshots: SnapshotServiceClient<Wire>,
    pub storage: StorageServiceClient<Wire>,
}

impl User {
    pub fn new(channel: Channel, authorization: Option<String>) -> Self {
        let wire = InterceptedService::new(channel, Bearer(authorization));
        Self {
            instances: InstanceServiceClient::new(wire.clone()),
            images: ImageServiceClient::new(wire.clone()),
            hosts: HostServiceClient::new(wire.clone()),
            keys: KeyPairServiceClient::new(wire.clone()),
            tags: TagServiceClient::new(wire.clone()),
            accounts: AccountServiceClient::new(wire.clone()),
            types: InstanceTypeServiceClient::new(wire.clone()),
            volumes: VolumeServiceClient::new(wire.clone()),
            snapshots: SnapshotServiceClient::new(wire.clone()),
            storage: StorageServiceClient::new(wire),
        }
    }

    pub async fn run(&mut self, request: v1::RunInstancesRequest) -> Result<v1::RunInstancesResponse, Status> {
        Ok(self.instances.run_instances(request).await?.into_inner())
    }

    pub async fn get(&mut self, id: &str) -> v1::Instance {
        let request = v1::GetInstanceRequest { instance_id: id.into() };
        self.instances.get_instance(request).await.unwrap().into_inner()
    }

    pub async fn list(&mut self) -> Vec<v1::Instance> {
        self.instances.list_instances(v1::ListInstancesRequest::default()).await.unwrap().into_inner().instances
    }

    /// Waits until an instance is as wanted.
    pub async fn wait_for(&mut self, id: &str, wanted: impl Fn(&v1::Instance) -> bool) -> v1::Instance {
        let request = v1::WatchInstancesRequest { instance_ids: vec![id.to_owned()] };
        let mut stream = self.instances.watch_instances(request).await.unwrap().into_inner();
        let mut last = None;
        let found = tokio::time::timeout(PATIENCE, async {
            while let Some(instance) = stream.message().await.unwrap() {
                if wanted(&instance) {
                    return Some(instance);
                }
                last = Some(instance);
            }
            None
        });
        match found.await {
            Ok(Some(instance)) => instance,
            _ => panic!("{id} never became as wanted; last seen: {last:?}"),
        }
    }

    pub async fn wait_state(&mut self, id: &str, state: v1::InstanceState) -> v1::Instance {
        self.wait_for(id, |instance| instance.state() == state).await
    }

    pub async fn stop(&mut self, id: &str) -> Result<v1::InstanceStateChange, Status> {
        let request = v1::StopInstancesRequest { instance_ids: vec![id.into()], force: false };
        Ok(self.instances.stop_instances(request).await?.into_inner().changes.remove(0))
    }

    pub async fn start(&mut self, id: &str) -> Result<v1::InstanceStateChange, Status> {
        let request = v1::StartInstancesRequest { instance_ids: vec![id.into()] };
        Ok(self.instances.start_instances(request).await?.into_inner().changes.remove(0))
    }

    pub async fn terminate(&mut self, id: &str) -> Result<v1::InstanceStateChange, Status> {
        let request = v1::TerminateInstancesRequest { instance_ids: vec![id.into()] };
        Ok(self.instances.terminate_instances(request).await?.into_inner().changes.remove(0))
    }

    /// Uploads a small raw disk.
    pub async fn import(&mut self, name: &str) -> v1::Image {
        let disk = disk_bytes();
        let image = self.import_bytes(header(name, disk.len() as u64), vec![disk]).await.unwrap();
        assert_eq!(image.state(), v1::ImageState::Available, "{image:?}");
        image
    }

    pub async fn import_bytes(
        &mut self,
        header: v1::ImportImageHeader,
        chunks: Vec<Vec<u8>>,
    ) -> Result<v1::Image, Status> {
        use v1::import_image_request::Message;
        let mut messages = vec![v1::ImportImageRequest { message: Some(Message::Header(header)) }];
        messages.extend(
            chunks.into_iter().map(|chunk| v1::ImportImageRequest { message: Some(Message::Chunk(chunk.into())) }),
        );
        let mut stream = self.images.import_image(tokio_stream::iter(messages)).await?.into_inner();
        let mut image = None;
        while let Some(answer) = stream.message().await? {
            image = answer.image.or(image);
        }
        Ok(image.expect("the last message carries the image"))
    }

    pub async fn host(&mut self, host: &str) -> v1::Host {
        self.hosts.get_host(v1::GetHostRequest { host: host.into() }).await.unwrap().into_inner()
    }

    pub async fn wait_host(&mut self, host: &str, wanted: impl Fn(&v1::Host) -> bool) -> v1::Host {
        let waited = tokio::time::timeout(PATIENCE, async {
            loop {
                let found = self.host(host).await;
                if wanted(&found) {
                    return found;
                }
                tokio::time::sleep(Duration::from_millis(20)).await;
            }
        });
        waited.await.expect("the host never became as wanted")
    }
}

/// One MiB that looks like a disk with a partition table.
pub fn disk_bytes() -> Vec<u8> {
    let mut disk = vec![0u8; 1 << 20];
    disk[510] = 0x55;
    disk[511] = 0xaa;
    disk[4096..4100].copy_from_slice(b"data");
    disk
}

pub fn header(name: &str, file_bytes: u64) -> v1::ImportImageHeader {
    v1::ImportImageHeader { name: name.into(), format: "raw".into(), file_bytes, ..Default::default() }
}

pub fn request(image: &v1::Image, kind: &str) -> v1::RunInstancesRequest {
    v1::RunInstancesRequest { image_id: image.image_id.clone(), instance_type: kind.into(), ..Default::default() }
}

/// EC2's code in an error.
pub fn reason(status: &Status) -> String {
    status.get_error_details().error_info().map(|info| info.reason.clone()).unwrap_or_default()
}

/// A running control plane.
pub struct Cloud {
    pub address: std::net::SocketAddr,
    pub credentials: Credentials,
    pub objects: Arc<dyn hearth_snapshot::ObjectStore>,
    shutdown: CancellationToken,
    serving: JoinHandle<Result<(), ControlError>>,
}

pub fn config(state_dir: &Path) -> ControlConfig {
    let mut config = ControlConfig::new(state_dir);
    config.listen = ([127, 0, 0, 1], 0).into();
    config.resync_interval = Duration::from_millis(200);
    config.host_timeout = Duration::from_secs(3);
    config
}

impl Cloud {
    pub async fn start(state_dir: &Path) -> Self {
        Self::start_with(config(state_dir)).await
    }

    pub async fn start_with(config: ControlConfig) -> Self {
        loop {
            match Control::start(config.clone()).await {
                Ok(control) => return Self::serve(control, &config),
                // The connections of the one before, in this same process, are not all gone yet.
                Err(ControlError::Store(hearth_store::Error::InUse { .. })) => {
                    tokio::time::sleep(Duration::from_millis(20)).await;
                }
                Err(error) => panic!("{error}"),
            }
        }
    }

    pub async fn start_on(config: ControlConfig, store: Arc<dyn Store>) -> Result<Self, ControlError> {
        let control = Control::start_with_store(config.clone(), store).await?;
        Ok(Self::serve(control, &config))
    }

    fn serve(control: Control, config: &ControlConfig) -> Self {
        let address = control.local_addr();
        let objects = control.objects();
        let text = std::fs::read_to_string(config.admin_credentials_path()).unwrap();
        let shutdown = CancellationToken::new();
        let serving = tokio::spawn(control.serve(shutdown.clone()));
        Self { address, credentials: serde_json::from_str(&text).unwrap(), objects, shutdown, serving }
    }

    pub fn tls(&self) -> ClientTlsConfig {
        ClientTlsConfig::new()
            .ca_certificate(Certificate::from_pem(&self.credentials.ca_certificate))
            .domain_name("localhost")
    }

    pub fn endpoint(&self, tls: ClientTlsConfig) -> Endpoint {
        Endpoint::from_shared(format!("https://{}", self.address)).unwrap().tls_config(tls).unwrap()
    }

    pub async fn channel(&self) -> Channel {
        self.endpoint(self.tls()).connect().await.unwrap()
    }

    pub async fn user(&self) -> User {
        self.user_with(&self.credentials.token.clone()).await
    }

    pub async fn user_with(&self, token: &str) -> User {
        User::new(self.channel().await, Some(format!("Bearer {token}")))
    }

    pub async fn join_token(&self) -> JoinToken {
        let mut user = self.user().await;
        let request = v1::CreateJoinTokenRequest { ttl_seconds: 0 };
        user.hosts.create_join_token(request).await.unwrap().into_inner().token.parse().unwrap()
    }

    /// Ends it as an operator would.
    pub async fn stop(self) -> Result<(), ControlError> {
        self.shutdown.cancel();
        self.serving.await.unwrap()
    }

    /// Waits until it ends by itself.
    pub async fn ended(self) -> Result<(), ControlError> {
        tokio::time::timeout(PATIENCE, self.serving).await.expect("it goes on").unwrap()
    }
}
