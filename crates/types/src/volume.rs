//! States of volumes, attachments and snapshots as EC2 has them, and device names.
//! Sources: <https://docs.aws.amazon.com/ebs/latest/userguide/ebs-describing-volumes.html>,
//! <https://docs.aws.amazon.com/AWSEC2/latest/APIReference/API_VolumeAttachment.html>,
//! <https://docs.aws.amazon.com/AWSEC2/latest/UserGuide/device_naming.html>.

use std::fmt;

/// One GiB in bytes.
pub const GIB: u64 = 1 << 30;

/// EC2's volume states.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum VolumeState {
    /// Being made.
    Creating,
    /// Not attached.
    Available,
    /// Attached, or on its way there or back.
    InUse,
    /// Its data is being deleted.
    Deleting,
    /// Gone.
    Deleted,
    /// Its data is lost.
    Error,
}

impl VolumeState {
    /// EC2's name.
    pub fn name(self) -> &'static str {
        match self {
            Self::Creating => "creating",
            Self::Available => "available",
            Self::InUse => "in-use",
            Self::Deleting => "deleting",
            Self::Deleted => "deleted",
            Self::Error => "error",
        }
    }
}

impl fmt::Display for VolumeState {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name())
    }
}

/// EC2's states of an attachment.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum AttachmentState {
    /// On its way to the guest.
    Attaching,
    /// The guest has it.
    Attached,
    /// The guest was asked to let go of it.
    Detaching,
    /// The guest does not have it.
    Detached,
    /// The guest was asked to let go of it and does not.
    Busy,
}

impl AttachmentState {
    /// EC2's name.
    pub fn name(self) -> &'static str {
        match self {
            Self::Attaching => "attaching",
            Self::Attached => "attached",
            Self::Detaching => "detaching",
            Self::Detached => "detached",
            Self::Busy => "busy",
        }
    }
}

impl fmt::Display for AttachmentState {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name())
    }
}

/// EC2's snapshot states, without those of archiving.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum SnapshotState {
    /// Its point in time is fixed, its upload goes on.
    Pending,
    /// Everything is in the object store.
    Completed,
    /// It will never be complete.
    Error,
}

impl SnapshotState {
    /// EC2's name.
    pub fn name(self) -> &'static str {
        match self {
            Self::Pending => "pending",
            Self::Completed => "completed",
            Self::Error => "error",
        }
    }
}

impl fmt::Display for SnapshotState {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name())
    }
}

/// Root device of images that do not say otherwise.
pub const ROOT_DEVICE_NAME: &str = "/dev/sda1";

/// Names offered to a volume whose device was not named: those that EC2 recommends for EBS volumes.
pub fn recommended_device_names() -> impl Iterator<Item = String> {
    ('f'..='p').map(|letter| format!("/dev/sd{letter}"))
}

/// Whether EC2 knows a device by this name: `/dev/sda1`, `/dev/sd[a-z]`, `/dev/sd[a-z][1-15]`, `/dev/xvda`, `/dev/xvd[a-z]`,
/// `/dev/xvd[b-c][a-z]`. The name is a label; the guest names its disks itself.
///
/// # Errors
/// A text for the caller.
pub fn check_device_name(name: &str) -> Result<(), String> {
    let lower = |text: &str| text.bytes().all(|byte| byte.is_ascii_lowercase());
    let good = if let Some(rest) = name.strip_prefix("/dev/sd") {
        let (letter, number) = rest.split_at_checked(1).unwrap_or(("", ""));
        !letter.is_empty()
            && lower(letter)
            && (number.is_empty()
                || (!number.starts_with('0') && number.parse::<u8>().is_ok_and(|number| (1..=15).contains(&number))))
    } else if let Some(rest) = name.strip_prefix("/dev/xvd") {
        match rest.len() {
            1 => lower(rest),
            2 => lower(rest) && (rest.starts_with('b') || rest.starts_with('c')),
            _ => false,
        }
    } else {
        false
    };
    match good {
        true => Ok(()),
        false => Err(format!("'{name:.40}' is no device name; use /dev/sd[f-p] (also /dev/sd[a-z], /dev/xvd[a-z])")),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn device_names_are_those_of_ec2() {
        for name in ["/dev/sda1", "/dev/sda", "/dev/sdf", "/dev/sdp", "/dev/sdf15", "/dev/xvda", "/dev/xvdba"] {
            assert_eq!(check_device_name(name), Ok(()), "{name}");
        }
        for name in
            ["", "sdf", "/dev/sd", "/dev/sd1", "/dev/sdf0", "/dev/sdf16", "/dev/sdF", "/dev/xvdaa", "/dev/nvme0n1"]
        {
            assert!(check_device_name(name).is_err(), "{name}");
        }
        assert_eq!(recommended_device_names().count(), 11);
        assert!(recommended_device_names().all(|name| check_device_name(&name).is_ok()));
    }
}
