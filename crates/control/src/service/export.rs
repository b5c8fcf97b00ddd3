//! Exporting the root disk of an image as a file.

use std::pin::Pin;
use std::sync::Arc;
use std::time::Duration;

use futures::StreamExt;
use hearth_proto::v1;
use hearth_snapshot::{ExportFormat, next_data};
use parking_lot::Mutex;
use tokio::sync::mpsc;
use tokio::sync::mpsc::error::SendTimeoutError;
use tokio_stream::Stream;
use tokio_stream::wrappers::ReceiverStream;
use tonic::{Code, Status};

use super::{Api, image, snapshot};
use crate::api_error::{ApiError, ApiResult};
use crate::storage;

pub(crate) type ExportStream = Pin<Box<dyn Stream<Item = Result<v1::ExportImageResponse, Status>> + Send>>;

use v1::export_image_response::Message;
type Sender = mpsc::Sender<Result<v1::ExportImageResponse, Status>>;

/// Bytes of one message.
const PIECE_BYTES: u64 = 1 << 20;
const QUEUE: usize = 4;

fn message(message: Message) -> Result<v1::ExportImageResponse, Status> {
    Ok(v1::ExportImageResponse { message: Some(message) })
}

/// A file of the spool folder that goes when this is dropped.
struct Spooled(std::path::PathBuf);

impl Drop for Spooled {
    fn drop(&mut self) {
        if let Err(error) = std::fs::remove_file(&self.0) {
            tracing::debug!(path = %self.0.display(), %error, "no spool file to remove");
        }
    }
}

/// The way to the caller.
struct Outlet {
    sender: Sender,
    /// How long it may take nothing.
    patience: Duration,
    runtime: tokio::runtime::Handle,
}

impl Outlet {
    /// From a thread that may wait. `false` when nobody listens any more.
    fn send(&self, sent: Message) -> ApiResult<bool> {
        match self.runtime.block_on(self.sender.send_timeout(message(sent), self.patience)) {
            Ok(()) => Ok(true),
            Err(SendTimeoutError::Closed(_)) => Ok(false),
            Err(SendTimeoutError::Timeout(_)) => {
                let seconds = self.patience.as_secs();
                let message = format!("the caller has taken nothing for {seconds} s; begin the export anew");
                Err(ApiError::new(Code::DeadlineExceeded, "RequestExpired", message))
            }
        }
    }
}

/// Sends a file; holes as such. Ends early when nobody listens.
fn send(path: &std::path::Path, outlet: &Outlet) -> ApiResult<()> {
    use std::os::unix::fs::FileExt;
    let failed = |error: std::io::Error| ApiError::internal(format!("read {}: {error}", path.display()));
    let file = std::fs::File::open(path).map_err(failed)?;
    let size = file.metadata().map_err(failed)?.len();
    if !outlet.send(Message::FileBytes(size))? {
        return Ok(());
    }
    let mut at = 0;
    while at < size {
        let (start, end) = next_data(&file, at, size).map_err(failed)?.unwrap_or((size, size));
        if start > at && !outlet.send(Message::Zeros(start - at))? {
            return Ok(());
        }
        at = start;
        while at < end {
            let length = (end - at).min(PIECE_BYTES);
            let mut piece = vec![0; usize::try_from(length).unwrap_or(0)];
            file.read_exact_at(&mut piece, at).map_err(failed)?;
            if !outlet.send(Message::Data(piece.into()))? {
                return Ok(());
            }
            at += length;
        }
    }
    Ok(())
}

impl Api {
    pub(crate) async fn do_export_image(
        &self,
        account: &str,
        request: v1::ExportImageRequest,
    ) -> ApiResult<ExportStream> {
        let format: ExportFormat = match request.format.as_str() {
            "" => ExportFormat::Raw,
            format => format.parse().map_err(|error| ApiError::invalid("format", format!("{error}")))?,
        };
        let base = {
            let tables = self.core.tables();
            let (spec, _) = image::find(&tables, account, &request.image_id)?;
            let root = image::root_snapshot(spec);
            let root = root.ok_or_else(|| ApiError::invalid("image_id", "has no EBS root volume to export"))?;
            snapshot::find_completed(&tables, account, root)?.base()
        };
        let transfer = self.core.transfers.begin(account)?;
        let manifest = storage::load_manifest(&self.core, &base).await?;
        let store = self.core.storage.chunks(storage::name_of_domain(&base))?;
        let (sender, stream) = mpsc::channel(QUEUE);
        let mut unique = [0u8; 8];
        getrandom::fill(&mut unique)?;
        let path = self.core.config.spool_dir().join(format!("{}.export", hex::encode(unique)));
        let core = self.core.clone();
        let failure = Arc::new(Mutex::new(None));
        let ended = failure.clone();
        self.core.tasks.spawn(async move {
            let _transfer = transfer;
            let _spooled = Spooled(path.clone());
            let tell: Sender = sender.clone();
            let progress = Arc::new(move |done: u64, total: u64| {
                let chunk = hearth_snapshot::CHUNK_BYTES as u64;
                let step = "exporting".to_owned();
                let progress = v1::Progress { done_bytes: done * chunk, total_bytes: total * chunk, step };
                // A caller that is slow to read misses some.
                let _ = tell.try_send(message(Message::Progress(progress)));
            });
            let written = tokio::select! {
                written = hearth_snapshot::export(&store, &manifest, &path, format, progress) => written,
                () = core.stop.cancelled() => return,
                () = sender.closed() => return,
            };
            let result = match written {
                Ok(_) => {
                    let (runtime, patience) = (tokio::runtime::Handle::current(), core.config.transfer_timeout);
                    let outlet = Outlet { sender: sender.clone(), patience, runtime };
                    let path = path.clone();
                    let sent = tokio::task::spawn_blocking(move || send(&path, &outlet)).await;
                    sent.unwrap_or_else(|error| Err(ApiError::internal(error.to_string())))
                }
                Err(error) => Err(ApiError::internal(format!("export: {error}"))),
            };
            if let Err(error) = result {
                tracing::debug!(%error, "an export has ended early");
                *failure.lock() = Some(error.into());
            }
        });
        // Behind all that is on its way: a caller that takes nothing must not hold up the end.
        let last = futures::stream::once(async move { ended.lock().take() });
        let last = last.filter_map(|failure: Option<Status>| futures::future::ready(failure.map(Err)));
        Ok(Box::pin(ReceiverStream::new(stream).chain(last)))
    }
}
