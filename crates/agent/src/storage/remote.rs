//! The control plane's object store, over the connection that is up.

use std::sync::Arc;
use std::time::Duration;

use async_trait::async_trait;
use futures::future::BoxFuture;
use futures::stream::BoxStream;
use futures::{FutureExt, StreamExt};
use hearth_proto::v1;
use object_store::path::Path;
use object_store::{
    CopyOptions, Error, GetOptions, GetRange, GetResult, GetResultPayload, ListResult, MultipartUpload, ObjectMeta,
    ObjectStore, PutMode, PutMultipartOptions, PutOptions, PutPayload, PutResult, Result,
};
use tokio::time::{Instant, sleep};
use tonic::{Code, Response, Status};

use crate::link::{Link, ObjectClient};

/// How long a call waits for a control plane that is away: longer than a restart takes.
const PATIENCE: Duration = Duration::from_secs(120);
/// Pauses between tries.
const PAUSES: (Duration, Duration) = (Duration::from_millis(100), Duration::from_secs(2));
const NAME: &str = "the control plane's object store";
/// Most bytes in one answer: others use the connection too.
const PIECE: u64 = 2 << 20;

/// See the module. Objects are read in pieces and written as one message: the store holds none larger than some MiB.
#[derive(Clone)]
pub struct RemoteObjects(pub Arc<Link>);

impl std::fmt::Debug for RemoteObjects {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("RemoteObjects")
    }
}

impl std::fmt::Display for RemoteObjects {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(NAME)
    }
}

fn generic(source: impl Into<Box<dyn std::error::Error + Send + Sync>>) -> Error {
    Error::Generic { store: NAME, source: source.into() }
}

fn failed(path: &Path, status: Status) -> Error {
    let path = path.to_string();
    match status.code() {
        Code::NotFound => Error::NotFound { path, source: status.into() },
        Code::AlreadyExists => Error::AlreadyExists { path, source: status.into() },
        _ => generic(status.message().to_owned()),
    }
}

fn unsupported(operation: &str) -> Error {
    Error::NotSupported { source: format!("agents do not {operation}").into() }
}

fn meta(path: &Path, size: u64) -> ObjectMeta {
    ObjectMeta { location: path.clone(), last_modified: Default::default(), size, e_tag: None, version: None }
}

/// Whether the same call may succeed later, without anybody mending anything.
fn is_transient(code: Code) -> bool {
    matches!(code, Code::Unavailable | Code::Unknown | Code::Cancelled | Code::DeadlineExceeded | Code::Aborted)
}

impl RemoteObjects {
    /// Makes a call over the connection that is up, again when that breaks. All calls may be repeated: an object that was written is
    /// the same afterwards, and one that must not exist before is compared by whoever writes it.
    async fn call<T>(
        &self,
        path: &Path,
        make: impl Fn(ObjectClient) -> BoxFuture<'static, std::result::Result<Response<T>, Status>> + Send,
    ) -> Result<T> {
        let deadline = Instant::now() + PATIENCE;
        let mut pause = PAUSES.0;
        loop {
            let status = match self.0.objects() {
                Some(client) => match make(client).await {
                    Ok(answer) => return Ok(answer.into_inner()),
                    Err(status) => status,
                },
                None => Status::unavailable("there is no connection to the control plane"),
            };
            if !is_transient(status.code()) || Instant::now() + pause >= deadline {
                return Err(failed(path, status));
            }
            sleep(pause).await;
            pause = (pause * 2).min(PAUSES.1);
        }
    }

    async fn piece(&self, location: &Path, offset: u64, length: u64, head: bool) -> Result<v1::GetObjectResponse> {
        let request = v1::GetObjectRequest { key: location.to_string(), head, offset, length };
        let get = |mut client: ObjectClient| {
            let request = request.clone();
            async move { client.get_object(request).await }.boxed()
        };
        self.call(location, get).await
    }
}

#[async_trait]
impl ObjectStore for RemoteObjects {
    async fn put_opts(&self, location: &Path, payload: PutPayload, opts: PutOptions) -> Result<PutResult> {
        let create_only = match opts.mode {
            PutMode::Create => true,
            PutMode::Overwrite => false,
            PutMode::Update(_) => return Err(unsupported("replace versions of objects")),
        };
        let request = v1::PutObjectRequest { key: location.to_string(), data: payload.into(), create_only };
        let put = |mut client: ObjectClient| {
            let request = request.clone();
            async move { client.put_object(request).await }.boxed()
        };
        self.call(location, put).await?;
        Ok(PutResult { e_tag: None, version: None, extensions: Default::default() })
    }

    async fn put_multipart_opts(&self, _: &Path, _: PutMultipartOptions) -> Result<Box<dyn MultipartUpload>> {
        Err(unsupported("upload in parts"))
    }

    async fn get_opts(&self, location: &Path, options: GetOptions) -> Result<GetResult> {
        // The end is known when the first piece tells the object's size.
        let (offset, length) = match &options.range {
            Some(GetRange::Bounded(range)) => (range.start, (range.end - range.start).clamp(1, PIECE)),
            Some(GetRange::Offset(offset)) => (*offset, PIECE),
            Some(GetRange::Suffix(_)) => return Err(unsupported("read ends of objects")),
            None => (0, PIECE),
        };
        let first = self.piece(location, offset, length, options.head).await?;
        let meta = meta(location, first.size_bytes);
        options.check_preconditions(&meta)?;
        let range = match &options.range {
            None => 0..first.size_bytes,
            Some(range) => range.as_range(first.size_bytes).map_err(generic)?,
        };
        let (this, path, end) = (self.clone(), location.clone(), range.end);
        let begin = (!options.head).then_some((first.data, offset));
        let pieces = futures::stream::try_unfold(begin, move |state| {
            let (this, path) = (this.clone(), path.clone());
            async move {
                let Some((data, at)) = state else { return Ok(None) };
                let next = at + data.len() as u64;
                if data.is_empty() && next < end {
                    return Err(generic("a shorter object than its size says"));
                }
                let rest = match next < end {
                    true => Some((this.piece(&path, next, (end - next).min(PIECE), false).await?.data, next)),
                    false => None,
                };
                Ok::<_, Error>(Some((data, rest)))
            }
        });
        let payload = GetResultPayload::Stream(pieces.boxed());
        Ok(GetResult { payload, meta, range, attributes: Default::default(), extensions: Default::default() })
    }

    fn delete_stream(&self, locations: BoxStream<'static, Result<Path>>) -> BoxStream<'static, Result<Path>> {
        locations.map(|_| Err(unsupported("delete objects"))).boxed()
    }

    fn list(&self, prefix: Option<&Path>) -> BoxStream<'static, Result<ObjectMeta>> {
        let (this, prefix) = (self.clone(), prefix.map(Path::to_string).unwrap_or_default());
        let pages = futures::stream::try_unfold(Some(String::new()), move |after| {
            let (this, prefix) = (this.clone(), prefix.clone());
            async move {
                let Some(after) = after else { return Ok(None) };
                let request = v1::ListObjectsRequest { prefix, after };
                let list = |mut client: ObjectClient| {
                    let request = request.clone();
                    async move { client.list_objects(request).await }.boxed()
                };
                let page = this.call(&Path::default(), list).await?;
                let next = page.truncated.then(|| page.objects.last().map(|last| last.key.clone())).flatten();
                let found =
                    page.objects.into_iter().map(|object| Ok(meta(&Path::parse(&object.key)?, object.size_bytes)));
                Ok::<_, Error>(Some((futures::stream::iter(found.collect::<Vec<Result<_>>>()), next)))
            }
        });
        futures::TryStreamExt::try_flatten(pages).boxed()
    }

    async fn list_with_delimiter(&self, _: Option<&Path>) -> Result<ListResult> {
        Err(unsupported("list folders"))
    }

    async fn copy_opts(&self, _: &Path, _: &Path, _: CopyOptions) -> Result<()> {
        Err(unsupported("copy objects"))
    }
}
