//! Bearer tokens of accounts. Only their SHA-256 is kept; a token that is revoked is deleted, and with it all that is known of
//! it.

use std::collections::BTreeMap;

use hearth_proto::record::v1 as rec;
use hearth_proto::v1;
use hearth_store::Txn;

use super::Api;
use crate::api_error::{ApiError, ApiResult};
use crate::auth::{self, Caller};
use crate::check;
use crate::clock;
use crate::core::{Commit, encode};
use crate::keys;
use crate::paging::Pager;
use crate::tables::{SCHEMA_VERSION, Tables};

/// Most tokens of one account.
const MAX_TOKENS: usize = 100;
const MAX_DESCRIPTION_CHARS: usize = 255;

fn view(hash: &str, token: &rec::ApiToken, caller: &Caller) -> v1::ApiToken {
    let token_id = auth::token_id(hash);
    v1::ApiToken {
        is_callers: token_id == caller.token_id,
        token_id,
        account_id: token.account_id.clone(),
        description: token.description.clone(),
        creation_date: clock::rfc3339(token.created_ms),
    }
}

/// The account that a call is about: the caller's, or for operators any other one.
fn account_of(tables: &Tables, caller: &Caller, wanted: &str) -> ApiResult<String> {
    if wanted.is_empty() || wanted == caller.account_id {
        return Ok(caller.account_id.clone());
    }
    if !caller.is_operator {
        return Err(ApiError::unauthorized("only operator accounts may manage another account's tokens"));
    }
    match tables.accounts.contains_key(wanted) {
        true => Ok(wanted.to_owned()),
        false => {
            let wanted: String = wanted.chars().take(40).collect();
            Err(ApiError::not_found("InvalidAccountID.NotFound", "account", &[&wanted]))
        }
    }
}

impl Api {
    pub(crate) async fn do_create_token(
        &self,
        caller: &Caller,
        request: v1::CreateTokenRequest,
    ) -> ApiResult<v1::CreateTokenResponse> {
        check::text("description", &request.description, MAX_DESCRIPTION_CHARS)?;
        let account_id = account_of(&self.core.tables(), caller, &request.account_id)?;
        let count = self.core.tables().api_tokens.values().filter(|token| token.account_id == account_id).count();
        if count >= MAX_TOKENS {
            let message = format!("the account has {count} tokens of at most {MAX_TOKENS}; revoke what is not needed");
            return Err(ApiError::exhausted("TokenLimitExceeded", message).with("limit", MAX_TOKENS));
        }
        let (token, hash) = auth::new_api_token()?;
        let record = rec::ApiToken {
            schema_version: SCHEMA_VERSION,
            account_id,
            created_ms: clock::now_ms(),
            description: request.description,
        };
        let txn = Txn::new()
            .compare_exists(keys::account(&record.account_id))
            .compare_absent(keys::api_token(&hash))
            .put(keys::api_token(&hash), encode(&record));
        match self.core.commit(txn).await? {
            Commit::Done => Ok(v1::CreateTokenResponse { api_token: Some(view(&hash, &record, caller)), token }),
            Commit::Conflict(_) => Err(ApiError::unavailable("try again")),
        }
    }

    pub(crate) fn do_list_tokens(
        &self,
        caller: &Caller,
        mut request: v1::ListTokensRequest,
    ) -> ApiResult<v1::ListTokensResponse> {
        let page = request.page.take();
        let pager = Pager::new(&self.core, "ListTokens", &caller.account_id, &request, page.as_ref())?;
        let tables = self.core.tables();
        let account = account_of(&tables, caller, &request.account_id)?;
        let tokens: BTreeMap<String, v1::ApiToken> = tables
            .api_tokens
            .iter()
            .filter(|(_, token)| token.account_id == account)
            .map(|(hash, token)| (auth::token_id(hash), view(hash, token, caller)))
            .filter(|(id, _)| pager.wants(id))
            .collect();
        let (api_tokens, page) = pager.collect(tokens.iter().map(|(id, token)| (id.as_str(), token.clone())));
        Ok(v1::ListTokensResponse { api_tokens, page })
    }

    /// When this returns, the tables that every call is checked against lack the token.
    pub(crate) async fn do_revoke_token(&self, caller: &Caller, token_id: &str) -> ApiResult<()> {
        if token_id.is_empty() {
            return Err(ApiError::missing("token_id"));
        }
        self.core
            .update(|tables| {
                let mine = |token: &rec::ApiToken| caller.is_operator || token.account_id == caller.account_id;
                let found =
                    tables.api_tokens.iter().find(|(hash, token)| auth::token_id(hash) == token_id && mine(token));
                let Some((hash, token)) = found else {
                    let shown: String = token_id.chars().take(40).collect();
                    return Err(ApiError::not_found("InvalidTokenID.NotFound", "token", &[&shown]));
                };
                let key = keys::api_token(hash);
                Ok((Some(Txn::new().compare_mod_revision(&key, token.revision).delete(&key)), ()))
            })
            .await?;
        tracing::info!(token = token_id, by = caller.account_id, "an API token is revoked");
        Ok(())
    }
}
