//! `hearth key-pair …`

use hearth_proto::v1::{
    CreateKeyPairRequest, DeleteKeyPairRequest, ImportKeyPairRequest, KeyPair, ListKeyPairsRequest, PageRequest,
};
use serde_json::json;

use super::confirm::confirm;
use super::{Context, read_input, save_secret};
use crate::args::{KeyPairCommand, OutputForm};
use crate::client::{all_pages, filters, tags};
use crate::error::CliError;
use crate::output::{self, View};

const MAX_PUBLIC_KEY: usize = 64 << 10;

pub async fn run(context: &Context, command: KeyPairCommand) -> Result<(), CliError> {
    let client = &context.client;
    match command {
        KeyPairCommand::Create { name, save, tags: given } => {
            if save.as_ref().is_some_and(|path| path.exists()) {
                return Err(CliError::Usage("the file of --save exists already".to_owned()));
            }
            let request = CreateKeyPairRequest { name, tags: tags(&given) };
            let made = client.unwrap(client.key_pairs().create_key_pair(request).await)?;
            let key_pair = made.key_pair.unwrap_or_default();
            if let Some(path) = save {
                // The key exists nowhere else: better shown than lost.
                if let Err(error) = save_secret(&path, made.private_key.as_bytes()) {
                    output::print(&made.private_key)?;
                    return Err(error);
                }
                eprintln!("private key: {}", path.display());
                return output::print_list(&[key_pair], context.output);
            }
            match context.output {
                OutputForm::Json | OutputForm::Yaml => {
                    let value = json!({"key_pair": key_pair.value(), "private_key": made.private_key});
                    output::print(&output::render_value(&value, context.output)?)
                }
                _ => {
                    eprintln!("{} ({}): this private key is shown once, keep it", key_pair.name, key_pair.key_pair_id);
                    output::print(&made.private_key)
                }
            }
        }
        KeyPairCommand::Import { name, file, tags: given } => {
            let content = read_input(&file, MAX_PUBLIC_KEY, "public key")?;
            let public_key = String::from_utf8(content)
                .map_err(|_| CliError::Usage(format!("{} is no OpenSSH public key", file.display())))?;
            if public_key.contains("PRIVATE KEY") {
                return Err(CliError::Usage(format!(
                    "{} is a private key, which never leaves your machine: give the .pub file",
                    file.display()
                )));
            }
            let request = ImportKeyPairRequest { name, public_key: public_key.trim().to_owned(), tags: tags(&given) };
            let made = client.unwrap(client.key_pairs().import_key_pair(request).await)?;
            output::print_list(&[made], context.output)
        }
        KeyPairCommand::List { names, list } => {
            let wanted = filters(list.filters.iter().chain(&list.tags));
            let one_page = async |page: PageRequest| {
                let request = ListKeyPairsRequest { names: names.clone(), filters: wanted.clone(), page: Some(page) };
                let answer = client.unwrap(client.key_pairs().list_key_pairs(request).await)?;
                Ok((answer.key_pairs, answer.page))
            };
            let mut found: Vec<KeyPair> = all_pages(one_page).await?;
            found.sort_by(|a, b| a.name.cmp(&b.name));
            output::print_list(&found, context.output)
        }
        KeyPairCommand::Delete { key_pair, yes } => {
            confirm(&format!("Delete key pair {key_pair}?"), yes)?;
            let request = DeleteKeyPairRequest { key_pair: key_pair.clone() };
            client.unwrap(client.key_pairs().delete_key_pair(request).await)?;
            if context.for_people() { output::print(&format!("{key_pair} is deleted\n")) } else { Ok(()) }
        }
    }
}
