//! Accounts.

use hearth_proto::record::v1 as rec;
use hearth_proto::v1;
use hearth_store::Txn;
use tonic::{Request, Response, Status};

use super::Api;
use crate::api_error::{ApiError, ApiResult};
use crate::auth;
use crate::check;
use crate::clock;
use crate::core::{Commit, encode, id_value};
use crate::keys;
use crate::paging::Pager;
use crate::tables::SCHEMA_VERSION;

fn view(account: &rec::Account) -> v1::Account {
    v1::Account {
        account_id: account.account_id.clone(),
        name: account.name.clone(),
        is_operator: account.is_operator,
        creation_date: clock::rfc3339(account.created_ms),
    }
}

/// A random 12-digit account id that does not look like the first ones.
fn new_account_id() -> ApiResult<String> {
    let mut bytes = [0u8; 8];
    getrandom::fill(&mut bytes)?;
    Ok(format!("{}", 100_000_000_000 + u64::from_le_bytes(bytes) % 900_000_000_000))
}

impl Api {
    async fn do_create_account(&self, request: v1::CreateAccountRequest) -> ApiResult<v1::CreateAccountResponse> {
        check::name("name", &request.name)?;
        let account = rec::Account {
            schema_version: SCHEMA_VERSION,
            account_id: new_account_id()?,
            name: request.name,
            is_operator: request.is_operator,
            created_ms: clock::now_ms(),
        };
        let (token, hash) = auth::new_api_token()?;
        let token_record = rec::ApiToken {
            schema_version: SCHEMA_VERSION,
            account_id: account.account_id.clone(),
            created_ms: account.created_ms,
            description: "made with the account".to_owned(),
        };
        let id = &account.account_id;
        let txn = Txn::new()
            .compare_absent(keys::account_name(&account.name))
            .compare_absent(keys::account(id))
            .put(keys::account_name(&account.name), id_value(id))
            .put(keys::account(id), encode(&account))
            .put(keys::api_token(&hash), encode(&token_record));
        match self.core.commit(txn).await? {
            Commit::Done => Ok(v1::CreateAccountResponse { account: Some(view(&account)), token }),
            Commit::Conflict(0) => {
                let message = format!("there is an account named '{}' already", account.name);
                Err(ApiError::duplicate("AccountAlreadyExists", message))
            }
            Commit::Conflict(_) => Err(ApiError::unavailable("try again")),
        }
    }
}

#[tonic::async_trait]
impl v1::account_service_server::AccountService for Api {
    async fn get_caller_identity(
        &self,
        request: Request<v1::GetCallerIdentityRequest>,
    ) -> Result<Response<v1::GetCallerIdentityResponse>, Status> {
        let caller = auth::caller(&request)?;
        let account = self.core.tables().accounts.get(&caller.account_id).map(|account| view(account));
        Ok(Response::new(v1::GetCallerIdentityResponse { account }))
    }

    async fn create_account(
        &self,
        request: Request<v1::CreateAccountRequest>,
    ) -> Result<Response<v1::CreateAccountResponse>, Status> {
        auth::operator(&request)?;
        Ok(Response::new(self.do_create_account(request.into_inner()).await?))
    }

    async fn create_token(
        &self,
        request: Request<v1::CreateTokenRequest>,
    ) -> Result<Response<v1::CreateTokenResponse>, Status> {
        let caller = auth::caller(&request)?;
        Ok(Response::new(self.do_create_token(&caller, request.into_inner()).await?))
    }

    async fn list_tokens(
        &self,
        request: Request<v1::ListTokensRequest>,
    ) -> Result<Response<v1::ListTokensResponse>, Status> {
        let caller = auth::caller(&request)?;
        Ok(Response::new(self.do_list_tokens(&caller, request.into_inner())?))
    }

    async fn revoke_token(
        &self,
        request: Request<v1::RevokeTokenRequest>,
    ) -> Result<Response<v1::RevokeTokenResponse>, Status> {
        let caller = auth::caller(&request)?;
        self.do_revoke_token(&caller, &request.get_ref().token_id).await?;
        Ok(Response::new(v1::RevokeTokenResponse {}))
    }

    async fn list_accounts(
        &self,
        request: Request<v1::ListAccountsRequest>,
    ) -> Result<Response<v1::ListAccountsResponse>, Status> {
        let caller = auth::operator(&request)?;
        let mut request = request.into_inner();
        let page = request.page.take();
        let pager = Pager::new(&self.core, "ListAccounts", &caller.account_id, &request, page.as_ref())?;
        let tables = self.core.tables();
        let accounts: Vec<_> = tables.accounts.iter().filter(|(id, _)| pager.wants(id)).collect();
        let (accounts, page) = pager.collect(accounts.into_iter().map(|(id, account)| (id.as_str(), view(account))));
        Ok(Response::new(v1::ListAccountsResponse { accounts, page }))
    }
}
