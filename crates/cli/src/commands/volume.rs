//! `hearth volume …`

use hearth_proto::v1::{
    AttachVolumeRequest, CreateVolumeRequest, DeleteVolumeRequest, DetachVolumeRequest, GetVolumeRequest,
    ModifyVolumeRequest, Volume, VolumeAttachment,
};

use super::confirm::confirm;
use super::{Context, lookup};
use crate::args::storage::{CreateVolumeArgs, ModifyVolumeArgs};
use crate::args::{VolumeCommand, WaitFlags};
use crate::client::{Client, client_token, filters, named_tags};
use crate::error::CliError;
use crate::output;
use crate::view::volume::{attachment_to, name};
use crate::wait::{self, volume::Goal};

pub async fn run(context: &Context, command: VolumeCommand) -> Result<(), CliError> {
    let client = &context.client;
    match command {
        VolumeCommand::Create(args) => create(context, *args).await,
        VolumeCommand::List { volumes, list } => {
            let ids = lookup::volumes(client, &volumes).await?;
            let wanted = filters(list.filters.iter().chain(&list.tags));
            let mut found = lookup::list_volumes(client, &ids, &wanted).await?;
            found.sort_by(|a, b| (&a.create_time, &a.volume_id).cmp(&(&b.create_time, &b.volume_id)));
            output::print_list(&found, context.output)
        }
        VolumeCommand::Describe { volume } => {
            let id = lookup::volume(client, &volume).await?;
            output::print_one(&get(client, &id).await?, context.output)
        }
        VolumeCommand::Delete { volumes, yes, wait } => delete(context, &volumes, yes, wait).await,
        VolumeCommand::Attach { volume, instance, device, delete_on_termination, wait } => {
            let request = AttachVolumeRequest {
                volume_id: lookup::volume(client, &volume).await?,
                instance_id: lookup::instance(client, &instance).await?,
                device: device.unwrap_or_default(),
                delete_on_termination,
            };
            attach(context, request, wait).await
        }
        VolumeCommand::Detach { volume, instance, device, force, yes, wait } => {
            let instance_id = match instance {
                Some(instance) => lookup::instance(client, &instance).await?,
                None => String::new(),
            };
            let volume_id = lookup::volume(client, &volume).await?;
            if force {
                confirm(&format!("Take {volume} away? What its guest has not flushed is lost."), yes)?;
            }
            let device = device.unwrap_or_default();
            detach(context, DetachVolumeRequest { volume_id, instance_id, device, force }, wait).await
        }
        VolumeCommand::Modify(args) => modify(context, args).await,
        VolumeCommand::Modifications { volumes, list } => {
            let ids = lookup::volumes(client, &volumes).await?;
            let mut found = lookup::list_modifications(client, &ids, &filters(&list.filters)).await?;
            found.sort_by(|a, b| (&a.start_time, &a.volume_id).cmp(&(&b.start_time, &b.volume_id)));
            output::print_list(&found, context.output)
        }
    }
}

async fn get(client: &Client, id: &str) -> Result<Volume, CliError> {
    client.unwrap(client.volumes().get_volume(GetVolumeRequest { volume_id: id.to_owned() }).await)
}

async fn follow(client: &Client, id: &str, goal: Goal, flags: WaitFlags) -> Result<(), CliError> {
    wait::until::<Volume>(client, &[id.to_owned()], goal, flags.timeout).await
}

async fn create(context: &Context, args: CreateVolumeArgs) -> Result<(), CliError> {
    let client = &context.client;
    let snapshot_id = match &args.content.snapshot {
        Some(snapshot) => lookup::snapshot(client, snapshot).await?,
        None => String::new(),
    };
    let request = CreateVolumeRequest {
        size_bytes: args.content.size.unwrap_or_default(),
        snapshot_id,
        availability_zone: args.zone.unwrap_or_default(),
        volume_type: args.volume_type,
        iops: args.iops,
        throughput_mibps: args.throughput,
        encrypted: args.encrypted,
        tags: named_tags(args.name.as_deref(), &args.tags),
        client_token: client_token(args.client_token)?,
        dry_run: args.dry_run,
        backend: args.backend.unwrap_or_default(),
    };
    let mut volume = match client.unwrap(client.volumes().create_volume(request).await) {
        Err(error) if args.dry_run && error.is_passed_dry_run() => {
            return output::print("nothing was made: this was a dry run, and it would have worked\n");
        }
        answer => answer?,
    };
    let mut waited = Ok(());
    if args.wait.wait {
        waited = follow(client, &volume.volume_id, Goal::Available, args.wait).await;
        volume = get(client, &volume.volume_id).await.unwrap_or(volume);
    }
    // A script that gave up waiting needs the id all the more.
    output::print_list(&[volume], context.output)?;
    waited
}

async fn delete(context: &Context, given: &[String], yes: bool, flags: WaitFlags) -> Result<(), CliError> {
    let client = &context.client;
    let ids = lookup::volumes(client, given).await?;
    let one = |volume: &Volume| match name(volume) {
        "" => volume.volume_id.clone(),
        name => format!("{name} ({})", volume.volume_id),
    };
    let found = lookup::list_volumes(client, &ids, &[]).await?;
    confirm(&format!("Delete {} and the data?", found.iter().map(one).collect::<Vec<_>>().join(", ")), yes)?;
    for volume_id in &ids {
        let request = DeleteVolumeRequest { volume_id: volume_id.clone() };
        client.unwrap(client.volumes().delete_volume(request).await)?;
    }
    if flags.wait {
        wait::until::<Volume>(client, &ids, Goal::Deleted, flags.timeout).await?;
    }
    let done = if flags.wait { "is deleted" } else { "is being deleted" };
    output::print_done(&ids, "volume_id", done, context.output)
}

async fn attach(context: &Context, request: AttachVolumeRequest, flags: WaitFlags) -> Result<(), CliError> {
    let client = &context.client;
    let (volume_id, instance_id) = (request.volume_id.clone(), request.instance_id.clone());
    let mut attachment = client.unwrap(client.volumes().attach_volume(request).await)?;
    if flags.wait {
        let goal = Goal::Attached { instance_id: instance_id.clone() };
        follow(client, &volume_id, goal, flags).await?;
        let volume = get(client, &volume_id).await?;
        attachment = attachment_to(&volume, &instance_id).cloned().unwrap_or(attachment);
    }
    let serial = attachment.serial.clone();
    output::print_list(&[attachment], context.output)?;
    if context.for_people() && !serial.is_empty() {
        eprintln!("\nin the guest: /dev/disk/by-id/virtio-{serial}");
    }
    Ok(())
}

async fn detach(context: &Context, request: DetachVolumeRequest, flags: WaitFlags) -> Result<(), CliError> {
    let client = &context.client;
    let volume_id = request.volume_id.clone();
    let mut attachment = client.unwrap(client.volumes().detach_volume(request).await)?;
    if flags.wait {
        let goal = Goal::Detached { instance_id: attachment.instance_id.clone() };
        follow(client, &volume_id, goal, flags).await?;
        attachment = VolumeAttachment { state: hearth_proto::v1::AttachmentState::Detached.into(), ..attachment };
    }
    output::print_list(&[attachment], context.output)
}

async fn modify(context: &Context, args: ModifyVolumeArgs) -> Result<(), CliError> {
    let client = &context.client;
    let volume_id = lookup::volume(client, &args.volume).await?;
    let request = ModifyVolumeRequest {
        volume_id: volume_id.clone(),
        size_bytes: args.shape.size,
        volume_type: args.shape.volume_type,
        iops: args.shape.iops,
        throughput_mibps: args.shape.throughput,
    };
    let mut modification = client.unwrap(client.volumes().modify_volume(request).await)?;
    let mut waited = Ok(());
    if args.wait.wait {
        waited = follow(client, &volume_id, Goal::Modified, args.wait).await;
        let volume = get(client, &volume_id).await.ok();
        modification = volume.and_then(|volume| volume.modification).unwrap_or(modification);
    }
    output::print_list(&[modification], context.output)?;
    waited
}
