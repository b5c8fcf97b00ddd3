//! Calls to the control plane.

use std::time::Duration;

use hearth_proto::v1::account_service_client::AccountServiceClient;
use hearth_proto::v1::host_service_client::HostServiceClient;
use hearth_proto::v1::image_service_client::ImageServiceClient;
use hearth_proto::v1::instance_service_client::InstanceServiceClient;
use hearth_proto::v1::instance_type_service_client::InstanceTypeServiceClient;
use hearth_proto::v1::key_pair_service_client::KeyPairServiceClient;
use hearth_proto::v1::snapshot_service_client::SnapshotServiceClient;
use hearth_proto::v1::storage_service_client::StorageServiceClient;
use hearth_proto::v1::tag_service_client::TagServiceClient;
use hearth_proto::v1::volume_service_client::VolumeServiceClient;
use hearth_proto::v1::{Filter, PageRequest, PageResponse};
use hearth_types::credentials::AUTHORIZATION_METADATA;
use tonic::metadata::{Ascii, MetadataValue};
use tonic::service::Interceptor;
use tonic::service::interceptor::InterceptedService;
use tonic::transport::{Certificate, Channel, ClientTlsConfig, Endpoint};
use tonic::{Request, Response, Status};

use crate::args::types;
use crate::config::Connection;
use crate::error::CliError;

/// Answers may hold a thousand objects.
const MAX_ANSWER_BYTES: usize = 64 << 20;
const CONNECT_TIMEOUT: Duration = Duration::from_secs(10);

/// Puts the token on every call.
#[derive(Clone, Debug)]
pub struct Authorize {
    value: MetadataValue<Ascii>,
}

impl Interceptor for Authorize {
    fn call(&mut self, mut request: Request<()>) -> Result<Request<()>, Status> {
        request.metadata_mut().insert(AUTHORIZATION_METADATA, self.value.clone());
        Ok(request)
    }
}

type Service = InterceptedService<Channel, Authorize>;

/// A connection that is made at the first call.
#[derive(Clone, Debug)]
pub struct Client {
    endpoint: String,
    channel: Channel,
    authorize: Authorize,
}

macro_rules! services {
    ($($(#[$doc:meta])* $name:ident: $client:ident,)*) => {
        $($(#[$doc])* pub fn $name(&self) -> $client<Service> {
            $client::with_interceptor(self.channel.clone(), self.authorize.clone())
                .max_decoding_message_size(MAX_ANSWER_BYTES)
        })*
    };
}

impl Client {
    /// Prepares calls; needs no server yet.
    pub fn new(connection: &Connection) -> Result<Self, CliError> {
        let wrong =
            |error: &dyn std::error::Error| CliError::Usage(format!("endpoint {}: {error}", connection.endpoint));
        let mut endpoint = Endpoint::from_shared(connection.endpoint.clone())
            .map_err(|error| wrong(&error))?
            .connect_timeout(CONNECT_TIMEOUT)
            .keep_alive_while_idle(false)
            .http2_keep_alive_interval(Duration::from_secs(20))
            .user_agent(concat!("hearth/", env!("CARGO_PKG_VERSION")))
            .map_err(|error| wrong(&error))?;
        if let Some(pem) = connection.ca_certificate.as_ref().filter(|_| connection.endpoint.starts_with("https://")) {
            let tls = ClientTlsConfig::new().ca_certificate(Certificate::from_pem(pem));
            endpoint = endpoint.tls_config(tls).map_err(|error| wrong(&error))?;
        }
        let value = format!("Bearer {}", connection.token);
        let mut value: MetadataValue<Ascii> =
            value.parse().map_err(|_| CliError::Usage("the token holds characters that no token has".to_owned()))?;
        value.set_sensitive(true);
        Ok(Self {
            endpoint: connection.endpoint.clone(),
            channel: endpoint.connect_lazy(),
            authorize: Authorize { value },
        })
    }

    /// The answer, or what went wrong.
    pub fn unwrap<T>(&self, answer: Result<Response<T>, Status>) -> Result<T, CliError> {
        match answer {
            Ok(response) => Ok(response.into_inner()),
            Err(status) => Err(self.failure(status)),
        }
    }

    /// What went wrong.
    pub fn failure(&self, status: Status) -> CliError {
        CliError::from(status).at(&self.endpoint)
    }

    services! {
        /// Instances.
        instances: InstanceServiceClient,
        /// Instance types.
        instance_types: InstanceTypeServiceClient,
        /// Images.
        images: ImageServiceClient,
        /// Volumes.
        volumes: VolumeServiceClient,
        /// Snapshots.
        snapshots: SnapshotServiceClient,
        /// The object store.
        storage: StorageServiceClient,
        /// Hosts.
        hosts: HostServiceClient,
        /// Key pairs.
        key_pairs: KeyPairServiceClient,
        /// Tags.
        tags: TagServiceClient,
        /// Accounts.
        accounts: AccountServiceClient,
    }
}

/// Filters as the API has them.
pub fn filters<'a>(given: impl IntoIterator<Item = &'a types::Filter>) -> Vec<Filter> {
    given.into_iter().map(|filter| Filter { name: filter.name.clone(), values: filter.values.clone() }).collect()
}

/// Tags as the API has them.
pub fn tags(given: &[types::Tag]) -> Vec<hearth_proto::v1::Tag> {
    let tag =
        |tag: &types::Tag| hearth_proto::v1::Tag { key: tag.key.clone(), value: tag.value.clone().unwrap_or_default() };
    given.iter().map(tag).collect()
}

/// Tags with the name in front, which is the tag Name.
pub fn named_tags(name: Option<&str>, given: &[types::Tag]) -> Vec<hearth_proto::v1::Tag> {
    let name = name.map(|name| hearth_proto::v1::Tag { key: "Name".to_owned(), value: name.to_owned() });
    name.into_iter().chain(tags(given)).collect()
}

/// Calls `page` until there are no more pages.
pub async fn all_pages<T, F>(mut page: impl FnMut(PageRequest) -> F) -> Result<Vec<T>, CliError>
where
    F: Future<Output = Result<(Vec<T>, Option<PageResponse>), CliError>>,
{
    let mut all = Vec::new();
    let mut next_token = String::new();
    loop {
        let (items, next) = page(PageRequest { max_results: 0, next_token }).await?;
        all.extend(items);
        next_token = next.map(|page| page.next_token).unwrap_or_default();
        if next_token.is_empty() {
            return Ok(all);
        }
    }
}

/// The client token that was given, or a fresh one.
pub fn client_token(given: Option<String>) -> Result<String, CliError> {
    given.map_or_else(fresh_client_token, Ok)
}

/// A fresh client token, so that a call that is repeated after a lost answer has its effect once.
fn fresh_client_token() -> Result<String, CliError> {
    let mut bytes = [0u8; 16];
    getrandom::fill(&mut bytes).map_err(|error| CliError::Io {
        action: "get random numbers".to_owned(),
        source: std::io::Error::other(error.to_string()),
    })?;
    Ok(bytes.iter().map(|byte| format!("{byte:02x}")).collect())
}
