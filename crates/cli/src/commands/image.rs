//! `hearth image …`

use hearth_proto::v1::{
    BootOverride, CopyImageRequest, CreateImageRequest, CreateRestoreImageTaskRequest, CreateStoreImageTaskRequest,
    DeleteStoredImageRequest, DeregisterImageRequest, GetImageRequest, Image, RegisterImageRequest, StoreImageTask,
};
use hearth_types::volume::ROOT_DEVICE_NAME;
use serde_json::json;

use super::confirm::confirm;
use super::{Context, build, download, lookup, mapping, upload};
use crate::args::{ImageCommand, OutputForm, WaitFlags};
use crate::client::{client_token, filters, tags};
use crate::error::CliError;
use crate::human;
use crate::output;
use crate::wait::{
    self,
    image::{Available, Making},
    task::Done,
};

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
        ImageCommand::Register(args) => {
            // A bundle says itself what its root device is called.
            let default = if args.snapshot.is_some() { ROOT_DEVICE_NAME } else { "" };
            let root_device_name = args.root_device.unwrap_or_else(|| default.to_owned());
            let mut block_device_mappings = mapping::to_proto(client, &args.block_devices).await?;
            if let Some(snapshot) = &args.snapshot {
                let snapshot_id = lookup::snapshot(client, snapshot).await?;
                mapping::set_root_snapshot(&mut block_device_mappings, &root_device_name, snapshot_id)?;
            }
            let boot = BootOverride { extra_cmdline: args.register.extra_cmdline, cmdline: args.register.cmdline };
            let request = RegisterImageRequest {
                name: args.name,
                description: args.register.description,
                root_device_name,
                image_location: args.location.unwrap_or_default(),
                block_device_mappings,
                boot: Some(boot).filter(|boot| *boot != BootOverride::default()),
                tags: tags(&args.register.tags),
                client_token: client_token(args.client_token)?,
            };
            let image = client.unwrap(client.images().register_image(request).await)?;
            output::print_list(&[image], context.output)
        }
        ImageCommand::Create(args) => {
            let request = CreateImageRequest {
                instance_id: lookup::instance(client, &args.instance).await?,
                name: args.name,
                description: args.description,
                no_reboot: args.no_reboot,
                block_device_mappings: mapping::to_proto(client, &args.block_devices).await?,
                tags: tags(&args.tags),
                snapshot_tags: tags(&args.snapshot_tags),
                client_token: client_token(args.client_token)?,
            };
            let image = client.unwrap(client.images().create_image(request).await)?;
            finish(context, image, args.wait).await
        }
        ImageCommand::Copy {
            image,
            name,
            description,
            encrypted,
            tags: given,
            snapshot_tags,
            client_token: token,
            wait,
        } => {
            let request = CopyImageRequest {
                source_image_id: lookup::image(client, &image).await?,
                name,
                description,
                encrypted,
                tags: tags(&given),
                snapshot_tags: tags(&snapshot_tags),
                client_token: client_token(token)?,
            };
            let image = client.unwrap(client.images().copy_image(request).await)?;
            finish(context, image, wait).await
        }
        ImageCommand::Store { image, prefix, client_token: token, wait } => {
            let request = CreateStoreImageTaskRequest {
                image_id: lookup::image(client, &image).await?,
                prefix,
                client_token: client_token(token)?,
            };
            let mut task = client.unwrap(client.images().create_store_image_task(request).await)?;
            let mut waited = Ok(());
            if wait.wait {
                let ids = [task.image_id.clone()];
                waited = wait::until::<StoreImageTask>(client, &ids, Done, wait.timeout).await;
                let last = lookup::list_store_tasks(client, &ids, &[]).await.unwrap_or_default();
                task = last.into_iter().find(|last| last.task_id == task.task_id).unwrap_or(task);
            }
            output::print_list(&[task], context.output)?;
            waited
        }
        ImageCommand::StoreTasks { images, list } => {
            let mut ids = Vec::new();
            for image in &images {
                ids.push(lookup::image(client, image).await?);
            }
            let mut found = lookup::list_store_tasks(client, &ids, &filters(&list.filters)).await?;
            found.sort_by(|a, b| (&a.start_time, &a.task_id).cmp(&(&b.start_time, &b.task_id)));
            output::print_list(&found, context.output)
        }
        ImageCommand::RestoreTasks { images, list } => {
            let mut ids = Vec::new();
            for image in &images {
                ids.push(lookup::image(client, image).await?);
            }
            let mut found = lookup::list_restore_tasks(client, &ids, &filters(&list.filters)).await?;
            found.sort_by(|a, b| (&a.start_time, &a.task_id).cmp(&(&b.start_time, &b.task_id)));
            output::print_list(&found, context.output)
        }
        ImageCommand::DeleteStored { objects, yes } => {
            confirm(&format!("Delete {}?", objects.join(", ")), yes)?;
            for object in &objects {
                let request = DeleteStoredImageRequest { object_key: object.clone() };
                client.unwrap(client.images().delete_stored_image(request).await)?;
            }
            output::print_done(&objects, "object_key", "is deleted", context.output)
        }
        ImageCommand::Restore { object, name, tags: given, snapshot_tags, client_token: token, wait } => {
            let request = CreateRestoreImageTaskRequest {
                object_key: object,
                name,
                tags: tags(&given),
                snapshot_tags: tags(&snapshot_tags),
                client_token: client_token(token)?,
            };
            let image = client.unwrap(client.images().create_restore_image_task(request).await)?;
            finish(context, image, wait).await
        }
        ImageCommand::Export(args) => {
            let image_id = lookup::image(client, &args.image).await?;
            let file_bytes = download::export(client, &image_id, &args).await?;
            let (file, format) = (args.file.to_string_lossy(), args.format().name());
            output::print(&match context.output {
                OutputForm::Table | OutputForm::Wide => {
                    format!("{file}: {} of {image_id} as {format}\n", human::bytes(file_bytes))
                }
                OutputForm::Id => format!("{image_id}\n"),
                form => {
                    let value = json!({"image_id": image_id, "file": file, "format": format, "file_bytes": file_bytes});
                    output::render_value(&value, form)?
                }
            })
        }
        ImageCommand::Deregister { images, delete_snapshots, yes } => {
            let mut ids = Vec::new();
            for image in &images {
                ids.push(lookup::image(client, image).await?);
            }
            let more = if delete_snapshots { " and delete the snapshots" } else { "" };
            confirm(&format!("Deregister {}{more}?", images.join(", ")), yes)?;
            for image_id in &ids {
                let request = DeregisterImageRequest {
                    image_id: image_id.clone(),
                    delete_associated_snapshots: delete_snapshots,
                };
                client.unwrap(client.images().deregister_image(request).await)?;
            }
            output::print_done(&ids, "image_id", "is deregistered", context.output)
        }
    }
}

/// Prints a new image, after it is available if that is wanted.
async fn finish(context: &Context, mut image: Image, flags: WaitFlags) -> Result<(), CliError> {
    let client = &context.client;
    let ids = [image.image_id.clone()];
    let mut waited = Ok(());
    if flags.wait {
        waited = wait::until::<Making>(client, &ids, Available, flags.timeout).await;
        let request = GetImageRequest { image_id: image.image_id.clone() };
        image = client.unwrap(client.images().get_image(request).await).unwrap_or(image);
    }
    // A script that gave up waiting needs the id all the more.
    output::print_list(&[image], context.output)?;
    waited
}
