//! `hearth bundle …`

use hearth_proto::v1::{BundleTask, CancelBundleTaskRequest, CreateBundleRequest, DeleteBundleRequest};

use super::confirm::confirm;
use super::{Context, lookup};
use crate::args::BundleCommand;
use crate::client::{client_token, filters};
use crate::error::CliError;
use crate::output;
use crate::wait::{self, bundle::Complete};

pub async fn run(context: &Context, command: BundleCommand) -> Result<(), CliError> {
    let client = &context.client;
    match command {
        BundleCommand::Create(args) => {
            let mut request = CreateBundleRequest {
                prefix: args.prefix,
                name: args.name,
                client_token: client_token(args.client_token)?,
                ..CreateBundleRequest::default()
            };
            if let Some(image) = &args.image {
                request.image_id = lookup::image(client, image).await?;
            }
            if let Some(instance) = &args.instance {
                request.instance_id = lookup::instance(client, instance).await?;
            }
            let mut task = client.unwrap(client.images().create_bundle(request).await)?;
            let mut waited = Ok(());
            if args.wait.wait {
                let ids = [task.bundle_id.clone()];
                waited = wait::until::<BundleTask>(client, &ids, Complete, args.wait.timeout).await;
                let last = lookup::list_bundle_tasks(client, &ids, &[]).await.unwrap_or_default();
                task = last.into_iter().next().unwrap_or(task);
            }
            // A script that gave up waiting needs the id all the more.
            output::print_list(&[task], context.output)?;
            waited
        }
        BundleCommand::List { bundles, list } => {
            let mut found = lookup::list_bundle_tasks(client, &bundles, &filters(&list.filters)).await?;
            found.sort_by(|a, b| (&a.start_time, &a.bundle_id).cmp(&(&b.start_time, &b.bundle_id)));
            output::print_list(&found, context.output)
        }
        BundleCommand::Describe { bundle } => {
            let found = lookup::list_bundle_tasks(client, std::slice::from_ref(&bundle), &[]).await?;
            match found.first() {
                Some(task) => output::print_one(task, context.output),
                None => Err(CliError::NotFound {
                    message: format!("bundle task {bundle} does not exist"),
                    advice: "`hearth bundle list` shows yours.".to_owned(),
                }),
            }
        }
        BundleCommand::Delete { locations, yes } => {
            confirm(&format!("Delete {}?", locations.join(", ")), yes)?;
            for location in &locations {
                let request = DeleteBundleRequest { image_location: location.clone() };
                client.unwrap(client.images().delete_bundle(request).await)?;
            }
            output::print_done(&locations, "image_location", "is deleted", context.output)
        }
        BundleCommand::Cancel { bundles } => {
            for bundle in &bundles {
                let request = CancelBundleTaskRequest { bundle_id: bundle.clone() };
                client.unwrap(client.images().cancel_bundle_task(request).await)?;
            }
            output::print_done(&bundles, "bundle_id", "is called off", context.output)
        }
    }
}
