//! `hearth token …`

use hearth_proto::v1::{ApiToken, CreateTokenRequest, ListTokensRequest, PageRequest, RevokeTokenRequest};
use serde_json::{Value, json};

use super::{Context, save_credentials};
use crate::args::{OutputForm, TokenCommand};
use crate::client::all_pages;
use crate::error::CliError;
use crate::output::{self, View};

pub async fn run(context: &Context, command: TokenCommand) -> Result<(), CliError> {
    let client = &context.client;
    match command {
        TokenCommand::Create { description, account, save } => {
            if save.as_ref().is_some_and(|path| path.exists()) {
                return Err(CliError::Usage("the file of --save exists already".to_owned()));
            }
            let request = CreateTokenRequest { description, account_id: account.unwrap_or_default() };
            let made = client.unwrap(client.accounts().create_token(request).await)?;
            let api_token = made.api_token.unwrap_or_default();
            if let Some(path) = save {
                save_credentials(context, &path, &made.token, &api_token.account_id)?;
                return output::print_list(&[api_token], context.output);
            }
            match context.output {
                OutputForm::Json | OutputForm::Yaml => {
                    let value = json!({"api_token": api_token.value(), "token": made.token});
                    output::print(&output::render_value(&value, context.output)?)
                }
                OutputForm::Id => output::print(&format!("{}\n", api_token.token_id)),
                _ => {
                    output::print_list(&[api_token], context.output)?;
                    output::print(&format!("\ntoken (shown once): {}\n", made.token))
                }
            }
        }
        TokenCommand::List { account } => {
            let account_id = account.unwrap_or_default();
            let one_page = async |page: PageRequest| {
                let request = ListTokensRequest { account_id: account_id.clone(), page: Some(page) };
                let answer = client.unwrap(client.accounts().list_tokens(request).await)?;
                Ok((answer.api_tokens, answer.page))
            };
            let mut found: Vec<ApiToken> = all_pages(one_page).await?;
            found.sort_by(|a, b| (&a.creation_date, &a.token_id).cmp(&(&b.creation_date, &b.token_id)));
            output::print_list(&found, context.output)
        }
        TokenCommand::Revoke { tokens } => {
            let mut revoked = Vec::new();
            for token_id in tokens {
                let request = RevokeTokenRequest { token_id: token_id.clone() };
                client.unwrap(client.accounts().revoke_token(request).await)?;
                match context.output {
                    OutputForm::Table | OutputForm::Wide => output::print(&format!("{token_id} is revoked\n"))?,
                    OutputForm::Id => output::print(&format!("{token_id}\n"))?,
                    _ => revoked.push(json!({"token_id": token_id})),
                }
            }
            match context.output {
                OutputForm::Json | OutputForm::Yaml => {
                    output::print(&output::render_value(&Value::Array(revoked), context.output)?)
                }
                _ => Ok(()),
            }
        }
    }
}
