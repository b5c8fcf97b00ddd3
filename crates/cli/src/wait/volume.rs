//! Waiting for volumes and their attachments.

use hearth_proto::v1::{AttachmentState, Volume, VolumeState, VolumeStatus, WatchVolumesRequest};

use super::{Changes, Followed, Shown, Verdict, missed};
use crate::client::Client;
use crate::commands::lookup;
use crate::error::CliError;
use crate::view::volume::{attachment_name, attachment_to, state_name};

/// What is waited for.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Goal {
    /// Its content is there.
    Available,
    /// This instance's guest has it.
    Attached {
        /// Id of the instance.
        instance_id: String,
    },
    /// This instance's guest does not have it.
    Detached {
        /// Id of the instance.
        instance_id: String,
    },
    /// Its modification has taken effect.
    Modified,
    /// Gone.
    Deleted,
}

fn modification_state(volume: &Volume) -> &str {
    volume.modification.as_ref().map(|change| change.modification_state.as_str()).unwrap_or_default()
}

/// What to do when a guest holds on to a disk.
fn busy(volume: &Volume, instance_id: &str) -> CliError {
    let id = &volume.volume_id;
    CliError::Blocked {
        message: format!("{id} is busy: the guest of {instance_id} holds on to it"),
        advice: format!(
            "unmount it in the guest and detach it again; or `hearth volume detach {id} --force` takes it away, and what \
             the guest has not flushed is lost."
        ),
    }
}

impl Followed for Volume {
    type Goal = Goal;

    fn id(&self) -> &str {
        &self.volume_id
    }

    fn shown(&self) -> Shown {
        let state = state_name(self.state());
        let change = self.modification.as_ref().filter(|change| change.modification_state == "modifying");
        if let Some(change) = change {
            return Shown::percent(format!("{state}, modifying"), change.progress);
        }
        let Some(attachment) = self.attachments.first() else { return Shown::text(state) };
        let state = format!("{state}, {}", attachment_name(attachment.state()));
        match self.status() {
            // It waits for the data to come from another host.
            _ if attachment.detail.is_empty() => Shown::text(state),
            VolumeStatus::Ok => Shown::percent(state, attachment.progress),
            _ => Shown::text(format!("{state}: {}", attachment.detail)),
        }
    }

    fn judge(&self, goal: &Goal) -> Verdict {
        use VolumeState::{Available, Creating, Deleted, Deleting, Error, InUse, Unspecified};
        let lost = matches!(self.state(), Error | Deleting | Deleted);
        let attachment = |instance_id: &str| attachment_to(self, instance_id).map(|found| found.state());
        let miss = || {
            let (state, wanted) = (self.shown().text, Self::goal_name(goal));
            Verdict::Missed(missed(&self.volume_id, &state, &wanted, self.state_reason.as_ref()))
        };
        match goal {
            Goal::Available => match self.state() {
                Available | InUse => Verdict::Reached,
                Creating | Unspecified => Verdict::Open,
                Error | Deleting | Deleted => miss(),
            },
            Goal::Attached { instance_id } => match attachment(instance_id) {
                Some(AttachmentState::Attached) => Verdict::Reached,
                Some(AttachmentState::Attaching | AttachmentState::Unspecified) if !lost => Verdict::Open,
                _ => miss(),
            },
            Goal::Detached { instance_id } => match attachment(instance_id) {
                None | Some(AttachmentState::Detached) => Verdict::Reached,
                Some(AttachmentState::Busy) => Verdict::Missed(busy(self, instance_id)),
                _ => Verdict::Open,
            },
            Goal::Modified => match modification_state(self) {
                // The rest of an optimizing volume's work has no effect that could be waited for.
                "completed" | "optimizing" => Verdict::Reached,
                "failed" => {
                    let why = self.modification.as_ref().map(|change| change.status_message.as_str());
                    let message = format!("the modification of {} failed: {}", self.volume_id, why.unwrap_or_default());
                    Verdict::Missed(CliError::Failed { message, reason: String::new() })
                }
                _ if lost => miss(),
                _ => Verdict::Open,
            },
            Goal::Deleted => match self.state() {
                Deleted => Verdict::Reached,
                Available | InUse | Error | Creating => miss(),
                Deleting | Unspecified => Verdict::Open,
            },
        }
    }

    fn goal_name(goal: &Goal) -> String {
        match goal {
            Goal::Available => "available",
            Goal::Attached { .. } => "attached",
            Goal::Detached { .. } => "detached",
            Goal::Modified => "modified",
            Goal::Deleted => "deleted",
        }
        .to_owned()
    }

    fn gone_is_reached(goal: &Goal) -> bool {
        matches!(goal, Goal::Deleted | Goal::Detached { .. })
    }

    async fn watch(client: &Client, ids: Vec<String>) -> Result<Changes<Self>, CliError> {
        let request = WatchVolumesRequest { volume_ids: ids };
        Ok(Box::pin(client.unwrap(client.volumes().watch_volumes(request).await)?))
    }

    async fn existing(client: &Client, ids: &[String]) -> Result<Vec<Self>, CliError> {
        lookup::list_volumes(client, &[], &[lookup::any_of("volume-id", ids)]).await
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use hearth_proto::v1::{VolumeAttachment, VolumeModification};

    fn volume(state: VolumeState, attachment: Option<AttachmentState>) -> Volume {
        let attachment = attachment.map(|state| VolumeAttachment {
            instance_id: "i-1".to_owned(),
            state: state.into(),
            ..VolumeAttachment::default()
        });
        Volume {
            volume_id: "vol-1".to_owned(),
            state: state.into(),
            attachments: attachment.into_iter().collect(),
            ..Volume::default()
        }
    }

    /// 'o'pen, 'r'eached or 'm'issed.
    fn judge(volume: &Volume, goal: &Goal) -> char {
        match volume.judge(goal) {
            Verdict::Open => 'o',
            Verdict::Reached => 'r',
            Verdict::Missed(_) => 'm',
        }
    }

    #[test]
    fn states_are_judged_by_the_goal() {
        use VolumeState::{Available, Creating, Deleted, Deleting, Error, InUse};
        for (state, available, deleted) in [
            (Creating, 'o', 'm'),
            (Available, 'r', 'm'),
            (InUse, 'r', 'm'),
            (Deleting, 'm', 'o'),
            (Deleted, 'm', 'r'),
            (Error, 'm', 'm'),
        ] {
            let volume = volume(state, None);
            assert_eq!(judge(&volume, &Goal::Available), available, "{state:?}");
            assert_eq!(judge(&volume, &Goal::Deleted), deleted, "{state:?}");
        }
    }

    #[test]
    fn attachments_are_judged_by_the_goal() {
        use AttachmentState::{Attached, Attaching, Busy, Detached, Detaching};
        let here = |goal: fn(String) -> Goal| goal("i-1".to_owned());
        let attached = here(|instance_id| Goal::Attached { instance_id });
        let detached = here(|instance_id| Goal::Detached { instance_id });
        for (state, to_attach, to_detach) in [
            (Some(Attaching), 'o', 'o'),
            (Some(Attached), 'r', 'o'),
            (Some(Detaching), 'm', 'o'),
            (Some(Busy), 'm', 'm'),
            (Some(Detached), 'm', 'r'),
            (None, 'm', 'r'),
        ] {
            let volume = volume(VolumeState::InUse, state);
            assert_eq!(judge(&volume, &attached), to_attach, "{state:?}");
            assert_eq!(judge(&volume, &detached), to_detach, "{state:?}");
        }
        let elsewhere = Goal::Attached { instance_id: "i-2".to_owned() };
        assert_eq!(judge(&volume(VolumeState::InUse, Some(Attached)), &elsewhere), 'm');
        assert_eq!(judge(&volume(VolumeState::Error, Some(Attaching)), &attached), 'm');
    }

    #[test]
    fn who_waits_for_data_from_another_host_sees_how_far_it_is() {
        let mut volume = volume(VolumeState::InUse, Some(AttachmentState::Attaching));
        volume.set_status(VolumeStatus::Ok);
        assert_eq!(volume.shown(), Shown::text("in-use, attaching".to_owned()));
        let attachment = volume.attachments.first_mut().unwrap();
        (attachment.progress, attachment.detail) = (40, "its data comes from host h-1: 40 %".to_owned());
        assert_eq!(volume.shown(), Shown::percent("in-use, attaching".to_owned(), 40));
        volume.attachments.first_mut().unwrap().detail = "its data cannot leave host h-1 yet: no space".to_owned();
        volume.set_status(VolumeStatus::Impaired);
        let text = "in-use, attaching: its data cannot leave host h-1 yet: no space";
        assert_eq!(volume.shown(), Shown::text(text.to_owned()));
    }

    #[test]
    fn a_busy_volume_is_a_conflict_with_two_ways_on() {
        let volume = volume(VolumeState::InUse, Some(AttachmentState::Busy));
        let Verdict::Missed(error) = volume.judge(&Goal::Detached { instance_id: "i-1".to_owned() }) else { panic!() };
        assert_eq!(error.exit_code(), 4);
        let text = error.text();
        assert!(text.contains("vol-1 is busy") && text.contains("unmount") && text.contains("--force"), "{text}");
    }

    #[test]
    fn a_modification_is_over_when_it_has_taken_effect() {
        let mut volume = volume(VolumeState::InUse, Some(AttachmentState::Attached));
        for (state, judged) in [("modifying", 'o'), ("optimizing", 'r'), ("completed", 'r'), ("failed", 'm')] {
            let change = VolumeModification {
                modification_state: state.to_owned(),
                progress: 40,
                status_message: "the host is full".to_owned(),
                ..VolumeModification::default()
            };
            volume.modification = Some(change);
            assert_eq!(judge(&volume, &Goal::Modified), judged, "{state}");
        }
        let Verdict::Missed(error) = volume.judge(&Goal::Modified) else { panic!() };
        assert!(error.to_string().contains("the host is full"), "{error}");
        if let Some(change) = volume.modification.as_mut() {
            change.modification_state = "modifying".to_owned();
        }
        assert_eq!(volume.shown(), Shown::percent("in-use, modifying", 40));
    }
}
