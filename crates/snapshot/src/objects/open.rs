//! Opening a store by its address.

use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use object_store::aws::{AmazonS3Builder, S3ConditionalPut};
use object_store::local::LocalFileSystem;
use object_store::memory::InMemory;
use object_store::prefix::PrefixStore;
use object_store::{BackoffConfig, Certificate, ClientOptions, ObjectStore, RetryConfig};
use url::Url;

use super::error::StorageError;

/// How to reach a store. Unset options of S3 fall back to nothing: the environment is not looked at.
#[derive(Clone, Debug, Default)]
pub struct StoreOptions {
    /// For `s3://` addresses.
    pub s3: S3Options,
    /// How long one call may be retried while the store answers with errors or not at all; `None` = 2 minutes.
    pub retry_timeout: Option<Duration>,
}

/// An S3 service and the right to use it.
#[derive(Clone, Default)]
pub struct S3Options {
    /// `https://host[:port]` of the service; `None` = Amazon's in `region`.
    pub endpoint: Option<String>,
    /// Region that requests are signed for; `None` = `us-east-1`, which most other services take.
    pub region: Option<String>,
    /// Access key id; `None` (with no secret) = unsigned requests.
    pub access_key_id: Option<String>,
    /// Secret access key.
    pub secret_access_key: Option<String>,
    /// Session token of temporary credentials.
    pub session_token: Option<String>,
    /// Take an `http://` endpoint: everything but the (encrypted) chunk content is then readable on the wire.
    pub allow_http: bool,
    /// `bucket.host` instead of `host/bucket`.
    pub virtual_hosted: bool,
    /// The service does not know `If-None-Match` on PUT: the check and the write are then two steps.
    pub no_conditional_put: bool,
    /// PEM certificates of the authorities to trust beside the system's.
    pub ca_pem: Option<Vec<u8>>,
}

impl std::fmt::Debug for S3Options {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("S3Options")
            .field("endpoint", &self.endpoint)
            .field("region", &self.region)
            .field("access_key_id", &self.access_key_id)
            .field("secret_access_key", &self.secret_access_key.as_ref().map(|_| "…"))
            .field("allow_http", &self.allow_http)
            .finish_non_exhaustive()
    }
}

/// Opens the store at `url`:
///
/// - `file:///folder`: a local folder, made if it is missing; every object is on disk (fsync) before a write is acknowledged;
/// - `s3://bucket/prefix`: any S3 service, see [`S3Options`];
/// - `memory:`: gone with the last handle, for tests.
///
/// Nothing is contacted; the first use shows whether an S3 service is there.
pub fn open_store(url: &str, options: &StoreOptions) -> Result<Arc<dyn ObjectStore>, StorageError> {
    let refuse = |reason: String| StorageError::Address { url: url.to_owned(), reason };
    let parsed = Url::parse(url).map_err(|error| refuse(error.to_string()))?;
    match parsed.scheme() {
        "memory" => Ok(Arc::new(InMemory::new())),
        "file" => {
            let folder = local_path(url).ok_or_else(|| refuse("write file:///folder".to_owned()))?;
            std::fs::create_dir_all(&folder).map_err(StorageError::io("make the folder", &folder))?;
            let store = LocalFileSystem::new_with_prefix(&folder).map_err(|error| refuse(error.to_string()))?;
            Ok(Arc::new(store.with_fsync(true).with_automatic_cleanup(true)))
        }
        "s3" => open_s3(&parsed, options).map_err(refuse),
        other => Err(refuse(format!("'{other}' is not known; there are file:///folder and s3://bucket/prefix"))),
    }
}

/// The folder of a `file://` address.
pub fn local_path(url: &str) -> Option<PathBuf> {
    let parsed = Url::parse(url).ok()?;
    if parsed.scheme() == "file" { parsed.to_file_path().ok() } else { None }
}

fn open_s3(url: &Url, options: &StoreOptions) -> Result<Arc<dyn ObjectStore>, String> {
    let bucket = url.host_str().filter(|host| !host.is_empty()).ok_or("write s3://bucket/prefix")?;
    // The HTTP client asks for the process's TLS provider; programs that set one have done so before.
    let _ = rustls::crypto::ring::default_provider().install_default();
    let s3 = &options.s3;
    let mut client = ClientOptions::new()
        .with_allow_http(s3.allow_http)
        .with_connect_timeout(Duration::from_secs(10))
        // 10 MiB on a line of 1 Mbit/s.
        .with_timeout(Duration::from_secs(120));
    if let Some(pem) = &s3.ca_pem {
        for certificate in Certificate::from_pem_bundle(pem).map_err(|error| error.to_string())? {
            client = client.with_root_certificate(certificate);
        }
    }
    let retry = RetryConfig {
        backoff: BackoffConfig {
            init_backoff: Duration::from_millis(100),
            max_backoff: Duration::from_secs(10),
            // The next pause is anything up to this times the last one: with less than e they do not grow.
            base: 3.,
        },
        // Pauses are random and often short: only the time says how long an outage is waited for.
        max_retries: usize::MAX,
        retry_timeout: options.retry_timeout.unwrap_or(Duration::from_secs(120)),
    };
    let mut builder = AmazonS3Builder::new()
        .with_bucket_name(bucket)
        .with_region(s3.region.as_deref().unwrap_or("us-east-1"))
        .with_allow_http(s3.allow_http)
        .with_virtual_hosted_style_request(s3.virtual_hosted)
        .with_client_options(client)
        .with_retry(retry);
    if let Some(endpoint) = &s3.endpoint {
        if endpoint.starts_with("http://") && !s3.allow_http {
            return Err(format!("{endpoint} is not encrypted; use https, or allow http explicitly"));
        }
        builder = builder.with_endpoint(endpoint);
    }
    builder = match (&s3.access_key_id, &s3.secret_access_key) {
        (Some(id), Some(secret)) => builder.with_access_key_id(id).with_secret_access_key(secret),
        (None, None) => builder.with_skip_signature(true),
        _ => return Err("an access key id needs its secret access key, and the other way round".to_owned()),
    };
    if let Some(token) = &s3.session_token {
        builder = builder.with_token(token);
    }
    if s3.no_conditional_put {
        builder = builder.with_conditional_put(S3ConditionalPut::Disabled);
    }
    let store = builder.build().map_err(|error| error.to_string())?;
    let prefix = url.path().trim_matches('/');
    if prefix.is_empty() {
        return Ok(Arc::new(store));
    }
    let prefix = object_store::path::Path::from_url_path(prefix).map_err(|error| error.to_string())?;
    Ok(Arc::new(PrefixStore::new(store, prefix)))
}

#[cfg(test)]
#[path = "open_test.rs"]
mod tests;
