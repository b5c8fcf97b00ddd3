//! From what people type (id, beginning of an id, name) to what is meant.

use hearth_proto::v1::{
    BundleTask, FastSnapshotRestore, Filter, Image, ImageState, Instance, InstanceState, ListBundleTasksRequest,
    ListFastSnapshotRestoresRequest, ListImagesRequest, ListInstancesRequest, ListReplaceRootVolumeTasksRequest,
    ListRestoreImageTasksRequest, ListSnapshotsRequest, ListStoreImageTasksRequest, ListVolumeModificationsRequest,
    ListVolumesRequest, PageRequest, ReplaceRootVolumeTask, RestoreImageTask, Snapshot, StoreImageTask, Volume,
    VolumeModification, VolumeState,
};
use hearth_types::{ImageId, InstanceId, SnapshotId, VolumeId};

use crate::client::{Client, all_pages};
use crate::error::CliError;
use crate::view;

/// Instances that match the ids and filters, all pages.
pub async fn list_instances(client: &Client, ids: &[String], filters: &[Filter]) -> Result<Vec<Instance>, CliError> {
    let one_page = async |page: PageRequest| {
        let request = ListInstancesRequest { instance_ids: ids.to_vec(), filters: filters.to_vec(), page: Some(page) };
        let answer = client.unwrap(client.instances().list_instances(request).await)?;
        Ok((answer.instances, answer.page))
    };
    all_pages(one_page).await
}

/// Images that match the ids and filters, all pages.
pub async fn list_images(client: &Client, ids: &[String], filters: &[Filter]) -> Result<Vec<Image>, CliError> {
    let one_page = async |page: PageRequest| {
        let request = ListImagesRequest { image_ids: ids.to_vec(), filters: filters.to_vec(), page: Some(page) };
        let answer = client.unwrap(client.images().list_images(request).await)?;
        Ok((answer.images, answer.page))
    };
    all_pages(one_page).await
}

/// Bundle tasks that match the ids and filters, all pages.
pub async fn list_bundle_tasks(
    client: &Client,
    ids: &[String],
    filters: &[Filter],
) -> Result<Vec<BundleTask>, CliError> {
    let one_page = async |page: PageRequest| {
        let request = ListBundleTasksRequest { bundle_ids: ids.to_vec(), filters: filters.to_vec(), page: Some(page) };
        let answer = client.unwrap(client.images().list_bundle_tasks(request).await)?;
        Ok((answer.tasks, answer.page))
    };
    all_pages(one_page).await
}

/// Tasks that store these images (none = any) and match the filters, all pages.
pub async fn list_store_tasks(
    client: &Client,
    images: &[String],
    filters: &[Filter],
) -> Result<Vec<StoreImageTask>, CliError> {
    let one_page = async |page: PageRequest| {
        let (image_ids, filters) = (images.to_vec(), filters.to_vec());
        let request = ListStoreImageTasksRequest { image_ids, filters, page: Some(page) };
        let answer = client.unwrap(client.images().list_store_image_tasks(request).await)?;
        Ok((answer.tasks, answer.page))
    };
    all_pages(one_page).await
}

/// Tasks that make these images of objects (none = any) and match the filters, all pages.
pub async fn list_restore_tasks(
    client: &Client,
    images: &[String],
    filters: &[Filter],
) -> Result<Vec<RestoreImageTask>, CliError> {
    let one_page = async |page: PageRequest| {
        let (image_ids, filters) = (images.to_vec(), filters.to_vec());
        let request = ListRestoreImageTasksRequest { image_ids, filters, page: Some(page) };
        let answer = client.unwrap(client.images().list_restore_image_tasks(request).await)?;
        Ok((answer.tasks, answer.page))
    };
    all_pages(one_page).await
}

/// Tasks that replace root volumes with these ids, or all; all pages.
pub async fn list_replacements(client: &Client, ids: &[String]) -> Result<Vec<ReplaceRootVolumeTask>, CliError> {
    let one_page = async |page: PageRequest| {
        let request = ListReplaceRootVolumeTasksRequest { task_ids: ids.to_vec(), page: Some(page) };
        let answer = client.unwrap(client.instances().list_replace_root_volume_tasks(request).await)?;
        Ok((answer.tasks, answer.page))
    };
    all_pages(one_page).await
}

/// Volumes that match the ids and filters, all pages.
pub async fn list_volumes(client: &Client, ids: &[String], filters: &[Filter]) -> Result<Vec<Volume>, CliError> {
    let one_page = async |page: PageRequest| {
        let request = ListVolumesRequest { volume_ids: ids.to_vec(), filters: filters.to_vec(), page: Some(page) };
        let answer = client.unwrap(client.volumes().list_volumes(request).await)?;
        Ok((answer.volumes, answer.page))
    };
    all_pages(one_page).await
}

/// Snapshots that match the ids and filters, all pages.
pub async fn list_snapshots(client: &Client, ids: &[String], filters: &[Filter]) -> Result<Vec<Snapshot>, CliError> {
    let one_page = async |page: PageRequest| {
        let request = ListSnapshotsRequest { snapshot_ids: ids.to_vec(), filters: filters.to_vec(), page: Some(page) };
        let answer = client.unwrap(client.snapshots().list_snapshots(request).await)?;
        Ok((answer.snapshots, answer.page))
    };
    all_pages(one_page).await
}

/// Modifications of these volumes (none = any) that match the filters, all pages.
pub async fn list_modifications(
    client: &Client,
    volumes: &[String],
    filters: &[Filter],
) -> Result<Vec<VolumeModification>, CliError> {
    let one_page = async |page: PageRequest| {
        let (volume_ids, filters) = (volumes.to_vec(), filters.to_vec());
        let request = ListVolumeModificationsRequest { volume_ids, filters, page: Some(page) };
        let answer = client.unwrap(client.volumes().list_volume_modifications(request).await)?;
        Ok((answer.modifications, answer.page))
    };
    all_pages(one_page).await
}

/// Where snapshots (none = any) are fetched whole, as far as it matches the filters; all pages.
pub async fn list_fast_restores(
    client: &Client,
    ids: &[String],
    filters: &[Filter],
) -> Result<Vec<FastSnapshotRestore>, CliError> {
    let one_page = async |page: PageRequest| {
        let (snapshot_ids, filters) = (ids.to_vec(), filters.to_vec());
        let request = ListFastSnapshotRestoresRequest { snapshot_ids, filters, page: Some(page) };
        let answer = client.unwrap(client.snapshots().list_fast_snapshot_restores(request).await)?;
        Ok((answer.fast_snapshot_restores, answer.page))
    };
    all_pages(one_page).await
}

/// A filter for resources with one of these ids; unlike a list by ids, it takes unknown ones.
pub fn any_of(name: &str, ids: &[String]) -> Filter {
    Filter { name: name.to_owned(), values: ids.to_vec() }
}

fn filter(name: &str, value: String) -> Filter {
    Filter { name: name.to_owned(), values: vec![value] }
}

/// Takes wildcards literally.
fn escaped(text: &str) -> String {
    text.chars().flat_map(|c| if matches!(c, '*' | '?' | '\\') { vec!['\\', c] } else { vec![c] }).collect()
}

/// So many digits of an id must be given: a slip of the hand must not name anything.
const LEAST_DIGITS: usize = 4;

/// Whether a text is the beginning of an id with that prefix: "i-0af3".
fn is_beginning(text: &str, prefix: &str) -> bool {
    text.strip_prefix(prefix).and_then(|rest| rest.strip_prefix('-')).is_some_and(|digits| {
        (LEAST_DIGITS..17).contains(&digits.len()) && digits.bytes().all(|b| matches!(b, b'0'..=b'9' | b'a'..=b'f'))
    })
}

/// Ids of the instances meant.
pub async fn instances(client: &Client, texts: &[String]) -> Result<Vec<String>, CliError> {
    let mut ids = Vec::with_capacity(texts.len());
    for text in texts {
        let id = instance(client, text).await?;
        if !ids.contains(&id) {
            ids.push(id);
        }
    }
    Ok(ids)
}

/// Id of the instance meant.
pub async fn instance(client: &Client, text: &str) -> Result<String, CliError> {
    if text.parse::<InstanceId>().is_ok() {
        return Ok(text.to_owned());
    }
    let (wanted, what) = if is_beginning(text, InstanceId::PREFIX) {
        (filter("instance-id", format!("{text}*")), "an id that begins with")
    } else {
        (filter("tag:Name", escaped(text)), "the name")
    };
    let mut found = list_instances(client, &[], &[wanted]).await?;
    // A name that was used before means the instance that has it now.
    if found.len() > 1 && found.iter().any(|i| i.state() != InstanceState::Terminated) {
        found.retain(|i| i.state() != InstanceState::Terminated);
    }
    let describe = |i: &Instance| {
        format!("{} ({}, {})", i.instance_id, view::instance::state_name(i.state()), view::instance::name(i))
    };
    choose(text, &found, "instance", what, |i| i.instance_id.clone(), describe)
}

/// The image meant.
pub async fn image(client: &Client, text: &str) -> Result<String, CliError> {
    if text.parse::<ImageId>().is_ok() {
        return Ok(text.to_owned());
    }
    let (wanted, what) = if is_beginning(text, ImageId::PREFIX) {
        (filter("image-id", format!("{text}*")), "an id that begins with")
    } else {
        (filter("name", escaped(text)), "the name")
    };
    let mut found = list_images(client, &[], &[wanted]).await?;
    if found.len() > 1 && found.iter().any(|i| i.state() == ImageState::Available) {
        found.retain(|i| i.state() == ImageState::Available);
    }
    choose(text, &found, "image", what, |i| i.image_id.clone(), |i| format!("{} ({})", i.image_id, i.name))
}

/// Id of the volume meant.
pub async fn volume(client: &Client, text: &str) -> Result<String, CliError> {
    if text.parse::<VolumeId>().is_ok() {
        return Ok(text.to_owned());
    }
    let (wanted, what) = if is_beginning(text, VolumeId::PREFIX) {
        (filter("volume-id", format!("{text}*")), "an id that begins with")
    } else {
        (filter("tag:Name", escaped(text)), "the name")
    };
    let mut found = list_volumes(client, &[], &[wanted]).await?;
    let leaves = |volume: &Volume| matches!(volume.state(), VolumeState::Deleting | VolumeState::Deleted);
    if found.len() > 1 && found.iter().any(|volume| !leaves(volume)) {
        found.retain(|volume| !leaves(volume));
    }
    let describe =
        |v: &Volume| format!("{} ({}, {})", v.volume_id, view::volume::state_name(v.state()), view::volume::name(v));
    choose(text, &found, "volume", what, |v| v.volume_id.clone(), describe)
}

/// Ids of the volumes meant.
pub async fn volumes(client: &Client, texts: &[String]) -> Result<Vec<String>, CliError> {
    let mut ids = Vec::with_capacity(texts.len());
    for text in texts {
        let id = volume(client, text).await?;
        if !ids.contains(&id) {
            ids.push(id);
        }
    }
    Ok(ids)
}

/// Id of the snapshot meant.
pub async fn snapshot(client: &Client, text: &str) -> Result<String, CliError> {
    if text.parse::<SnapshotId>().is_ok() {
        return Ok(text.to_owned());
    }
    let (wanted, what) = if is_beginning(text, SnapshotId::PREFIX) {
        (filter("snapshot-id", format!("{text}*")), "an id that begins with")
    } else {
        (filter("tag:Name", escaped(text)), "the name")
    };
    let found = list_snapshots(client, &[], &[wanted]).await?;
    let describe = |s: &Snapshot| format!("{} ({}, {})", s.snapshot_id, s.start_time, view::snapshot::name(s));
    choose(text, &found, "snapshot", what, |s| s.snapshot_id.clone(), describe)
}

/// Ids of the snapshots meant.
pub async fn snapshots(client: &Client, texts: &[String]) -> Result<Vec<String>, CliError> {
    let mut ids = Vec::with_capacity(texts.len());
    for text in texts {
        let id = snapshot(client, text).await?;
        if !ids.contains(&id) {
            ids.push(id);
        }
    }
    Ok(ids)
}

fn choose<T>(
    text: &str,
    found: &[T],
    kind: &str,
    what: &str,
    id: impl Fn(&T) -> String,
    describe: impl Fn(&T) -> String,
) -> Result<String, CliError> {
    match found {
        [one] => Ok(id(one)),
        [] => Err(CliError::NotFound {
            message: format!("no {kind} has {what} '{text}'"),
            advice: format!("`hearth {kind} list` shows yours."),
        }),
        many => {
            let shown: Vec<_> = many.iter().take(5).map(describe).collect();
            let more = if many.len() > 5 { ", …" } else { "" };
            let count = many.len();
            Err(CliError::Ambiguous(format!("{count} {kind}s have {what} '{text}': {}{more}", shown.join(", "))))
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn beginnings_of_ids_are_told_from_names() {
        for text in ["i-0123", "i-0123456789abcdef"] {
            assert!(is_beginning(text, "i"), "{text}");
        }
        for text in ["i", "i-", "i-012", "web", "i-0123456789abcdef0", "i-xyzzy", "i-0123A", "ami-0123", "io-1234"] {
            assert!(!is_beginning(text, "i"), "{text}");
        }
        assert_eq!(escaped("a*b?c\\d"), "a\\*b\\?c\\\\d");
    }

    #[test]
    fn none_one_and_many() {
        let choose =
            |found: &[&str]| choose("x", found, "instance", "the name", |f| (*f).to_owned(), |f| format!("<{f}>"));
        assert_eq!(choose(&["a"]).unwrap(), "a");
        assert_eq!(choose(&[]).unwrap_err().exit_code(), 3);
        let many = choose(&["a", "b", "c", "d", "e", "f"]).unwrap_err();
        assert_eq!(many.exit_code(), 4);
        assert_eq!(many.to_string(), "6 instances have the name 'x': <a>, <b>, <c>, <d>, <e>, …");
    }
}
