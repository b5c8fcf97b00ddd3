//! `hearth account …`

use hearth_proto::v1::{Account, CreateAccountRequest, GetCallerIdentityRequest, ListAccountsRequest, PageRequest};
use serde_json::json;

use super::{Context, save_credentials};
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
                save_credentials(context, &path, &made.token, &account.account_id)?;
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
