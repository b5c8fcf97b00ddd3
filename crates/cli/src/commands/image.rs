//! `hearth image …`

use hearth_proto::v1::{DeregisterImageRequest, GetImageRequest};

use super::confirm::confirm;
use super::{Context, build, lookup, upload};
use crate::args::ImageCommand;
use crate::client::filters;
use crate::error::CliError;
use crate::output;

pub async fn run(context: &Context, command: ImageCommand) -> Result<(), CliError> {
    let client = &context.client;
    match command {
        ImageCommand::Import(args) => {
            let image = upload::import(client, args).await?;
            output::print_list(&[image], context.output)
        }
        ImageCommand::Build(args) => {
            let image = build::build(client, args).await?;
            output::print_list(&[image], context.output)
        }
        ImageCommand::List { images, list } => {
            let mut ids = Vec::new();
            for image in &images {
                ids.push(lookup::image(client, image).await?);
            }
            let mut found = lookup::list_images(client, &ids, &filters(list.filters.iter().chain(&list.tags))).await?;
            found.sort_by(|a, b| (&a.name, &a.creation_date).cmp(&(&b.name, &b.creation_date)));
            output::print_list(&found, context.output)
        }
        ImageCommand::Describe { image } => {
            let image_id = lookup::image(client, &image).await?;
            let found = client.unwrap(client.images().get_image(GetImageRequest { image_id }).await)?;
            output::print_one(&found, context.output)
        }
        ImageCommand::Deregister { images, yes } => {
            let mut ids = Vec::new();
            for image in &images {
                ids.push(lookup::image(client, image).await?);
            }
            confirm(&format!("Deregister {}?", images.join(", ")), yes)?;
            for image_id in ids {
                let request = DeregisterImageRequest { image_id: image_id.clone() };
                client.unwrap(client.images().deregister_image(request).await)?;
                output::print(&if context.for_people() {
                    format!("{image_id} is deregistered\n")
                } else {
                    format!("{image_id}\n")
                })?;
            }
            Ok(())
        }
    }
}
