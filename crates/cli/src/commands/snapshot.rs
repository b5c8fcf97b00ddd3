//! `hearth snapshot …`

use hearth_proto::v1::{
    CopySnapshotRequest, CreateSnapshotRequest, CreateSnapshotsRequest, DeleteSnapshotRequest,
    DisableFastSnapshotRestoresRequest, EnableFastSnapshotRestoresRequest, FastSnapshotRestore, GetSnapshotRequest,
    Snapshot,
};

use super::confirm::confirm;
use super::{Context, lookup};
use crate::args::{FastRestoreCommand, SnapshotCommand, WaitFlags};
use crate::client::{client_token, filters, named_tags};
use crate::error::CliError;
use crate::output::{self, View};
use crate::view::snapshot::name;
use crate::wait::{self, fast_restore::Whole, snapshot::Completed};

pub async fn run(context: &Context, command: SnapshotCommand) -> Result<(), CliError> {
    let client = &context.client;
    match command {
        SnapshotCommand::Create { volume, flags } => {
            let request = CreateSnapshotRequest {
                volume_id: lookup::volume(client, &volume).await?,
                description: flags.description,
                tags: named_tags(flags.name.as_deref(), &flags.tags),
                client_token: client_token(flags.client_token)?,
            };
            let made = client.unwrap(client.snapshots().create_snapshot(request).await)?;
            finish(context, vec![made], flags.wait).await
        }
        SnapshotCommand::CreateAll { instance, exclude_root, exclude, flags } => {
            let request = CreateSnapshotsRequest {
                instance_id: lookup::instance(client, &instance).await?,
                description: flags.description,
                exclude_boot_volume: exclude_root,
                exclude_data_volume_ids: lookup::volumes(client, &exclude).await?,
                tags: named_tags(flags.name.as_deref(), &flags.tags),
                client_token: client_token(flags.client_token)?,
            };
            let made = client.unwrap(client.snapshots().create_snapshots(request).await)?.snapshots;
            finish(context, made, flags.wait).await
        }
        SnapshotCommand::List { snapshots, list } => {
            let ids = lookup::snapshots(client, &snapshots).await?;
            let wanted = filters(list.filters.iter().chain(&list.tags));
            let mut found = lookup::list_snapshots(client, &ids, &wanted).await?;
            found.sort_by(|a, b| (&a.start_time, &a.snapshot_id).cmp(&(&b.start_time, &b.snapshot_id)));
            output::print_list(&found, context.output)
        }
        SnapshotCommand::Describe { snapshot } => {
            let snapshot_id = lookup::snapshot(client, &snapshot).await?;
            let found = client.unwrap(client.snapshots().get_snapshot(GetSnapshotRequest { snapshot_id }).await)?;
            output::print_one(&found, context.output)
        }
        SnapshotCommand::Delete { snapshots, yes } => {
            let ids = lookup::snapshots(client, &snapshots).await?;
            let one = |snapshot: &Snapshot| match name(snapshot) {
                "" => snapshot.snapshot_id.clone(),
                name => format!("{name} ({})", snapshot.snapshot_id),
            };
            let found = lookup::list_snapshots(client, &ids, &[]).await?;
            confirm(&format!("Delete {}?", found.iter().map(one).collect::<Vec<_>>().join(", ")), yes)?;
            for snapshot_id in &ids {
                let request = DeleteSnapshotRequest { snapshot_id: snapshot_id.clone() };
                client.unwrap(client.snapshots().delete_snapshot(request).await)?;
            }
            output::print_done(&ids, "snapshot_id", "is deleted", context.output)
        }
        SnapshotCommand::FastRestore(command) => fast_restore(context, command).await,
        SnapshotCommand::Copy { snapshot, encrypted, flags } => {
            let request = CopySnapshotRequest {
                source_snapshot_id: lookup::snapshot(client, &snapshot).await?,
                encrypted,
                description: flags.description,
                tags: named_tags(flags.name.as_deref(), &flags.tags),
                client_token: client_token(flags.client_token)?,
            };
            let made = client.unwrap(client.snapshots().copy_snapshot(request).await)?;
            finish(context, vec![made], flags.wait).await
        }
    }
}

/// Prints new snapshots, after they are completed if that is wanted.
async fn finish(context: &Context, mut made: Vec<Snapshot>, flags: WaitFlags) -> Result<(), CliError> {
    let client = &context.client;
    let mut waited = Ok(());
    if flags.wait {
        let ids: Vec<String> = made.iter().map(View::id).collect();
        waited = wait::until::<Snapshot>(client, &ids, Completed, flags.timeout).await;
        made = lookup::list_snapshots(client, &ids, &[]).await.unwrap_or(made);
    }
    // A script that gave up waiting needs the ids all the more.
    output::print_list(&made, context.output)?;
    waited
}

async fn fast_restore(context: &Context, command: FastRestoreCommand) -> Result<(), CliError> {
    let client = &context.client;
    match command {
        FastRestoreCommand::Enable { snapshots, places, wait } => {
            let snapshot_ids = lookup::snapshots(client, &snapshots).await?;
            let request = EnableFastSnapshotRestoresRequest {
                snapshot_ids: snapshot_ids.clone(),
                availability_zones: places.zones,
                hosts: places.hosts,
            };
            let made = client.unwrap(client.snapshots().enable_fast_snapshot_restores(request).await)?;
            let mut made = made.fast_snapshot_restores;
            let mut waited = Ok(());
            if wait.wait {
                let ids: Vec<String> = made.iter().map(View::id).collect();
                waited = wait::until::<FastSnapshotRestore>(client, &ids, Whole, wait.timeout).await;
                made = lookup::list_fast_restores(client, &snapshot_ids, &[]).await.unwrap_or(made);
            }
            output::print_list(&made, context.output)?;
            waited
        }
        FastRestoreCommand::Disable { snapshots, places } => {
            let ids = lookup::snapshots(client, &snapshots).await?;
            let request = DisableFastSnapshotRestoresRequest {
                snapshot_ids: ids.clone(),
                availability_zones: places.zones,
                hosts: places.hosts,
            };
            client.unwrap(client.snapshots().disable_fast_snapshot_restores(request).await)?;
            output::print_done(&ids, "snapshot_id", "is fetched as it is read again", context.output)
        }
        FastRestoreCommand::List { snapshots, list } => {
            let ids = lookup::snapshots(client, &snapshots).await?;
            let found = lookup::list_fast_restores(client, &ids, &filters(&list.filters)).await?;
            output::print_list(&found, context.output)
        }
    }
}
