//! Images from the control plane.

use std::sync::Arc;

use async_trait::async_trait;
use futures::stream::BoxStream;
use futures::{StreamExt, TryStreamExt};
use hearth_proto::v1::{FetchImageRequest, FetchImageResponse, fetch_image_response};
use hearth_types::ImageId;

use super::{Link, LinkError};
use crate::images::{Content, FetchError, ImageSource, Piece};

/// Fetches over the connection that is up.
pub struct ControlImages(pub Arc<Link>);

fn fetch_error(status: &tonic::Status) -> FetchError {
    match LinkError::status(status) {
        LinkError::Refused(reason) => FetchError::Refused(reason),
        error => FetchError::Unreachable(error.to_string()),
    }
}

fn piece(message: FetchImageResponse) -> Result<Piece, FetchError> {
    let content = match message.content {
        Some(fetch_image_response::Content::Data(data)) => Content::Data(data),
        Some(fetch_image_response::Content::Zeros(count)) => Content::Zeros(count),
        None => return Err(FetchError::Unreachable("an empty piece".into())),
    };
    Ok(Piece { offset: message.offset, content })
}

#[async_trait]
impl ImageSource for ControlImages {
    async fn fetch(
        &self,
        image: &ImageId,
        offset: u64,
    ) -> Result<BoxStream<'static, Result<Piece, FetchError>>, FetchError> {
        let mut client = self.0.client().ok_or_else(|| FetchError::Unreachable("no session".into()))?;
        let request = FetchImageRequest { image_id: image.to_string(), offset };
        let answer = client.fetch_image(request).await.map_err(|status| fetch_error(&status))?;
        Ok(answer.into_inner().map_err(|status| fetch_error(&status)).and_then(|m| async { piece(m) }).boxed())
    }
}
