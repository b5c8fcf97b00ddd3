//! Block device mappings: what `--block-device` says.

use hearth_types::{VolumeType, check_device_name};

use super::types::parse_volume_size;

/// How one is written, for usage lines.
pub const FORM: &str = "device=NAME,KEY=VALUE,...";

/// One `--block-device`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Mapping {
    /// "/dev/sdf".
    pub device: String,
    /// What is there.
    pub content: Content,
}

/// What a device is to hold.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Content {
    /// An EBS volume.
    Ebs(Ebs),
    /// An instance-store disk: "ephemeral0".
    Virtual(String),
    /// Not even what the image has there.
    None,
}

/// An EBS volume; what is `None` is as in the image.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Ebs {
    /// Bytes, whole GiB.
    pub size: Option<u64>,
    /// Kind and speed.
    pub volume_type: Option<VolumeType>,
    /// 0 = not limited.
    pub iops: Option<u32>,
    /// MiB/s; 0 = not limited.
    pub throughput: Option<u32>,
    /// Id, beginning of an id, or Name tag of a snapshot.
    pub snapshot: Option<String>,
    /// Whether it goes with the instance.
    pub delete_on_termination: Option<bool>,
    /// Whether its data is encrypted at rest.
    pub encrypted: Option<bool>,
}

const KEYS: &str = "device, size, type, iops, throughput, snapshot, delete-on-termination, encrypted, virtual, none";

/// `device=/dev/sdf,size=10G,type=gp3,…`, `device=/dev/sdb,virtual=ephemeral0` or `device=/dev/sdf,none`.
pub fn parse_mapping(text: &str) -> Result<Mapping, String> {
    let mut device = None;
    let mut ebs = Ebs::default();
    let mut virtual_name = None;
    let mut none = None;
    for piece in text.split(',') {
        let (key, value) = match piece.split_once('=') {
            None if piece == "none" => (piece, ""),
            None if piece.starts_with("/dev/") => return Err(format!("write it as device={piece}")),
            None if piece.is_empty() => return Err("there is nothing between two commas, or at an end".to_owned()),
            None => return Err(format!("'{piece}' is not KEY=VALUE; keys are {KEYS}")),
            Some((key, "")) => return Err(format!("the value of {key} is missing")),
            Some((key, value)) => (key, value),
        };
        let wrong = |why: String| format!("{key}: {why}");
        match key {
            "device" => once(key, &mut device, parse_device(value).map_err(wrong)?),
            "size" => once(key, &mut ebs.size, parse_volume_size(value).map_err(wrong)?),
            "type" => {
                let kind = value.parse::<VolumeType>().map_err(|error| wrong(error.to_string()))?;
                once(key, &mut ebs.volume_type, kind)
            }
            "iops" => once(key, &mut ebs.iops, number(value).map_err(wrong)?),
            "throughput" => once(key, &mut ebs.throughput, number(value).map_err(wrong)?),
            "snapshot" => once(key, &mut ebs.snapshot, value.to_owned()),
            "delete-on-termination" => once(key, &mut ebs.delete_on_termination, truth(value).map_err(wrong)?),
            "encrypted" => once(key, &mut ebs.encrypted, truth(value).map_err(wrong)?),
            "virtual" => once(key, &mut virtual_name, parse_virtual(value).map_err(wrong)?),
            "none" if piece == "none" => once(key, &mut none, ()),
            "none" => return Err("write it as none, without a value".to_owned()),
            _ => return Err(format!("unknown key '{key}'; keys are {KEYS}")),
        }?;
    }
    let device = device.ok_or("device is missing, e.g. device=/dev/sdf")?;
    let content = match (ebs == Ebs::default(), virtual_name, none) {
        (false, None, None) => Content::Ebs(ebs),
        (true, Some(name), None) => Content::Virtual(name),
        (true, None, Some(())) => Content::None,
        (true, None, None) => return Err("say what is there: size, snapshot, virtual=ephemeral0 or none".to_owned()),
        (_, _, Some(())) => return Err("none goes with device only".to_owned()),
        (_, Some(_), None) => return Err("virtual goes with device only".to_owned()),
    };
    Ok(Mapping { device, content })
}

fn once<T>(key: &str, place: &mut Option<T>, value: T) -> Result<(), String> {
    match place.replace(value) {
        None => Ok(()),
        Some(_) => Err(format!("{key} is said twice")),
    }
}

fn number(text: &str) -> Result<u32, String> {
    text.parse().map_err(|_| format!("'{text}' is no whole number (0 = not limited)"))
}

fn truth(text: &str) -> Result<bool, String> {
    text.parse().map_err(|_| format!("'{text}' is neither true nor false"))
}

/// EC2's names of instance-store disks.
fn parse_virtual(text: &str) -> Result<String, String> {
    let number = text.strip_prefix("ephemeral").and_then(|digits| {
        let number: u8 = digits.parse().ok()?;
        (number < 24 && number.to_string() == digits).then_some(number)
    });
    number.map(|_| text.to_owned()).ok_or_else(|| format!("'{text}' is none of ephemeral0 to ephemeral23"))
}

/// A device name as EC2 has them.
pub fn parse_device(text: &str) -> Result<String, String> {
    check_device_name(text).map(|()| text.to_owned())
}

/// One `--delete-on-termination`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct DeviceSwitch {
    /// "/dev/sdf".
    pub device: String,
    /// On or off.
    pub on: bool,
}

/// `/dev/sdf=true`.
pub fn parse_device_switch(text: &str) -> Result<DeviceSwitch, String> {
    let (device, on) = text.split_once('=').ok_or("write it as DEVICE=true or DEVICE=false, e.g. /dev/sdf=true")?;
    Ok(DeviceSwitch { device: parse_device(device)?, on: truth(on)? })
}

#[cfg(test)]
#[path = "mapping_test.rs"]
mod tests;
