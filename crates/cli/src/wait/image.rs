//! Waiting for images that are made of instances. The API has no watch of images: they are asked for again and again.

use hearth_proto::v1::{Image, ImageState, Snapshot};

use super::{Changes, Followed, Shown, Verdict, missed, polled};
use crate::client::Client;
use crate::commands::lookup;
use crate::error::CliError;
use crate::view::image::{snapshot_ids, state_name};

/// An image and how far its snapshots are.
#[derive(Clone, Debug, Default)]
pub struct Making {
    /// The image.
    pub image: Image,
    /// Mean of its snapshots; `None` before they are begun.
    pub percent: Option<u32>,
}

/// What is waited for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Available;

impl Making {
    fn new(image: Image, snapshots: &[Snapshot]) -> Self {
        let ids = snapshot_ids(&image);
        let of_it: Vec<u64> = snapshots
            .iter()
            .filter(|snapshot| ids.contains(&snapshot.snapshot_id))
            .map(|snapshot| snapshot.progress.min(100).into())
            .collect();
        let mean = of_it.iter().sum::<u64>().checked_div(of_it.len() as u64);
        Self { percent: mean.and_then(|mean| u32::try_from(mean).ok()), image }
    }

    async fn look(client: &Client, ids: &[String]) -> Result<Vec<Self>, CliError> {
        let images = lookup::list_images(client, ids, &[]).await?;
        let pending = images.iter().filter(|image| image.state() == ImageState::Pending);
        let wanted: Vec<String> = pending.flat_map(snapshot_ids).collect();
        let snapshots = match wanted.is_empty() {
            true => Vec::new(),
            false => lookup::list_snapshots(client, &[], &[lookup::any_of("snapshot-id", &wanted)]).await?,
        };
        Ok(images.into_iter().map(|image| Self::new(image, &snapshots)).collect())
    }
}

impl Followed for Making {
    type Goal = Available;

    fn id(&self) -> &str {
        &self.image.image_id
    }

    fn shown(&self) -> Shown {
        let state = state_name(self.image.state());
        match (self.image.state(), self.percent) {
            (ImageState::Pending, Some(percent)) => Shown::percent(format!("{state}: saving the volumes"), percent),
            (ImageState::Pending, None) => Shown::text(format!("{state}: fixing the point in time")),
            _ => Shown::text(state),
        }
    }

    fn judge(&self, goal: &Available) -> Verdict {
        match self.image.state() {
            ImageState::Available => Verdict::Reached,
            ImageState::Pending | ImageState::Unspecified => Verdict::Open,
            ImageState::Failed | ImageState::Deregistered => {
                let (state, wanted) = (state_name(self.image.state()), Self::goal_name(goal));
                Verdict::Missed(missed(self.id(), &state, &wanted, self.image.state_reason.as_ref()))
            }
        }
    }

    fn goal_name(_: &Available) -> String {
        state_name(ImageState::Available)
    }

    fn gone_is_reached(_: &Available) -> bool {
        false
    }

    async fn watch(client: &Client, ids: Vec<String>) -> Result<Changes<Self>, CliError> {
        let client = client.clone();
        let first = Self::look(&client, &ids).await?;
        Ok(polled(first, move || {
            let (client, ids) = (client.clone(), ids.clone());
            async move { Self::look(&client, &ids).await }
        }))
    }

    async fn existing(client: &Client, ids: &[String]) -> Result<Vec<Self>, CliError> {
        let images = lookup::list_images(client, &[], &[lookup::any_of("image-id", ids)]).await?;
        Ok(images.into_iter().map(|image| Self::new(image, &[])).collect())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use hearth_proto::v1::{BlockDeviceMapping, EbsBlockDevice, StateReason};

    fn image(state: ImageState, snapshots: &[&str]) -> Image {
        let mapping = |id: &&str| BlockDeviceMapping {
            ebs: Some(EbsBlockDevice { snapshot_id: (*id).to_owned(), ..Default::default() }),
            ..Default::default()
        };
        Image {
            image_id: "ami-1".to_owned(),
            state: state.into(),
            block_device_mappings: snapshots.iter().map(mapping).collect(),
            ..Image::default()
        }
    }

    #[test]
    fn progress_is_the_mean_of_the_images_own_snapshots() {
        let snapshot = |id: &str, progress| Snapshot { snapshot_id: id.to_owned(), progress, ..Snapshot::default() };
        let all = [snapshot("snap-1", 100), snapshot("snap-2", 50), snapshot("snap-3", 0)];
        let making = Making::new(image(ImageState::Pending, &["snap-1", "snap-2"]), &all);
        assert_eq!(making.percent, Some(75));
        assert_eq!(making.shown(), Shown::percent("pending: saving the volumes", 75));
        let begun = Making::new(image(ImageState::Pending, &[""]), &all);
        assert_eq!((begun.percent, begun.shown().total), (None, 0));
    }

    #[test]
    fn an_image_is_available_or_will_never_be() {
        let judge = |state| Making::new(image(state, &[]), &[]).judge(&Available);
        assert!(matches!(judge(ImageState::Pending), Verdict::Open));
        assert!(matches!(judge(ImageState::Available), Verdict::Reached));
        assert!(matches!(judge(ImageState::Deregistered), Verdict::Missed(_)));
        let mut failed = image(ImageState::Failed, &[]);
        failed.state_reason = Some(StateReason { code: "Server.X".into(), message: "a snapshot failed".into() });
        let Verdict::Missed(error) = Making::new(failed, &[]).judge(&Available) else { panic!() };
        assert_eq!(error.to_string(), "ami-1 is failed and will not be available: a snapshot failed (Server.X)");
    }
}
