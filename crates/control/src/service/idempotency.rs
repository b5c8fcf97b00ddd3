//! Client tokens: the same token with the same request gives the same answer, with another request an error. The record is
//! written in the transaction that does the work, so there is no moment at which one exists without the other.

use std::collections::HashMap;
use std::sync::{Arc, Weak};

use hearth_proto::record::v1 as rec;
use hearth_store::Txn;
use parking_lot::Mutex;
use prost::Message;
use sha2::{Digest, Sha256};

use crate::api_error::{ApiError, ApiResult};
use crate::clock;
use crate::core::encode;
use crate::keys;
use crate::tables::{SCHEMA_VERSION, Tables};

/// Lets one call at a time work under a token: the others would claim room that they give back when they learn that they came
/// second, and could be refused for want of room meanwhile. Uniqueness does not rest on it.
#[derive(Default)]
pub(crate) struct TokenLocks(Mutex<HashMap<String, Weak<tokio::sync::Mutex<()>>>>);

impl TokenLocks {
    /// Waits for calls with the same token.
    pub async fn lock(&self, token: &ClientToken) -> tokio::sync::OwnedMutexGuard<()> {
        let lock = {
            let mut locks = self.0.lock();
            locks.retain(|_, lock| lock.strong_count() > 0);
            match locks.get(&token.key).and_then(Weak::upgrade) {
                Some(lock) => lock,
                None => {
                    let lock = Arc::new(tokio::sync::Mutex::new(()));
                    locks.insert(token.key.clone(), Arc::downgrade(&lock));
                    lock
                }
            }
        };
        lock.lock_owned().await
    }
}

/// A call's token and what it stands for.
#[derive(Clone, Debug)]
pub(crate) struct ClientToken {
    key: String,
    token: String,
    params_sha256: Vec<u8>,
}

impl ClientToken {
    /// `params` is the request without its token. `None` when the caller sent no token.
    pub fn new(account: &str, call: &str, token: &str, params: &impl Message) -> Option<Self> {
        (!token.is_empty()).then(|| Self {
            key: keys::client_token(account, call, token),
            token: token.to_owned(),
            params_sha256: Sha256::digest(params.encode_to_vec()).to_vec(),
        })
    }

    /// Ids of what an earlier call with this token made.
    pub fn replay(&self, tables: &Tables) -> ApiResult<Option<Vec<String>>> {
        match tables.client_tokens.get(&self.key) {
            None => Ok(None),
            Some(record) if record.params_sha256 == self.params_sha256 => Ok(Some(record.resource_ids.clone())),
            Some(_) => Err(ApiError::idempotent_mismatch(&self.token)),
        }
    }

    /// Adds the record to the transaction that makes `ids`.
    pub fn record(&self, txn: Txn, ids: &[String]) -> Txn {
        let record = rec::ClientToken {
            schema_version: SCHEMA_VERSION,
            params_sha256: self.params_sha256.clone(),
            resource_ids: ids.to_vec(),
            created_ms: clock::now_ms(),
        };
        txn.compare_absent(&self.key).put(&self.key, encode(&record))
    }
}
