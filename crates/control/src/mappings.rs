//! Block device mappings: an image's, overridden device by device by those of a launch, become volumes and instance-store disks.
//! Source: <https://docs.aws.amazon.com/AWSEC2/latest/UserGuide/block-device-mapping-concepts.html>

use hearth_proto::v1;
use hearth_types::check_device_name;

use crate::api_error::{ApiError, ApiResult};
use crate::service::snapshot::{self, Source};
use crate::service::volume::Shape;
use crate::storage;
use crate::tables::Tables;

const FIELD: &str = "block_device_mappings";
/// Most mappings in one list.
const MAX_MAPPINGS: usize = 40;

/// A volume to be made at a launch.
pub(crate) struct PlannedVolume {
    pub device_name: String,
    pub shape: Shape,
    pub source: Option<Source>,
    pub encrypted: bool,
    pub delete_on_termination: bool,
}

/// What a launch needs.
#[derive(Default)]
pub(crate) struct PlannedDevices {
    pub volumes: Vec<PlannedVolume>,
    /// Device and number of each instance-store disk.
    pub ephemeral: Vec<(String, usize)>,
}

/// Mappings that are not possible, in EC2's code for that.
pub(crate) fn refused(message: impl Into<String>) -> ApiError {
    ApiError::invalid(FIELD, message).with_reason("InvalidBlockDeviceMapping")
}

fn invalid(mapping: &v1::BlockDeviceMapping, message: impl std::fmt::Display) -> ApiError {
    refused(format!("{}: {message}", mapping.device_name))
}

/// Type, size and speed of a mapping that are not possible; errors with a code of their own keep it.
fn invalid_shape(mapping: &v1::BlockDeviceMapping, error: ApiError) -> ApiError {
    match error.reason() {
        "InvalidParameterValue" | "MissingParameter" => invalid(mapping, error.message()),
        _ => error,
    }
}

/// Number of a virtual name: `ephemeral0` and so on.
fn ephemeral_number(name: &str) -> Option<usize> {
    let digits = name.strip_prefix("ephemeral")?;
    digits.parse().ok().filter(|number: &usize| *number < 24 && number.to_string() == digits)
}

/// Each mapping is one of the three kinds, each device is named once.
pub(crate) fn check(mappings: &[v1::BlockDeviceMapping]) -> ApiResult<()> {
    if mappings.len() > MAX_MAPPINGS {
        return Err(refused(format!("has {} entries, at most {MAX_MAPPINGS}", mappings.len())));
    }
    for (index, mapping) in mappings.iter().enumerate() {
        check_device_name(&mapping.device_name).map_err(refused)?;
        if mappings.iter().take(index).any(|other| other.device_name == mapping.device_name) {
            return Err(invalid(mapping, "is named twice"));
        }
        let kinds = [mapping.ebs.is_some(), !mapping.virtual_name.is_empty(), mapping.no_device];
        if kinds.iter().filter(|set| **set).count() != 1 {
            return Err(invalid(mapping, "needs exactly one of ebs, virtual_name and no_device"));
        }
        if !mapping.virtual_name.is_empty() && ephemeral_number(&mapping.virtual_name).is_none() {
            return Err(invalid(mapping, "virtual_name must be 'ephemeral0' to 'ephemeral23'"));
        }
    }
    Ok(())
}

/// The image's mappings with the launch's on top.
pub(crate) fn merge(
    image: &[v1::BlockDeviceMapping],
    launch: &[v1::BlockDeviceMapping],
) -> Vec<v1::BlockDeviceMapping> {
    let mut merged = image.to_vec();
    for over in launch {
        let Some(base) = merged.iter_mut().find(|mapping| mapping.device_name == over.device_name) else {
            merged.push(over.clone());
            continue;
        };
        *base = match (&base.ebs, &over.ebs) {
            (Some(below), Some(above)) => {
                // Another snapshot is another volume: its size is its own.
                let same = above.snapshot_id.is_empty() || above.snapshot_id == below.snapshot_id;
                let kind = if above.volume_type.is_empty() { &below.volume_type } else { &above.volume_type };
                let kept = kind == &below.volume_type;
                v1::BlockDeviceMapping {
                    ebs: Some(v1::EbsBlockDevice {
                        snapshot_id: if same { below.snapshot_id.clone() } else { above.snapshot_id.clone() },
                        volume_size_bytes: match above.volume_size_bytes {
                            0 if same => below.volume_size_bytes,
                            size => size,
                        },
                        volume_type: kind.clone(),
                        iops: above.iops.or(below.iops.filter(|_| kept)),
                        throughput_mibps: above.throughput_mibps.or(below.throughput_mibps.filter(|_| kept)),
                        delete_on_termination: above.delete_on_termination.or(below.delete_on_termination),
                        encrypted: above.encrypted.or(below.encrypted),
                    }),
                    ..over.clone()
                }
            }
            _ => over.clone(),
        };
    }
    merged.retain(|mapping| !mapping.no_device);
    merged
}

/// The root device's name, and what it is.
#[derive(Clone, Copy, Debug)]
pub(crate) enum Root<'a> {
    /// A volume, which has a mapping.
    Ebs(&'a str),
    /// A disk of the host that is made of a bundle; it has no mapping.
    Bundle(&'a str),
}

impl<'a> Root<'a> {
    fn name(self) -> &'a str {
        match self {
            Self::Ebs(name) | Self::Bundle(name) => name,
        }
    }
}

/// Adds the type's instance-store disks that no mapping names, at /dev/sdb and so on: an instance-store-backed image brings them
/// along, unless a mapping of `lists` has something else, or nothing, at that device.
pub(crate) fn add_store_disks(
    merged: &mut Vec<v1::BlockDeviceMapping>,
    lists: [&[v1::BlockDeviceMapping]; 2],
    store_disks: usize,
) {
    let letters = ('b'..='y').enumerate().take(store_disks);
    for (number, letter) in letters {
        let (device_name, virtual_name) = (format!("/dev/sd{letter}"), format!("ephemeral{number}"));
        let is_said = merged
            .iter()
            .chain(lists.into_iter().flatten())
            .any(|mapping| mapping.device_name == device_name || mapping.virtual_name == virtual_name);
        if !is_said {
            merged.push(v1::BlockDeviceMapping { device_name, virtual_name, ..Default::default() });
        }
    }
}

/// What is to be made of merged mappings. The root device comes first, the others in the order of their names.
pub(crate) fn plan(
    tables: &Tables,
    account: &str,
    root: Root<'_>,
    merged: &[v1::BlockDeviceMapping],
    store_disks: usize,
) -> ApiResult<PlannedDevices> {
    let root_device_name = root.name();
    let mut sorted: Vec<&v1::BlockDeviceMapping> = merged.iter().collect();
    sorted.sort_by_key(|mapping| (mapping.device_name != root_device_name, mapping.device_name.clone()));
    let mut planned = PlannedDevices::default();
    for mapping in sorted {
        let Some(ebs) = &mapping.ebs else {
            // A type with fewer disks gets fewer, as with EC2.
            if let Some(number) = ephemeral_number(&mapping.virtual_name).filter(|number| *number < store_disks) {
                if planned.ephemeral.iter().any(|(_, other)| *other == number) {
                    return Err(invalid(mapping, format!("{} is mapped twice", mapping.virtual_name)));
                }
                planned.ephemeral.push((mapping.device_name.clone(), number));
            }
            continue;
        };
        let source = match ebs.snapshot_id.as_str() {
            "" => None,
            id => Some(snapshot::find_completed(tables, account, id)?),
        };
        let least = source.as_ref().map_or(0, |source| source.base().size_bytes);
        let from_encrypted = source.as_ref().is_some_and(|source| storage::is_encrypted(&source.base()));
        if from_encrypted && ebs.encrypted == Some(false) {
            return Err(invalid(mapping, "a volume made from an encrypted snapshot is encrypted"));
        }
        let shape = Shape::new(&ebs.volume_type, ebs.volume_size_bytes, least, ebs.iops, ebs.throughput_mibps)
            .map_err(|error| invalid_shape(mapping, error))?;
        let is_root = mapping.device_name == root_device_name;
        planned.volumes.push(PlannedVolume {
            device_name: mapping.device_name.clone(),
            shape,
            source,
            encrypted: from_encrypted || ebs.encrypted == Some(true),
            delete_on_termination: ebs.delete_on_termination.unwrap_or(is_root),
        });
    }
    let has_root = planned.volumes.first().is_some_and(|volume| volume.device_name == root_device_name);
    let at_root = planned.ephemeral.iter().any(|(device, _)| device == root_device_name);
    match root {
        Root::Ebs(_) if !has_root => Err(refused(format!("the root device {root_device_name} has no volume"))),
        Root::Bundle(_) if has_root || at_root => {
            Err(refused(format!("the root device {root_device_name} is made of the bundle")))
        }
        _ => Ok(planned),
    }
}

#[cfg(test)]
#[path = "mappings_test.rs"]
mod tests;
