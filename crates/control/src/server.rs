//! A control plane from start to end.

use std::net::SocketAddr;
use std::sync::Arc;
use std::time::Duration;

use hearth_proto::v1;
use hearth_store::sqlite::SqliteStore;
use hearth_store::{Store, leader};
use hearth_types::JoinToken;
use object_store::{ObjectStore, ObjectStoreExt, PutMode, PutOptions};
use tokio::net::TcpListener;
use tokio::task::JoinSet;
use tokio_util::sync::CancellationToken;
use tonic::codec::CompressionEncoding;
use tonic::transport::server::TcpIncoming;
use tonic::transport::{Certificate, Identity, Server, ServerTlsConfig};

use crate::bootstrap;
use crate::config::ControlConfig;
use crate::core::Core;
use crate::error::ControlError;
use crate::files;
use crate::layer::ApiLayer;
use crate::pki::{Pki, ServerIdentity};
use crate::reconcile;
use crate::service::Api;
use crate::storage::Storage;
use crate::tables::Tables;

/// Largest request of the user services; images come in chunks.
const MAX_REQUEST_BYTES: usize = 4 << 20;
/// Largest message of an agent: full reports.
const MAX_AGENT_MESSAGE_BYTES: usize = 8 << 20;
/// Largest object that an agent writes: parts of bundles have 10 MiB and a little.
const MAX_OBJECT_BYTES: usize = 32 << 20;
/// Largest set of request headers.
const MAX_HEADER_BYTES: u32 = 16 * 1024;
/// Calls at a time on one connection.
const MAX_STREAMS: u32 = 1000;
const KEEPALIVE_INTERVAL: Duration = Duration::from_secs(15);
const KEEPALIVE_TIMEOUT: Duration = Duration::from_secs(20);
/// Not shorter than agents' own: a busy machine must not make both begin anew again and again.
const HANDSHAKE_TIMEOUT: Duration = Duration::from_secs(30);
/// How long the object store has to answer at the start.
const STORE_TIMEOUT: Duration = Duration::from_secs(30);
/// Object that says whose store it is: the cluster's id.
const OWNER_OBJECT: &str = "cluster";
/// How long running calls may go on after a shutdown was asked for.
const DRAIN_TIMEOUT: Duration = Duration::from_secs(5);

/// A control plane that holds its store, leads its region and has its port, but does not answer before [`Self::serve`].
/// Dropping it ends it like a crash: nothing is lost, leadership is taken over by the next start.
pub struct Control {
    core: Arc<Core>,
    /// Until it serves.
    listener: Option<TcpListener>,
    address: SocketAddr,
    identity: ServerIdentity,
    tasks: JoinSet<()>,
}

impl Drop for Control {
    fn drop(&mut self) {
        self.core.stop.cancel();
    }
}

impl Control {
    /// Opens (or makes) everything in the state folder, waits for leadership and takes the port.
    ///
    /// # Errors
    /// Every [`ControlError`]: what it finds is used whole or not at all.
    pub async fn start(config: ControlConfig) -> Result<Self, ControlError> {
        files::make_dir(&config.state_dir)?;
        let store = SqliteStore::open(config.store_path())?;
        Self::start_with_store(config, Arc::new(store)).await
    }

    /// [`Self::start`] with a store that is open already.
    ///
    /// # Errors
    /// As [`Self::start`].
    pub async fn start_with_store(config: ControlConfig, store: Arc<dyn Store>) -> Result<Self, ControlError> {
        check(&config)?;
        for folder in [config.state_dir.clone(), config.spool_dir()] {
            files::make_dir(&folder)?;
        }
        let catalogue = bootstrap::load_catalogue(&config)?;
        let leadership = leader::campaign(store.as_ref(), &config.name, config.leader_ttl).await?;
        tracing::info!(term = leadership.term, name = config.name, "leads");
        let cluster = bootstrap::ensure_cluster(store.as_ref(), &leadership, &config.region).await?;
        let pki = Pki::open(&config.state_dir.join("pki"), &cluster.cluster_id)?;
        let listener = TcpListener::bind(config.listen)
            .await
            .map_err(|source| ControlError::Listen { address: config.listen, source })?;
        let address =
            listener.local_addr().map_err(|source| ControlError::Listen { address: config.listen, source })?;
        let identity = pki.server_identity(&bootstrap::server_names(&config, address))?;
        let (kvs, revision) = hearth_store::list(store.as_ref(), "/").await?;
        let tables = Tables::load(&kvs)?;
        let endpoint =
            config.public_endpoint.clone().unwrap_or_else(|| format!("https://localhost:{}", address.port()));
        let stop = CancellationToken::new();
        let url = config.object_store_url();
        let objects = hearth_snapshot::open_store(&url, &config.object_store_options)?;
        claim_store(&url, &objects, &cluster.cluster_id).await?;
        let storage = Storage::new(url, objects, cluster.storage_key);
        let core = Arc::new(Core::new(config, catalogue, pki, storage, store, leadership, tables, revision, stop));

        let mut tasks = JoinSet::new();
        let follower = core.clone();
        tasks.spawn(async move {
            let error = follower.follow().await;
            follower.die(error);
        });
        let holder = core.clone();
        tasks.spawn(async move {
            let error = holder.hold_leadership().await;
            holder.die(error);
        });
        let control = Self { core, listener: Some(listener), address, identity, tasks };
        reconcile::images::clean_up_after_crash(&control.core).await?;
        bootstrap::ensure_admin_credentials(&control.core, endpoint).await?;
        Ok(control)
    }

    /// Where it listens.
    pub fn local_addr(&self) -> SocketAddr {
        self.address
    }

    /// The cluster's CA certificate, PEM.
    pub fn ca_certificate(&self) -> &str {
        self.core.pki.ca_pem()
    }

    /// The object store that holds snapshots, for an agent in the same process.
    pub fn objects(&self) -> Arc<dyn hearth_snapshot::ObjectStore> {
        self.core.storage.objects.clone()
    }

    /// Makes a one-time token with which one agent may join within `ttl`.
    ///
    /// # Errors
    /// [`ControlError::Stopped`] when the store does not take it.
    pub async fn create_join_token(&self, ttl: Duration) -> Result<JoinToken, ControlError> {
        let made = crate::service::enroll::create_join_token(&self.core, ttl).await;
        made.map(|(token, _)| token).map_err(|error| {
            tracing::error!(%error, "no join token");
            ControlError::Stopped("the making of a join token")
        })
    }

    /// Answers calls until `shutdown` is cancelled (`Ok`), or the store or leadership is lost.
    ///
    /// # Errors
    /// What made it stop.
    pub async fn serve(mut self, shutdown: CancellationToken) -> Result<(), ControlError> {
        let core = self.core.clone();
        let identity = Identity::from_pem(&self.identity.chain_pem, &self.identity.key_pem);
        let tls = ServerTlsConfig::new()
            .identity(identity)
            .client_ca_root(Certificate::from_pem(core.pki.ca_pem()))
            .client_auth_optional(true)
            .timeout(HANDSHAKE_TIMEOUT);
        let reflection = tonic_reflection::server::Builder::configure()
            .register_encoded_file_descriptor_set(hearth_proto::DESCRIPTORS)
            .build_v1()
            .map_err(|error| ControlError::Setting { name: "reflection", reason: error.to_string() })?;
        let (health, health_service) = tonic_health::server::health_reporter();
        let api = Api { core: core.clone() };
        health.set_serving::<v1::instance_service_server::InstanceServiceServer<Api>>().await;
        health.set_serving::<v1::agent_service_server::AgentServiceServer<Api>>().await;

        macro_rules! service {
            ($module:ident, $server:ident) => {
                v1::$module::$server::new(api.clone()).max_decoding_message_size(MAX_REQUEST_BYTES)
            };
        }
        let router = Server::builder()
            .tls_config(tls)?
            .http2_keepalive_interval(Some(KEEPALIVE_INTERVAL))
            .http2_keepalive_timeout(Some(KEEPALIVE_TIMEOUT))
            .http2_max_header_list_size(MAX_HEADER_BYTES)
            .max_concurrent_streams(MAX_STREAMS)
            .layer(ApiLayer { core: core.clone() })
            .add_service(service!(account_service_server, AccountServiceServer))
            .add_service(service!(key_pair_service_server, KeyPairServiceServer))
            .add_service(service!(tag_service_server, TagServiceServer))
            .add_service(
                service!(image_service_server, ImageServiceServer).accept_compressed(CompressionEncoding::Zstd),
            )
            .add_service(service!(instance_service_server, InstanceServiceServer))
            .add_service(service!(instance_type_service_server, InstanceTypeServiceServer))
            .add_service(service!(volume_service_server, VolumeServiceServer))
            .add_service(service!(snapshot_service_server, SnapshotServiceServer))
            .add_service(service!(storage_service_server, StorageServiceServer))
            .add_service(
                service!(object_service_server, ObjectServiceServer).max_decoding_message_size(MAX_OBJECT_BYTES),
            )
            .add_service(service!(host_service_server, HostServiceServer))
            .add_service(
                v1::agent_service_server::AgentServiceServer::new(api.clone())
                    .max_decoding_message_size(MAX_AGENT_MESSAGE_BYTES),
            )
            .add_service(health_service)
            .add_service(reflection);

        reconcile::spawn(&core, &mut self.tasks);
        let listener = self.listener.take().ok_or(ControlError::Stopped("the listener"))?;
        let incoming = TcpIncoming::from(listener).with_nodelay(Some(true));
        let stop = core.stop.clone();
        let serving = router.serve_with_incoming_shutdown(incoming, stop.clone().cancelled_owned());
        tracing::info!(address = %self.address, "serves");
        tokio::pin!(serving);
        let served = tokio::select! {
            served = &mut serving => Some(served),
            () = shutdown.cancelled() => None,
            () = stop.cancelled() => None,
        };
        stop.cancel();
        let drained = match served {
            Some(served) => served,
            // Who stays longer is cut off.
            None => tokio::time::timeout(DRAIN_TIMEOUT, &mut serving).await.unwrap_or(Ok(())),
        };
        // Calls and uploads that were cut off still put things in order; the tables must be fed meanwhile.
        core.tasks.close();
        if tokio::time::timeout(DRAIN_TIMEOUT, core.tasks.wait()).await.is_err() {
            tracing::warn!(tasks = core.tasks.len(), "work goes on that will be cut off");
        }
        self.tasks.shutdown().await;
        match core.take_fatal() {
            Some(error) => return Err(error),
            None => core.resign().await,
        }
        drained?;
        tracing::info!(term = core.term(), "the control plane has ended as asked; leadership is given up");
        Ok(())
    }
}

/// [`Control::start`] and [`Control::serve`].
///
/// # Errors
/// Those of both.
pub async fn run(config: ControlConfig, shutdown: CancellationToken) -> Result<(), ControlError> {
    let control = tokio::select! {
        control = Control::start(config) => control?,
        () = shutdown.cancelled() => return Ok(()),
    };
    control.serve(shutdown).await
}

/// Makes sure that the object store answers and is this cluster's: what another one's garbage collector does not know, it deletes.
async fn claim_store(url: &str, objects: &Arc<dyn ObjectStore>, cluster_id: &str) -> Result<(), ControlError> {
    let refuse =
        |reason: String| Err(ControlError::Setting { name: "object_store", reason: format!("{url}: {reason}") });
    let path = object_store::path::Path::from(OWNER_OBJECT);
    let claim = async {
        let found = match objects.get(&path).await {
            Err(object_store::Error::NotFound { .. }) => {
                let options = PutOptions { mode: PutMode::Create, ..PutOptions::default() };
                match objects.put_opts(&path, cluster_id.to_owned().into(), options).await {
                    Ok(_) => return Ok(cluster_id.to_owned()),
                    // Somebody else was faster, or the service cannot tell.
                    Err(object_store::Error::AlreadyExists { .. } | object_store::Error::Precondition { .. }) => {}
                    Err(object_store::Error::NotImplemented { .. } | object_store::Error::NotSupported { .. }) => {
                        objects.put(&path, cluster_id.to_owned().into()).await?;
                    }
                    Err(error) => return Err(error),
                }
                objects.get(&path).await?
            }
            found => found?,
        };
        Ok(String::from_utf8_lossy(&found.bytes().await?).trim().to_owned())
    };
    match tokio::time::timeout(STORE_TIMEOUT, claim).await {
        Ok(Ok(owner)) if owner == cluster_id => Ok(()),
        Ok(Ok(owner)) => refuse(format!(
            "it holds the snapshots of another cluster ({owner:.32}), this is {cluster_id}; use another prefix"
        )),
        Ok(Err(error)) => refuse(error.to_string()),
        Err(_) => refuse(format!("it has not answered within {} s", STORE_TIMEOUT.as_secs())),
    }
}

fn check(config: &ControlConfig) -> Result<(), ControlError> {
    let refuse = |name, reason: &str| Err(ControlError::Setting { name, reason: reason.to_owned() });
    for (name, most) in [
        ("max_concurrent_imports", config.max_concurrent_imports),
        ("max_transfers_per_account", config.max_transfers_per_account),
        ("max_concurrent_tasks", config.max_concurrent_tasks),
        ("max_tasks_per_account", config.max_tasks_per_account),
    ] {
        if most == 0 {
            return refuse(name, "must be at least 1");
        }
    }
    if config.region.is_empty() || config.region.len() > 64 {
        return refuse("region", "must have 1..=64 characters");
    }
    if config.client_token_ttl < Duration::from_secs(24 * 3600) {
        return refuse("client_token_ttl", "must be at least 24 hours");
    }
    if config.session_timeout < Duration::from_secs(1) || config.resync_interval < Duration::from_millis(10) {
        return refuse("session_timeout", "time-outs are too short");
    }
    Ok(())
}
