//! What becomes of a volume's modification: derived from the records while it goes on, written into the volume's record once,
//! when its host reports the end.

use std::borrow::Cow;

use hearth_proto::record::v1 as rec;
use hearth_proto::v1;
use hearth_types::InstanceState;
use hearth_types::volume::GIB;

use crate::clock;
use crate::life;
use crate::tables::Tables;
use crate::volumes;

const MAX_ERROR_CHARS: usize = 1000;

/// How far a modification is.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum Stage {
    /// The guest does not have it yet; `told` = the host knows of it.
    Modifying {
        told: bool,
    },
    /// The guest has the new size, the host cannot keep to the new speed yet.
    Optimizing {
        error: String,
    },
    Completed,
    Failed {
        error: String,
    },
}

impl Stage {
    fn name(&self) -> &'static str {
        match self {
            Self::Modifying { .. } => "modifying",
            Self::Optimizing { .. } => "optimizing",
            Self::Completed => "completed",
            Self::Failed { .. } => "failed",
        }
    }

    /// Of the three steps: the host is told, the size is there, the speed is there.
    fn percent(&self) -> u32 {
        match self {
            Self::Modifying { told: false } | Self::Failed { .. } => 0,
            Self::Modifying { told: true } => 33,
            Self::Optimizing { .. } => 66,
            Self::Completed => 100,
        }
    }
}

/// What the records of the volume's instance say of a modification that has not ended.
fn observed(
    change: &rec::VolumeModification,
    volume_id: &str,
    instance: &rec::InstanceSpec,
    status: Option<&rec::InstanceStatus>,
) -> Stage {
    // What no guest has open is opened as it is wanted then.
    let Some(attached) = volumes::slot(instance, volume_id) else { return Stage::Completed };
    if matches!(life::state_of(instance, status), InstanceState::Stopped | InstanceState::Terminated) {
        return Stage::Completed;
    }
    let told = status.is_some_and(|status| status.observed_generation >= change.told_generation);
    let Some(report) = volumes::seen(status, attached).filter(|_| told) else {
        return Stage::Modifying { told: false };
    };
    let grown = change.target_size_bytes > change.original_size_bytes;
    let has_size = report.size_bytes >= change.target_size_bytes;
    let error = || report.error.chars().take(MAX_ERROR_CHARS).collect();
    match (has_size, report.error.is_empty()) {
        (true, true) => Stage::Completed,
        (false, true) => Stage::Modifying { told: true },
        (true, false) if grown => Stage::Optimizing { error: error() },
        (_, false) => Stage::Failed { error: error() },
    }
}

/// How far a volume's modification is.
pub(crate) fn stage(tables: &Tables, spec: &rec::VolumeSpec, change: &rec::VolumeModification) -> Stage {
    match (change.ended_ms, change.error.as_str()) {
        (0, _) => tables.instance(&spec.instance_id).map_or(Stage::Completed, |(instance, status)| {
            observed(change, &spec.volume_id, &instance, status.as_deref())
        }),
        (_, "") => Stage::Completed,
        (_, error) => Stage::Failed { error: error.to_owned() },
    }
}

/// Whether the next one has to wait.
pub(crate) fn is_going_on(tables: &Tables, spec: &rec::VolumeSpec) -> bool {
    let change = spec.modification.as_ref();
    change.is_some_and(|change| matches!(stage(tables, spec, change), Stage::Modifying { .. }))
}

/// The volume's record with what its instance's records, which are about to be written, say of the end of its modification; `None`
/// when that is nothing new. The host goes on with what failed, so it may complete after all.
pub(crate) fn settled(
    spec: &rec::VolumeSpec,
    instance: &rec::InstanceSpec,
    status: Option<&rec::InstanceStatus>,
    now_ms: u64,
) -> Option<rec::VolumeSpec> {
    let change = spec.modification.as_ref().filter(|change| change.ended_ms == 0 || !change.error.is_empty())?;
    let (ended_ms, error) = match observed(change, &spec.volume_id, instance, status) {
        Stage::Modifying { .. } => return None,
        Stage::Optimizing { .. } => (0, String::new()),
        Stage::Completed => (now_ms, String::new()),
        Stage::Failed { error } if error == change.error => return None,
        Stage::Failed { error } => (now_ms, error),
    };
    let new = rec::VolumeModification { ended_ms, error, ..change.clone() };
    (new != *change).then(|| rec::VolumeSpec { modification: Some(new), ..spec.clone() })
}

/// Ends a modification that goes on when the volume leaves its guest: whoever opens it next finds it as it was to be.
pub(crate) fn end(spec: &mut rec::VolumeSpec) {
    if let Some(change) = spec.modification.as_mut().filter(|change| change.ended_ms == 0) {
        change.ended_ms = clock::now_ms();
    }
}

/// A volume's last modification as the API shows it.
pub(crate) fn view(tables: &Tables, spec: &rec::VolumeSpec) -> Option<v1::VolumeModification> {
    let change = spec.modification.as_ref()?;
    let stage = stage(tables, spec, change);
    let (modification_state, progress) = (stage.name().to_owned(), stage.percent());
    let end_time = match (change.ended_ms, &stage) {
        // Records of earlier releases do not tell.
        (0, Stage::Completed) => clock::rfc3339(change.started_ms),
        (0, _) => String::new(),
        (ended_ms, _) => clock::rfc3339(ended_ms),
    };
    let status_message = match stage {
        Stage::Optimizing { error } | Stage::Failed { error } => error,
        Stage::Modifying { .. } | Stage::Completed => String::new(),
    };
    Some(v1::VolumeModification {
        volume_id: spec.volume_id.clone(),
        modification_state,
        status_message,
        target_size_bytes: change.target_size_bytes,
        target_volume_type: change.target_volume_type.clone(),
        target_iops: change.target_iops,
        target_throughput_mibps: change.target_throughput_mibps,
        original_size_bytes: change.original_size_bytes,
        original_volume_type: change.original_volume_type.clone(),
        original_iops: change.original_iops,
        original_throughput_mibps: change.original_throughput_mibps,
        progress,
        start_time: clock::rfc3339(change.started_ms),
        end_time,
    })
}

/// Filters of their list.
pub(crate) const FILTERS: [&str; 9] = [
    "volume-id",
    "modification-state",
    "target-size",
    "target-volume-type",
    "target-iops",
    "original-size",
    "original-volume-type",
    "original-iops",
    "start-time",
];

/// What a filter looks at.
pub(crate) fn filter_values<'a>(change: &'a v1::VolumeModification, name: &str) -> Vec<Cow<'a, str>> {
    let size = |bytes: u64| Cow::Owned(bytes.div_ceil(GIB).to_string());
    vec![match name {
        "volume-id" => change.volume_id.as_str().into(),
        "modification-state" => change.modification_state.as_str().into(),
        "target-size" => size(change.target_size_bytes),
        "target-volume-type" => change.target_volume_type.as_str().into(),
        "target-iops" => change.target_iops.to_string().into(),
        "original-size" => size(change.original_size_bytes),
        "original-volume-type" => change.original_volume_type.as_str().into(),
        "original-iops" => change.original_iops.to_string().into(),
        _ => change.start_time.as_str().into(),
    }]
}
