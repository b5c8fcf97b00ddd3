//! What is known of one instance, in `instance.json`.

use std::collections::BTreeMap;
use std::io;
use std::path::PathBuf;

use base64::Engine;
use base64::engine::general_purpose::STANDARD;
use hearth_proto::v1::DesiredInstance;
use hearth_types::{InstanceId, StateReason, VolumeId};
use prost::Message;
use serde::{Deserialize, Serialize};
use thiserror::Error;

use super::atomic::{read_if_exists, write_atomically};
use super::layout::Layout;

/// Form of the file; another one is refused rather than guessed.
const FORMAT: u32 = 1;

/// How far the agent is with an instance. Written before the first effect of the phase.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Phase {
    /// No VMM, no instance-store disks.
    Stopped,
    /// Disks may be half made; a VMM may run.
    Starting,
    /// A VMM ran.
    Running,
    /// The VMM is being ended.
    Stopping,
    /// Everything is being deleted.
    Deleting,
}

/// Why an instance that is wanted running is not started again at the same generation.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Hold {
    /// The guest powered itself off.
    PoweredOff,
    /// It cannot be started or does not stay up.
    Failed(StateReason),
}

/// One instance on this host.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct InstanceRecord {
    format: u32,
    /// Whose record this is.
    pub instance_id: InstanceId,
    /// Newest wish of the control plane.
    #[serde(with = "desired_as_text")]
    pub desired: DesiredInstance,
    /// Which uid of the agent's range its VMMs run under.
    pub slot: u32,
    /// How far.
    pub phase: Phase,
    /// Times a guest was started.
    pub boot_count: u32,
    /// Reboots carried out.
    pub observed_reboot_generation: u64,
    /// The reboot that is being carried out.
    pub rebooting_to: Option<u64>,
    /// Held at this generation, until a higher one comes.
    pub hold: Option<(u64, Hold)>,
    /// Bytes that the console ring had seen when the guest was last started.
    pub console_start: u64,
    /// Volumes of this host's disk that its guest has or had, with their attachment generation: their files are here.
    #[serde(default)]
    pub volumes_made: BTreeMap<VolumeId, u64>,
}

/// Why a record cannot be read.
#[derive(Debug, Error)]
pub enum RecordError {
    /// The file.
    #[error("{}: {source}", path.display())]
    Io {
        /// Which file.
        path: PathBuf,
        /// What the system said.
        source: io::Error,
    },
    /// Its content.
    #[error("{} is damaged: {reason}", path.display())]
    Content {
        /// Which file.
        path: PathBuf,
        /// Why.
        reason: String,
    },
}

impl InstanceRecord {
    /// A new instance. A reboot asked for before its first start is none.
    pub fn new(instance_id: InstanceId, desired: DesiredInstance, slot: u32) -> Self {
        Self {
            format: FORMAT,
            instance_id,
            observed_reboot_generation: desired.reboot_generation,
            desired,
            slot,
            phase: Phase::Stopped,
            boot_count: 0,
            rebooting_to: None,
            hold: None,
            console_start: 0,
            volumes_made: BTreeMap::new(),
        }
    }

    /// Makes the record durable; its folder is made if it is missing.
    pub fn save(&self, layout: &Layout) -> Result<(), RecordError> {
        let path = layout.record(&self.instance_id);
        let failed = |source| RecordError::Io { path: path.clone(), source };
        let folder = layout.instance(&self.instance_id);
        if !folder.is_dir() {
            std::fs::create_dir_all(&folder).map_err(failed)?;
            super::atomic::sync_dir(&layout.instances()).map_err(failed)?;
        }
        let text = serde_json::to_vec_pretty(self).map_err(|error| failed(error.into()))?;
        write_atomically(&path, &text, 0o600).map_err(failed)
    }

    /// Reads the record of an instance; `None` if it never got one.
    pub fn load(layout: &Layout, id: &InstanceId) -> Result<Option<Self>, RecordError> {
        let path = layout.record(id);
        let text = read_if_exists(&path).map_err(|source| RecordError::Io { path: path.clone(), source })?;
        let Some(text) = text else { return Ok(None) };
        let damaged = |reason: String| RecordError::Content { path: path.clone(), reason };
        let record: Self = serde_json::from_slice(&text).map_err(|error| damaged(error.to_string()))?;
        if record.format != FORMAT {
            return Err(damaged(format!("format {} is not {FORMAT}", record.format)));
        }
        if record.instance_id != *id {
            return Err(damaged(format!("it is {}'s", record.instance_id)));
        }
        Ok(Some(record))
    }
}

mod desired_as_text {
    use super::{DesiredInstance, Engine, Message, STANDARD};
    use serde::{Deserialize, Deserializer, Serializer, de::Error};

    pub fn serialize<S: Serializer>(desired: &DesiredInstance, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.serialize_str(&STANDARD.encode(desired.encode_to_vec()))
    }

    pub fn deserialize<'de, D: Deserializer<'de>>(deserializer: D) -> Result<DesiredInstance, D::Error> {
        let text = String::deserialize(deserializer)?;
        let bytes = STANDARD.decode(text).map_err(D::Error::custom)?;
        DesiredInstance::decode(bytes.as_slice()).map_err(D::Error::custom)
    }
}
