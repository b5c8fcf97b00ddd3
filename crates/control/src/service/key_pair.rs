//! Key pairs: public SSH keys that images put into new instances.

use hearth_proto::record::v1 as rec;
use hearth_proto::v1;
use hearth_store::Txn;
use hearth_types::KeyPairId;
use ssh_key::private::{Ed25519Keypair, KeypairData};
use ssh_key::{Algorithm, HashAlg, LineEnding, PrivateKey, PublicKey};
use tonic::{Request, Response, Status};

use super::Api;
use crate::api_error::{ApiError, ApiResult};
use crate::auth;
use crate::check;
use crate::clock;
use crate::core::{Commit, encode, id_value};
use crate::keys;
use crate::paging::Pager;
use crate::tables::{SCHEMA_VERSION, Tables, Versioned};

const FILTERS: [&str; 6] = ["key-pair-id", "key-name", "fingerprint", "tag-key", "tag-value", "tag:"];
/// Longest accepted public key line in bytes.
const MAX_PUBLIC_KEY_BYTES: usize = 8 * 1024;
/// Shortest accepted RSA modulus.
const MIN_RSA_BITS: usize = 2048;

fn view(key: &rec::KeyPair) -> v1::KeyPair {
    v1::KeyPair {
        key_pair_id: key.key_pair_id.clone(),
        name: key.name.clone(),
        fingerprint: key.fingerprint.clone(),
        public_key: key.public_key.clone(),
        key_type: key.key_type.clone(),
        tags: key.tags.clone(),
        creation_date: clock::rfc3339(key.created_ms),
    }
}

/// An account's key pair by name or id.
pub(crate) fn find<'a>(tables: &'a Tables, account: &str, name_or_id: &str) -> Option<&'a Versioned<rec::KeyPair>> {
    let own = |key: &&Versioned<rec::KeyPair>| key.account_id == account;
    tables
        .key_pairs
        .get(name_or_id)
        .filter(own)
        .or_else(|| tables.key_pairs.values().filter(own).find(|key| key.name == name_or_id))
}

fn generate(comment: &str) -> ApiResult<(PublicKey, String)> {
    let failed = |error: ssh_key::Error| ApiError::internal(format!("make an SSH key: {error}"));
    let mut seed = [0u8; 32];
    getrandom::fill(&mut seed)?;
    let pair = KeypairData::Ed25519(Ed25519Keypair::from_seed(&seed));
    let private = PrivateKey::new(pair, comment).map_err(failed)?;
    let pem = private.to_openssh(LineEnding::LF).map_err(failed)?;
    Ok((private.public_key().clone(), pem.to_string()))
}

fn parse_public(line: &str) -> ApiResult<(PublicKey, &'static str)> {
    let refuse = |why: String| ApiError::new(tonic::Code::InvalidArgument, "InvalidKey.Format", why);
    if line.len() > MAX_PUBLIC_KEY_BYTES {
        return Err(refuse(format!("public_key has more than {MAX_PUBLIC_KEY_BYTES} bytes")));
    }
    let key = PublicKey::from_openssh(line.trim())
        .map_err(|error| refuse(format!("public_key is not a line such as 'ssh-ed25519 AAAA… comment': {error}")))?;
    let kind = match key.algorithm() {
        Algorithm::Ed25519 => "ed25519",
        Algorithm::Ecdsa { .. } => "ecdsa",
        Algorithm::Rsa { .. } => {
            let bits =
                key.key_data().rsa().and_then(|rsa| rsa.n.as_positive_bytes()).map_or(0, |bytes| bytes.len() * 8);
            if bits < MIN_RSA_BITS {
                return Err(refuse(format!("public_key is RSA with {bits} bits; use at least {MIN_RSA_BITS}")));
            }
            "rsa"
        }
        other => return Err(refuse(format!("public_key is of type {other}; use ed25519, ecdsa or rsa"))),
    };
    Ok((key, kind))
}

impl Api {
    async fn register_key(
        &self,
        account: &str,
        name: String,
        tags: Vec<v1::Tag>,
        key: &PublicKey,
        kind: &str,
    ) -> ApiResult<v1::KeyPair> {
        let failed = |error: ssh_key::Error| ApiError::internal(format!("write an SSH key: {error}"));
        let record = rec::KeyPair {
            schema_version: SCHEMA_VERSION,
            key_pair_id: KeyPairId::generate()?.to_string(),
            account_id: account.to_owned(),
            name,
            fingerprint: key.fingerprint(HashAlg::Sha256).to_string(),
            public_key: key.to_openssh().map_err(failed)?,
            key_type: kind.to_owned(),
            tags,
            created_ms: clock::now_ms(),
        };
        let id = &record.key_pair_id;
        let txn = Txn::new()
            .compare_absent(keys::key_pair_name(account, &record.name))
            .put(keys::key_pair_name(account, &record.name), id_value(id))
            .put(keys::key_pair(account, id), encode(&record));
        match self.core.commit(txn).await? {
            Commit::Done => Ok(view(&record)),
            Commit::Conflict(_) => {
                let message = format!("there is a key pair named '{}' already", record.name);
                Err(ApiError::duplicate("InvalidKeyPair.Duplicate", message).with("key_name", &record.name))
            }
        }
    }

    fn do_list_key_pairs(
        &self,
        account: &str,
        mut request: v1::ListKeyPairsRequest,
    ) -> ApiResult<v1::ListKeyPairsResponse> {
        let page = request.page.take();
        let pager = Pager::new(&self.core, "ListKeyPairs", account, &request, page.as_ref())?;
        let names = check::optional_ids("names", &request.names)?;
        let filters = check::filters(&request.filters, &FILTERS)?;
        let tables = self.core.tables();
        let missing: Vec<&str> =
            names.iter().filter(|name| find(&tables, account, name).is_none()).map(String::as_str).collect();
        if !missing.is_empty() {
            return Err(ApiError::not_found("InvalidKeyPair.NotFound", "key pair", &missing));
        }
        let found: Vec<_> = tables
            .key_pairs
            .iter()
            .filter(|(id, key)| {
                let named = |wanted: &String| *wanted == key.name || *wanted == key.key_pair_id;
                pager.wants(id)
                    && key.account_id == account
                    && (names.is_empty() || names.iter().any(named))
                    && filters.matches(|name| match name {
                        "key-pair-id" => vec![key.key_pair_id.as_str().into()],
                        "key-name" => vec![key.name.as_str().into()],
                        "fingerprint" => vec![key.fingerprint.as_str().into()],
                        other => check::tag_values(&key.tags, other).unwrap_or_default(),
                    })
            })
            .collect();
        let (key_pairs, page) = pager.collect(found.into_iter().map(|(id, key)| (id.as_str(), view(key))));
        Ok(v1::ListKeyPairsResponse { key_pairs, page })
    }
}

#[tonic::async_trait]
impl v1::key_pair_service_server::KeyPairService for Api {
    async fn create_key_pair(
        &self,
        request: Request<v1::CreateKeyPairRequest>,
    ) -> Result<Response<v1::CreateKeyPairResponse>, Status> {
        let caller = auth::caller(&request)?;
        let request = request.into_inner();
        check::name("name", &request.name)?;
        check::tags(&request.tags)?;
        let (public, private_key) = generate(&request.name)?;
        let key_pair = self.register_key(&caller.account_id, request.name, request.tags, &public, "ed25519").await?;
        Ok(Response::new(v1::CreateKeyPairResponse { key_pair: Some(key_pair), private_key }))
    }

    async fn import_key_pair(
        &self,
        request: Request<v1::ImportKeyPairRequest>,
    ) -> Result<Response<v1::KeyPair>, Status> {
        let caller = auth::caller(&request)?;
        let request = request.into_inner();
        check::name("name", &request.name)?;
        check::tags(&request.tags)?;
        let (public, kind) = parse_public(&request.public_key)?;
        Ok(Response::new(self.register_key(&caller.account_id, request.name, request.tags, &public, kind).await?))
    }

    async fn list_key_pairs(
        &self,
        request: Request<v1::ListKeyPairsRequest>,
    ) -> Result<Response<v1::ListKeyPairsResponse>, Status> {
        let caller = auth::caller(&request)?;
        Ok(Response::new(self.do_list_key_pairs(&caller.account_id, request.into_inner())?))
    }

    async fn delete_key_pair(
        &self,
        request: Request<v1::DeleteKeyPairRequest>,
    ) -> Result<Response<v1::DeleteKeyPairResponse>, Status> {
        let account = auth::caller(&request)?.account_id;
        let wanted = request.into_inner().key_pair;
        check::name("key_pair", &wanted)?;
        self.core
            .update(|tables| {
                let Some(key) = find(tables, &account, &wanted) else { return Ok((None, ())) };
                let record = keys::key_pair(&account, &key.key_pair_id);
                let txn = Txn::new()
                    .compare_mod_revision(&record, key.revision)
                    .delete(&record)
                    .delete(keys::key_pair_name(&account, &key.name));
                Ok((Some(txn), ()))
            })
            .await?;
        Ok(Response::new(v1::DeleteKeyPairResponse {}))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_generated_key_reads_back() {
        let (public, pem) = generate("a key").unwrap();
        let private = PrivateKey::from_openssh(&pem).unwrap();
        assert_eq!(private.public_key().key_data(), public.key_data());
        let line = public.to_openssh().unwrap();
        let (read, kind) = parse_public(&line).unwrap();
        assert_eq!((read.key_data(), kind), (public.key_data(), "ed25519"));
    }

    #[test]
    fn other_texts_are_no_public_keys() {
        let long = "x".repeat(MAX_PUBLIC_KEY_BYTES + 1);
        for line in ["", "ssh-rsa", "ssh-ed25519 AAAA", "-----BEGIN OPENSSH PRIVATE KEY-----", &long] {
            assert_eq!(parse_public(line).unwrap_err().reason(), "InvalidKey.Format", "{line:.40}");
        }
    }
}
