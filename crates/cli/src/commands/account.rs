//! `hearth account …`

use hearth_proto::v1::{Account, CreateAccountRequest, GetCallerIdentityRequest, ListAccountsRequest, PageRequest};
use hearth_types::Credentials;
use serde_json::json;

use super::{Context, save_secret};
use crate::args::{AccountCommand, OutputForm};
use crate::client::all_pages;
use crate::error::CliError;
use crate::output::{self, View};

pub async fn run(context: &Context, command: AccountCommand) -> Result<(), CliError> {
    let client = &context.client;
    match command {
        AccountCommand::Whoami => {
            let answer = client.unwrap(client.accounts().get_caller_identity(GetCallerIdentityRequest {}).await)?;
            output::print_one(&answer.account.unwrap_or_default(), context.output)
        }
        AccountCommand::Create { name, operator, save } => {
            if save.as_ref().is_some_and(|path| path.exists()) {
                return Err(CliError::Usage("the file of --save exists already".to_owned()));
            }
            let request = CreateAccountRequest { name, is_operator: operator };
            let made = client.unwrap(client.accounts().create_account(request).await)?;
            let account = made.account.unwrap_or_default();
            if let Some(path) = save {
                let credentials = Credentials {
                    endpoint: context.connection.endpoint.clone(),
                    ca_certificate: context.connection.ca_certificate.clone().unwrap_or_default(),
                    token: made.token.clone(),
                    account_id: account.account_id.clone(),
                };
                let text = serde_json::to_string_pretty(&credentials)
                    .map_err(|error| CliError::Io { action: "write credentials".to_owned(), source: error.into() })?;
                if let Err(error) = save_secret(&path, (text + "\n").as_bytes()) {
                    output::print(&format!("{}\n", made.token))?;
                    return Err(error);
                }
                eprintln!("credentials: {} (use them with --credentials or HEARTH_CREDENTIALS)", path.display());
                return output::print_list(&[account], context.output);
            }
            match context.output {
                OutputForm::Json | OutputForm::Yaml => {
                    let value = json!({"account": account.value(), "token": made.token});
                    output::print(&output::render_value(&value, context.output)?)
                }
                OutputForm::Id => output::print(&format!("{}\n", account.account_id)),
                _ => {
                    output::print_list(&[account], context.output)?;
                    output::print(&format!("\ntoken (shown once): {}\n", made.token))
                }
            }
        }
        AccountCommand::List => {
            let one_page = async |page: PageRequest| {
                let answer =
                    client.unwrap(client.accounts().list_accounts(ListAccountsRequest { page: Some(page) }).await)?;
                Ok((answer.accounts, answer.page))
            };
            let found: Vec<Account> = all_pages(one_page).await?;
            output::print_list(&found, context.output)
        }
    }
}
