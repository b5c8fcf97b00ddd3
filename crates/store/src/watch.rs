//! The stream that a watch returns.

use std::pin::Pin;
use std::task::{Context, Poll};

use tokio_stream::{Stream, StreamExt};

use crate::error::Result;
use crate::model::WatchBatch;

/// Ordered batches of events, one per revision, without gaps or duplicates.
///
/// It ends after its first error: [`Error::Compacted`](crate::Error::Compacted) when the history it
/// still had to read was compacted (list again, watch from there), or
/// [`Error::Closed`](crate::Error::Closed). A slow consumer holds up nobody. Dropping it ends the watch.
pub struct WatchStream {
    inner: Pin<Box<dyn Stream<Item = Result<WatchBatch>> + Send>>,
    ended: bool,
}

impl WatchStream {
    /// Wraps a backend's stream.
    pub fn new(inner: impl Stream<Item = Result<WatchBatch>> + Send + 'static) -> Self {
        Self { inner: Box::pin(inner), ended: false }
    }

    /// The next batch; `None` once the watch has ended. Safe to cancel: no batch is lost.
    pub async fn next(&mut self) -> Option<Result<WatchBatch>> {
        StreamExt::next(self).await
    }
}

impl Stream for WatchStream {
    type Item = Result<WatchBatch>;

    fn poll_next(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Option<Self::Item>> {
        if self.ended {
            return Poll::Ready(None);
        }
        let polled = self.inner.as_mut().poll_next(cx);
        if matches!(polled, Poll::Ready(None | Some(Err(_)))) {
            self.ended = true;
        }
        polled
    }
}

impl std::fmt::Debug for WatchStream {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("WatchStream").field("ended", &self.ended).finish_non_exhaustive()
    }
}
