//! `hearth storage …`

use hearth_proto::v1::verify_snapshots_response::Message;
use hearth_proto::v1::{CollectGarbageRequest, GetStorageUsageRequest, VerifySnapshotsRequest, VerifySummary};

use super::meter::Meter;
use super::{Context, lookup};
use crate::args::{OutputForm, StorageCommand};
use crate::client::Client;
use crate::error::CliError;
use crate::output;
use crate::view::storage::{
    collected_value, collected_words, usage_rows, usage_value, usage_words, verified_value, verified_words,
};

pub async fn run(context: &Context, command: StorageCommand) -> Result<(), CliError> {
    let client = &context.client;
    let form = context.output;
    match command {
        StorageCommand::Df => {
            let usage = client.unwrap(client.storage().get_storage_usage(GetStorageUsageRequest {}).await)?;
            if matches!(form, OutputForm::Json | OutputForm::Yaml) {
                return output::print(&output::render_value(&usage_value(&usage), form)?);
            }
            output::print_list(&usage_rows(&usage), form)?;
            if context.for_people() {
                output::print(&format!("\n{}\n", usage_words(&usage)))?;
            }
            Ok(())
        }
        StorageCommand::Gc => {
            let done = client.unwrap(client.storage().collect_garbage(CollectGarbageRequest {}).await)?;
            output::print(&match form {
                OutputForm::Json | OutputForm::Yaml => output::render_value(&collected_value(&done), form)?,
                OutputForm::Table | OutputForm::Wide => collected_words(&done) + "\n",
                OutputForm::Id => String::new(),
            })
        }
        StorageCommand::Verify { snapshots } => {
            let snapshot_ids = lookup::snapshots(client, &snapshots).await?;
            let summary = verify(client, snapshot_ids).await?;
            output::print(&match form {
                OutputForm::Json | OutputForm::Yaml => output::render_value(&verified_value(&summary), form)?,
                OutputForm::Table | OutputForm::Wide => verified_words(&summary),
                OutputForm::Id => summary.findings.iter().map(|finding| format!("{finding}\n")).collect(),
            })?;
            match summary.findings.len() {
                0 => Ok(()),
                count => {
                    let message = match count {
                        1 => "1 object is missing or damaged".to_owned(),
                        count => format!("{count} objects are missing or damaged"),
                    };
                    Err(CliError::Failed { message, reason: String::new() })
                }
            }
        }
    }
}

async fn verify(client: &Client, snapshot_ids: Vec<String>) -> Result<VerifySummary, CliError> {
    let request = VerifySnapshotsRequest { snapshot_ids };
    let mut answers = client.unwrap(client.storage().verify_snapshots(request).await)?;
    let meter = Meter::new("verifying", 0);
    let outcome = loop {
        match answers.message().await {
            Ok(Some(answer)) => match answer.message {
                Some(Message::Progress(progress)) => {
                    meter.show(&progress.step, progress.done_bytes, progress.total_bytes)
                }
                Some(Message::Summary(summary)) => break Ok(summary),
                None => {}
            },
            Ok(None) => break Err(CliError::Program("the control plane ended the check without an answer".to_owned())),
            Err(status) => break Err(client.failure(status)),
        }
    };
    meter.bar.finish_and_clear();
    outcome
}
