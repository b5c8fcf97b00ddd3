//! What exists before the first call: the cluster's record, the first operator account and its credentials file.

use std::io::ErrorKind;
use std::net::SocketAddr;

use hearth_proto::record::v1 as rec;
use hearth_store::{Leadership, Store, Txn};
use hearth_types::{Catalogue, Credentials};
use prost::Message;

use crate::auth;
use crate::clock;
use crate::config::ControlConfig;
use crate::core::{Core, encode, id_value};
use crate::error::ControlError;
use crate::files;
use crate::keys;
use crate::tables::SCHEMA_VERSION;

/// The first account, an operator.
pub(crate) const FIRST_ACCOUNT: &str = "000000000001";
const FIRST_ACCOUNT_NAME: &str = "default";

/// Makes the cluster's record and the first account, unless they exist.
pub(crate) async fn ensure_cluster(
    store: &dyn Store,
    leadership: &Leadership,
    region: &str,
) -> Result<rec::Cluster, ControlError> {
    let mut page_key = vec![0u8; 32];
    let mut storage_key = vec![0u8; 32];
    getrandom::fill(&mut storage_key)?;
    let mut id = [0u8; 8];
    getrandom::fill(&mut page_key)?;
    getrandom::fill(&mut id)?;
    let cluster = rec::Cluster {
        schema_version: SCHEMA_VERSION,
        cluster_id: hex::encode(id),
        region: region.to_owned(),
        page_key,
        storage_key,
    };
    let account = rec::Account {
        schema_version: SCHEMA_VERSION,
        account_id: FIRST_ACCOUNT.to_owned(),
        name: FIRST_ACCOUNT_NAME.to_owned(),
        is_operator: true,
        created_ms: clock::now_ms(),
    };
    let txn = Txn::new()
        .compare_absent(keys::CLUSTER)
        .put(keys::CLUSTER, encode(&cluster))
        .put(keys::account(FIRST_ACCOUNT), encode(&account))
        .put(keys::account_name(FIRST_ACCOUNT_NAME), id_value(FIRST_ACCOUNT))
        .guard(leadership);
    if store.txn(txn).await?.is_committed() {
        tracing::info!(cluster = cluster.cluster_id, account = FIRST_ACCOUNT, "made a new cluster");
        return Ok(cluster);
    }
    let kv = store.get(keys::CLUSTER).await?.ok_or(ControlError::Stopped("the making of the cluster's record"))?;
    let refuse = |reason: String| ControlError::Record { key: keys::CLUSTER.to_owned(), reason };
    let known = rec::Cluster::decode(kv.value).map_err(|error| refuse(error.to_string()))?;
    if known.region != region {
        return Err(refuse(format!("this cluster's region is {}, not {region}", known.region)));
    }
    if known.storage_key.is_empty() {
        return Err(refuse(
            "it has no storage key: this cluster was made by a release without snapshots; start a new one".to_owned(),
        ));
    }
    Ok(known)
}

/// Writes the first operator's credentials, with a new token when the file holds none that is valid.
pub(crate) async fn ensure_admin_credentials(core: &Core, endpoint: String) -> Result<(), ControlError> {
    let path = core.config.admin_credentials_path();
    let existing: Option<Credentials> = files::read_if_exists(&path)?.and_then(|text| serde_json::from_str(&text).ok());
    let valid = existing.clone().filter(|credentials| auth::account_of_token(core, &credentials.token).is_some());
    let (token, account_id) = match valid {
        Some(credentials) => (credentials.token, credentials.account_id),
        None => {
            let (token, hash) = auth::new_api_token()?;
            let record = rec::ApiToken {
                schema_version: SCHEMA_VERSION,
                account_id: FIRST_ACCOUNT.to_owned(),
                created_ms: clock::now_ms(),
                description: "made by the control plane for its first operator".to_owned(),
            };
            let txn = Txn::new().put(keys::api_token(&hash), encode(&record));
            core.commit(txn).await.map_err(|_| ControlError::Stopped("the making of the operator's token"))?;
            (token, FIRST_ACCOUNT.to_owned())
        }
    };
    let ca_certificate = core.pki.ca_pem().to_owned();
    let credentials = Credentials { endpoint, ca_certificate, token, account_id };
    if existing.as_ref() == Some(&credentials) {
        return Ok(());
    }
    let json = serde_json::to_vec_pretty(&credentials)
        .map_err(|error| ControlError::io("write", &path)(std::io::Error::new(ErrorKind::InvalidData, error)))?;
    files::write_atomically(&path, &json, 0o600)?;
    tracing::info!(path = %path.display(), "wrote the operator's credentials");
    Ok(())
}

/// The built-in instance types and the operator's own.
pub(crate) fn load_catalogue(config: &ControlConfig) -> Result<Catalogue, ControlError> {
    let mut catalogue = Catalogue::built_in()?;
    if let Some(path) = &config.instance_types {
        let text = std::fs::read_to_string(path).map_err(ControlError::io("read", path))?;
        let own = Catalogue::parse(&text).map_err(|source| ControlError::Catalogue { path: path.clone(), source })?;
        catalogue.extend(own);
    }
    Ok(catalogue)
}

/// Names and addresses that the server's certificate is good for.
pub(crate) fn server_names(config: &ControlConfig, listening: SocketAddr) -> Vec<String> {
    let mut names: Vec<String> =
        [hearth_types::enrolment::CONTROL_SERVER_NAME, "localhost", "127.0.0.1", "::1"].map(str::to_owned).into();
    names.extend(nix::unistd::gethostname().ok().and_then(|name| name.into_string().ok()));
    if !listening.ip().is_unspecified() {
        names.push(listening.ip().to_string());
    }
    names.extend(config.server_names.iter().cloned());
    names.retain(|name| !name.is_empty());
    names.sort();
    names.dedup();
    names
}
