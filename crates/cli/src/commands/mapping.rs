//! `--block-device` as the API has it.

use hearth_proto::v1::{BlockDeviceMapping, EbsBlockDevice};
use hearth_types::volume::ROOT_DEVICE_NAME;

use super::lookup;
use crate::args::mapping::{Content, Ebs, Mapping};
use crate::client::Client;
use crate::error::CliError;

/// Mappings with the ids of the snapshots meant.
pub async fn to_proto(client: &Client, given: &[Mapping]) -> Result<Vec<BlockDeviceMapping>, CliError> {
    let mut mappings: Vec<BlockDeviceMapping> = Vec::with_capacity(given.len());
    for mapping in given {
        if mappings.iter().any(|other| other.device_name == mapping.device) {
            return Err(CliError::Usage(format!("--block-device: {} is named twice", mapping.device)));
        }
        mappings.push(convert(client, mapping).await?);
    }
    Ok(mappings)
}

async fn convert(client: &Client, mapping: &Mapping) -> Result<BlockDeviceMapping, CliError> {
    let mut converted = BlockDeviceMapping { device_name: mapping.device.clone(), ..Default::default() };
    match &mapping.content {
        Content::None => converted.no_device = true,
        Content::Virtual(name) => converted.virtual_name.clone_from(name),
        Content::Ebs(ebs) => {
            let snapshot_id = match &ebs.snapshot {
                Some(snapshot) => lookup::snapshot(client, snapshot).await?,
                None => String::new(),
            };
            converted.ebs = Some(volume(ebs, snapshot_id));
        }
    }
    Ok(converted)
}

fn volume(ebs: &Ebs, snapshot_id: String) -> EbsBlockDevice {
    EbsBlockDevice {
        snapshot_id,
        volume_size_bytes: ebs.size.unwrap_or_default(),
        volume_type: ebs.volume_type.map(|kind| kind.name().to_owned()).unwrap_or_default(),
        iops: ebs.iops,
        throughput_mibps: ebs.throughput,
        delete_on_termination: ebs.delete_on_termination,
        encrypted: ebs.encrypted,
    }
}

/// The volume at a device, to be said more of; a new mapping goes in front.
fn volume_at<'a>(mappings: &'a mut Vec<BlockDeviceMapping>, device: &str) -> Result<&'a mut EbsBlockDevice, CliError> {
    if !mappings.iter().any(|mapping| mapping.device_name == device) {
        let ebs = Some(EbsBlockDevice::default());
        mappings.insert(0, BlockDeviceMapping { device_name: device.to_owned(), ebs, ..Default::default() });
    }
    let found = mappings.iter_mut().find(|mapping| mapping.device_name == device);
    found
        .and_then(|mapping| mapping.ebs.as_mut())
        .ok_or_else(|| CliError::Usage(format!("--block-device: the root device {device} must be a volume")))
}

/// Puts `--root-size` into the mapping of the root device. An empty `root_device` is the usual one.
pub fn set_root_size(
    mappings: &mut Vec<BlockDeviceMapping>,
    root_device: &str,
    size_bytes: u64,
) -> Result<(), CliError> {
    let device = if root_device.is_empty() { ROOT_DEVICE_NAME } else { root_device };
    let root = volume_at(mappings, device)?;
    if root.volume_size_bytes != 0 {
        return Err(CliError::Usage(format!("--root-size and --block-device both say the size of {device}")));
    }
    root.volume_size_bytes = size_bytes;
    Ok(())
}

/// Makes a snapshot the root device's.
pub fn set_root_snapshot(
    mappings: &mut Vec<BlockDeviceMapping>,
    root_device: &str,
    snapshot_id: String,
) -> Result<(), CliError> {
    let root = volume_at(mappings, root_device)?;
    if !root.snapshot_id.is_empty() && root.snapshot_id != snapshot_id {
        return Err(CliError::Usage(format!(
            "--block-device: {root_device} has another snapshot than the one to register"
        )));
    }
    root.snapshot_id = snapshot_id;
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn store(device: &str) -> BlockDeviceMapping {
        BlockDeviceMapping { device_name: device.into(), virtual_name: "ephemeral0".into(), ..Default::default() }
    }

    #[test]
    fn the_root_size_goes_into_the_root_mapping() {
        let mut mappings = vec![store("/dev/sdb")];
        set_root_size(&mut mappings, "", 20 << 30).unwrap();
        assert_eq!(mappings[0].device_name, "/dev/sda1");
        assert_eq!(mappings[0].ebs.as_ref().unwrap().volume_size_bytes, 20 << 30);
        let twice = set_root_size(&mut mappings, "/dev/sda1", 30 << 30).unwrap_err();
        assert!(twice.to_string().contains("both say the size of /dev/sda1") && twice.exit_code() == 2);
        let kind = EbsBlockDevice { volume_type: "io2".into(), ..Default::default() };
        let mut mappings =
            vec![BlockDeviceMapping { device_name: "/dev/xvda".into(), ebs: Some(kind), ..Default::default() }];
        set_root_size(&mut mappings, "/dev/xvda", 1 << 30).unwrap();
        let ebs = mappings[0].ebs.clone().unwrap();
        assert_eq!((mappings.len(), ebs.volume_size_bytes, ebs.volume_type.as_str()), (1, 1 << 30, "io2"));
        assert_eq!(set_root_size(&mut vec![store("/dev/sda1")], "", 1 << 30).unwrap_err().exit_code(), 2);
    }

    #[test]
    fn the_snapshot_to_register_is_the_roots() {
        let mut mappings = Vec::new();
        set_root_snapshot(&mut mappings, "/dev/sda1", "snap-1".into()).unwrap();
        set_root_snapshot(&mut mappings, "/dev/sda1", "snap-1".into()).unwrap();
        assert_eq!(mappings[0].ebs.as_ref().unwrap().snapshot_id, "snap-1");
        assert_eq!(set_root_snapshot(&mut mappings, "/dev/sda1", "snap-2".into()).unwrap_err().exit_code(), 2);
    }

    #[test]
    fn what_is_not_said_is_left_to_the_image() {
        assert_eq!(volume(&Ebs::default(), String::new()), EbsBlockDevice::default());
        let said = Ebs { iops: Some(0), delete_on_termination: Some(false), ..Ebs::default() };
        let converted = volume(&said, "snap-1".into());
        assert_eq!((converted.iops, converted.delete_on_termination), (Some(0), Some(false)));
        assert_eq!(converted.snapshot_id, "snap-1");
    }
}
