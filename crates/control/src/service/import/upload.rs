//! One client's turn at an upload: from the position that the server tells to the end of the file, or of the connection.

use std::sync::Arc;

use hearth_proto::v1;
use tokio::sync::OwnedSemaphorePermit;
use tonic::{Code, Streaming};
use v1::import_image_request::Message;

use super::seats::Seat;
use super::spool::{self, Spool};
use super::{Caller, Pending, convert, next, note_position, pending, permit_for};
use crate::api_error::{ApiError, ApiResult};
use crate::core::Core;

/// Bytes after which an upload's progress is told.
const TELL_BYTES: u64 = 16 << 20;

/// Takes the upload over from whoever is at it, and brings it as far as this client does. `Ok`: nothing more is to be sent.
pub(super) async fn receive(
    caller: &Caller,
    messages: Streaming<v1::ImportImageRequest>,
    permit: Option<OwnedSemaphorePermit>,
) -> ApiResult<()> {
    let core = &caller.core;
    let seat = core.uploads.take(&caller.image_id).await;
    let _permit = match permit {
        Some(permit) => permit,
        None => permit_for(core)?,
    };
    // While the seat was waited for, it may have become whole, or ended.
    let found = pending(&core.tables(), &caller.image_id);
    let Some(pending) = found.filter(|found| !found.is_whole()) else { return Ok(()) };
    let outcome = match Spool::open(core, &pending).await {
        Ok(mut spool) => {
            let received = Turn { caller, pending: &pending, seat: &seat, spool: &mut spool }.run(messages).await;
            settle(core, &pending, spool, received).await
        }
        Err(error) => Err(error),
    };
    core.live.set_progress(&caller.image_id, None);
    if let Err(error) = &outcome {
        tracing::warn!(image = caller.image_id, %error, "the upload broke off");
        if !pending.job.resumable
            && let Err(error) = super::take_back(core, &caller.image_id).await
        {
            tracing::error!(image = caller.image_id, %error, "an import could not be taken back; the next start does it");
        }
        let is_gone = super::pending(&core.tables(), &caller.image_id).is_none();
        if is_gone {
            spool::remove(core, &caller.image_id).await;
        }
    }
    outcome
}

/// Notes how far the upload is, after the client's turn.
async fn settle(core: &Arc<Core>, pending: &Pending, mut spool: Spool, received: ApiResult<()>) -> ApiResult<()> {
    let image = &pending.spec.image_id;
    let synced = spool.sync().await;
    if received.is_ok() {
        let (_, digest) = synced?.ok_or_else(|| ApiError::internal("the spool file has failed"))?;
        convert::hand_over(core, image, digest).await?;
        convert::begin(core, image);
        return Ok(());
    }
    let noted = match synced {
        Ok(Some((offset, digest))) if pending.job.resumable => note_position(core, image, offset, digest).await,
        synced => synced.map(|_| ()),
    };
    if let Err(error) = noted {
        tracing::warn!(image, %error, "how far the upload is could not be noted; it goes on from the last checkpoint");
    }
    received
}

struct Turn<'a> {
    caller: &'a Caller,
    pending: &'a Pending,
    seat: &'a Seat,
    spool: &'a mut Spool,
}

impl Turn<'_> {
    async fn run(&mut self, mut messages: Streaming<v1::ImportImageRequest>) -> ApiResult<()> {
        let size = self.pending.job.file_bytes;
        if self.pending.job.resumable {
            self.caller.tell_position(self.spool.begin()).await;
        }
        let mut told = self.spool.position();
        loop {
            let position = self.spool.position();
            let progress = v1::Progress { done_bytes: position, total_bytes: size, step: "uploading".to_owned() };
            if position - told >= TELL_BYTES {
                told = position;
                self.caller.tell(&progress);
            }
            self.caller.core.live.set_progress(&self.caller.image_id, Some(progress));
            if position >= size {
                return Ok(());
            }
            let message = tokio::select! {
                biased;
                () = self.seat.overtaken() => return Err(self.overtaken()),
                () = self.caller.core.stop.cancelled() => return Err(ApiError::unavailable("the control plane is stopping")),
                message = next(&mut messages) => message?,
            };
            let Some(message) = message else {
                return Err(broken_off(format!("the upload ended after {position} of {size} bytes")));
            };
            let count = match &message.message {
                Some(Message::Chunk(chunk)) => chunk.len() as u64,
                Some(Message::Zeros(zeros)) => *zeros,
                Some(Message::Header(_)) => return Err(ApiError::invalid("header", "came twice")),
                None => 0,
            };
            if position.checked_add(count).is_none_or(|after| after > size) {
                let why = format!("more than the {size} bytes that the header announced");
                return Err(ApiError::invalid("chunk", why));
            }
            match message.message {
                Some(Message::Chunk(chunk)) => self.spool.data(chunk).await?,
                Some(Message::Zeros(zeros)) => self.spool.zeros(zeros).await?,
                Some(Message::Header(_)) | None => {}
            }
        }
    }

    /// Another client has come for the same import, or it was given up.
    fn overtaken(&self) -> ApiError {
        if pending(&self.caller.core.tables(), &self.caller.image_id).is_none() {
            return self.caller.gone();
        }
        let id = &self.caller.image_id;
        let message = format!("another client goes on with the upload of image {id}; only the newest one can");
        ApiError::new(Code::FailedPrecondition, "UploadTakenOver", message).with("image_id", id)
    }
}

pub(super) fn broken_off(why: impl Into<String>) -> ApiError {
    ApiError::new(Code::Aborted, "UploadAborted", why)
}
