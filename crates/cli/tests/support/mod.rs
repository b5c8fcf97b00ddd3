//! A control plane that holds a few objects in memory and does as a test says, and the built `hearth` program.

#![allow(dead_code)]

pub mod storage;

use std::collections::VecDeque;
use std::net::SocketAddr;
use std::path::PathBuf;
use std::process::{Output, Stdio};
use std::sync::{Arc, Mutex};

use hearth_proto::v1::image_service_server::{ImageService, ImageServiceServer};
use hearth_proto::v1::import_image_request::Message as Upload;
use hearth_proto::v1::instance_service_server::{InstanceService, InstanceServiceServer};
use hearth_proto::v1::snapshot_service_server::SnapshotServiceServer;
use hearth_proto::v1::storage_service_server::StorageServiceServer;
use hearth_proto::v1::volume_service_server::VolumeServiceServer;
use hearth_proto::v1::*;
use hearth_snapshot::{PIECE_BYTES, PrefixDigest};
pub use storage::Storage;
use tokio::io::AsyncWriteExt;
use tokio::sync::mpsc;
use tokio_stream::wrappers::{ReceiverStream, TcpListenerStream};
use tonic::{Request, Response, Status, Streaming};

pub const TOKEN: &str = "hearth_test";

/// What one call of WatchInstances sends before it breaks off (or stays silent).
#[derive(Clone, Debug)]
pub struct Watch {
    pub instances: Vec<Instance>,
    pub ends: bool,
}

#[derive(Debug, Default)]
pub struct State {
    pub instances: Vec<Instance>,
    pub images: Vec<Image>,
    pub watches: VecDeque<Watch>,
    /// The next call fails with this.
    pub failure: Option<Status>,
    pub launched: Vec<RunInstancesRequest>,
    pub modified: Vec<ModifyInstanceAttributeRequest>,
    pub listed: Vec<ListInstancesRequest>,
    pub storage: Storage,
    pub registered: Vec<RegisterImageRequest>,
    pub images_created: Vec<CreateImageRequest>,
    pub deregistered: Vec<DeregisterImageRequest>,
    pub objects_deleted: Vec<String>,
    pub stored: Vec<StoreImageTask>,
    pub restored: Vec<CreateRestoreImageTaskRequest>,
    /// Filters of the last list of what has no tags.
    pub filters: Vec<Filter>,
    pub replaced: Vec<CreateReplaceRootVolumeTaskRequest>,
    pub bundles: Vec<BundleTask>,
    pub bundles_created: Vec<CreateBundleRequest>,
    pub bundles_cancelled: Vec<String>,
    /// What the next export sends.
    pub export: Vec<export_image_response::Message>,
    pub exported: Vec<ExportImageRequest>,
    pub upload: Vec<u8>,
    pub upload_messages: usize,
    /// Bytes that came as bytes.
    pub upload_bytes: u64,
    pub upload_headers: Vec<ImportImageHeader>,
    /// After so many bytes (0: as soon as it has begun) the next upload breaks off.
    pub upload_breaks: VecDeque<u64>,
    /// Uploads whose client said that it was all.
    pub upload_ends: usize,
}

impl State {
    /// Where an upload goes on, as the control plane says it.
    fn position(&mut self) -> UploadPosition {
        let whole = self.upload.len() / PIECE_BYTES as usize * PIECE_BYTES as usize;
        self.upload.truncate(whole);
        let pieces = self.upload.chunks(PIECE_BYTES as usize).enumerate();
        let digest = pieces
            .fold(PrefixDigest::default(), |digest, (number, piece)| digest.with(number as u64 * PIECE_BYTES, piece));
        let digest = digest.as_bytes().to_vec().into();
        UploadPosition { image_id: format!("ami-{:017x}", 7), offset: whole as u64, digest }
    }
}

#[derive(Clone, Default)]
pub struct Fake {
    pub state: Arc<Mutex<State>>,
}

impl Fake {
    pub fn begin<T>(&self, request: &Request<T>) -> Result<std::sync::MutexGuard<'_, State>, Status> {
        let token = request.metadata().get("authorization").and_then(|value| value.to_str().ok());
        if token != Some(&format!("Bearer {TOKEN}")) {
            return Err(Status::unauthenticated("no such token"));
        }
        let mut state = self.state.lock().unwrap();
        match state.failure.take() {
            Some(status) => Err(status),
            None => Ok(state),
        }
    }

    pub async fn start(self) -> SocketAddr {
        let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
        let address = listener.local_addr().unwrap();
        let server = tonic::transport::Server::builder()
            .add_service(InstanceServiceServer::new(self.clone()))
            .add_service(VolumeServiceServer::new(self.clone()))
            .add_service(SnapshotServiceServer::new(self.clone()))
            .add_service(StorageServiceServer::new(self.clone()))
            .add_service(ImageServiceServer::new(self).accept_compressed(tonic::codec::CompressionEncoding::Zstd));
        tokio::spawn(server.serve_with_incoming(TcpListenerStream::new(listener)));
        address
    }
}

pub fn instance(number: u32, name: &str, state: InstanceState) -> Instance {
    Instance {
        instance_id: format!("i-{number:017x}"),
        instance_type: "t3.micro".to_owned(),
        state: state.into(),
        tags: vec![Tag { key: "Name".to_owned(), value: name.to_owned() }],
        launch_time: format!("2026-11-23T12:00:{number:02}Z"),
        ..Instance::default()
    }
}

fn wanted(instance: &Instance, filters: &[Filter]) -> bool {
    filters.iter().all(|filter| match filter.name.as_str() {
        "instance-id" => filter.values.iter().any(|v| instance.instance_id.starts_with(v.trim_end_matches('*'))),
        "tag:Name" => instance.tags.iter().any(|tag| tag.key == "Name" && filter.values.contains(&tag.value)),
        "instance-state-name" => {
            let state = instance.state().as_str_name().to_lowercase().replace('_', "-");
            filter.values.iter().any(|v| state == format!("instance-state-{v}"))
        }
        _ => true,
    })
}

pub type Answer<T> = Result<Response<T>, Status>;

#[tonic::async_trait]
impl InstanceService for Fake {
    async fn run_instances(&self, request: Request<RunInstancesRequest>) -> Answer<RunInstancesResponse> {
        let mut state = self.begin(&request)?;
        let request = request.into_inner();
        state.launched.push(request.clone());
        let count = request.max_count;
        let instances: Vec<_> = (0..count).map(|n| instance(900 + n, "new", InstanceState::Pending)).collect();
        state.instances.extend(instances.clone());
        Ok(Response::new(RunInstancesResponse { reservation_id: "r-1".to_owned(), instances }))
    }

    /// One instance a page.
    async fn list_instances(&self, request: Request<ListInstancesRequest>) -> Answer<ListInstancesResponse> {
        let mut state = self.begin(&request)?;
        let request = request.into_inner();
        state.listed.push(request.clone());
        let ids = &request.instance_ids;
        let found: Vec<_> = state
            .instances
            .iter()
            .filter(|i| (ids.is_empty() || ids.contains(&i.instance_id)) && wanted(i, &request.filters))
            .cloned()
            .collect();
        let at: usize = request.page.map(|page| page.next_token.parse().unwrap_or(0)).unwrap_or(0);
        let next_token = if at + 1 < found.len() { (at + 1).to_string() } else { String::new() };
        let instances = found.into_iter().skip(at).take(1).collect();
        Ok(Response::new(ListInstancesResponse { instances, page: Some(PageResponse { next_token }) }))
    }

    async fn get_instance(&self, request: Request<GetInstanceRequest>) -> Answer<Instance> {
        let state = self.begin(&request)?;
        let id = &request.get_ref().instance_id;
        state
            .instances
            .iter()
            .find(|i| i.instance_id == *id)
            .cloned()
            .map(Response::new)
            .ok_or_else(|| Status::not_found(id))
    }

    async fn start_instances(&self, _: Request<StartInstancesRequest>) -> Answer<StartInstancesResponse> {
        Err(Status::unimplemented("start"))
    }

    async fn stop_instances(&self, request: Request<StopInstancesRequest>) -> Answer<StopInstancesResponse> {
        let _state = self.begin(&request)?;
        let change = |id: String| InstanceStateChange {
            instance_id: id,
            previous_state: InstanceState::Running.into(),
            current_state: InstanceState::Stopping.into(),
        };
        let changes = request.into_inner().instance_ids.into_iter().map(change).collect();
        Ok(Response::new(StopInstancesResponse { changes }))
    }

    async fn modify_instance_attribute(&self, request: Request<ModifyInstanceAttributeRequest>) -> Answer<Instance> {
        let mut state = self.begin(&request)?;
        state.modified.push(request.into_inner());
        state.instances.first().cloned().map(Response::new).ok_or_else(|| Status::not_found("modify"))
    }

    async fn reboot_instances(&self, _: Request<RebootInstancesRequest>) -> Answer<RebootInstancesResponse> {
        Err(Status::unimplemented("reboot"))
    }

    async fn terminate_instances(&self, _: Request<TerminateInstancesRequest>) -> Answer<TerminateInstancesResponse> {
        Err(Status::unimplemented("terminate"))
    }

    async fn create_replace_root_volume_task(
        &self,
        request: Request<CreateReplaceRootVolumeTaskRequest>,
    ) -> Answer<ReplaceRootVolumeTask> {
        self.begin(&request)?.replaced.push(request.into_inner());
        let task_id = format!("replacevol-{:017x}", 1);
        Ok(Response::new(ReplaceRootVolumeTask { task_id, ..ReplaceRootVolumeTask::default() }))
    }

    async fn list_replace_root_volume_tasks(
        &self,
        request: Request<ListReplaceRootVolumeTasksRequest>,
    ) -> Answer<ListReplaceRootVolumeTasksResponse> {
        let _state = self.begin(&request)?;
        let task_id = format!("replacevol-{:017x}", 1);
        let state = ReplaceRootVolumeTaskState::Succeeded.into();
        let tasks = vec![ReplaceRootVolumeTask { task_id, state, ..ReplaceRootVolumeTask::default() }];
        Ok(Response::new(ListReplaceRootVolumeTasksResponse { tasks, page: None }))
    }

    type WatchInstancesStream = ReceiverStream<Result<Instance, Status>>;

    async fn watch_instances(&self, request: Request<WatchInstancesRequest>) -> Answer<Self::WatchInstancesStream> {
        let watch = self.begin(&request)?.watches.pop_front().ok_or_else(|| Status::internal("no more watches"))?;
        let (sender, receiver) = mpsc::channel(16);
        tokio::spawn(async move {
            for instance in watch.instances {
                let _ = sender.send(Ok(instance)).await;
            }
            if watch.ends {
                let _ = sender.send(Err(Status::unavailable("restarting"))).await;
            } else {
                sender.closed().await;
            }
        });
        Ok(Response::new(ReceiverStream::new(receiver)))
    }

    async fn get_console_output(&self, request: Request<GetConsoleOutputRequest>) -> Answer<GetConsoleOutputResponse> {
        let _state = self.begin(&request)?;
        let output = b"boot\xff\n".to_vec().into();
        Ok(Response::new(GetConsoleOutputResponse { output, timestamp: String::new() }))
    }

    type ConsoleStream = ReceiverStream<Result<ConsoleOutput, Status>>;

    /// Says "login: ", then echoes in capitals, one byte a message.
    async fn console(&self, request: Request<Streaming<ConsoleInput>>) -> Answer<Self::ConsoleStream> {
        drop(self.begin(&request)?);
        let mut input = request.into_inner();
        let (sender, receiver) = mpsc::channel(16);
        tokio::spawn(async move {
            let say = async |text: &[u8]| {
                for byte in text {
                    let _ = sender.send(Ok(ConsoleOutput { data: vec![*byte].into() })).await;
                }
            };
            say(b"login: ").await;
            while let Ok(Some(message)) = input.message().await {
                if let Some(console_input::Message::Data(data)) = message.message {
                    say(&data.to_ascii_uppercase()).await;
                }
            }
        });
        Ok(Response::new(ReceiverStream::new(receiver)))
    }
}

#[tonic::async_trait]
impl ImageService for Fake {
    type ImportImageStream = ReceiverStream<Result<ImportImageResponse, Status>>;

    async fn import_image(&self, request: Request<Streaming<ImportImageRequest>>) -> Answer<Self::ImportImageStream> {
        drop(self.begin(&request)?);
        let mut upload = request.into_inner();
        let (sender, receiver) = mpsc::channel(16);
        let state = self.state.clone();
        tokio::spawn(async move {
            let mut left = u64::MAX;
            let broken = || Err(Status::unavailable("restarting"));
            while let Ok(Some(message)) = upload.message().await {
                let answers = {
                    let mut state = state.lock().unwrap();
                    state.upload_messages += 1;
                    match message.message {
                        Some(Upload::Header(header)) => {
                            state.upload_headers.push(header);
                            left = state.upload_breaks.pop_front().unwrap_or(u64::MAX);
                            let position = ImportImageResponse { upload: Some(state.position()), ..Default::default() };
                            [Some(Ok(position)), (left == 0).then(broken)]
                        }
                        Some(Upload::Chunk(chunk)) => {
                            state.upload_bytes += chunk.len() as u64;
                            left = left.saturating_sub(chunk.len() as u64);
                            state.upload.extend_from_slice(&chunk);
                            [None, (left == 0).then(broken)]
                        }
                        Some(Upload::Zeros(count)) => {
                            let length = state.upload.len() + count as usize;
                            state.upload.resize(length, 0);
                            [None, None]
                        }
                        None => [None, None],
                    }
                };
                let breaks = answers[1].is_some();
                for answer in answers.into_iter().flatten() {
                    let _ = sender.send(answer).await;
                }
                if breaks {
                    return;
                }
            }
            let header = {
                let mut state = state.lock().unwrap();
                state.upload_ends += 1;
                state.upload_headers.last().cloned().unwrap_or_default()
            };
            if state.lock().unwrap().upload.len() as u64 != header.file_bytes {
                return;
            }
            let progress = Progress { done_bytes: 1, total_bytes: 2, step: "converting".to_owned() };
            let _ = sender.send(Ok(ImportImageResponse { progress: Some(progress), ..Default::default() })).await;
            let name = header.name;
            let image = Image { image_id: format!("ami-{:017x}", 7), name, ..Image::default() };
            let _ = sender.send(Ok(ImportImageResponse { image: Some(image), ..Default::default() })).await;
        });
        Ok(Response::new(ReceiverStream::new(receiver)))
    }

    async fn list_images(&self, request: Request<ListImagesRequest>) -> Answer<ListImagesResponse> {
        let state = self.begin(&request)?;
        let wanted = |image: &&Image| {
            request.get_ref().filters.iter().all(|f| f.name != "name" || f.values.contains(&image.name))
        };
        Ok(Response::new(ListImagesResponse {
            images: state.images.iter().filter(wanted).cloned().collect(),
            page: None,
        }))
    }

    async fn get_image(&self, request: Request<GetImageRequest>) -> Answer<Image> {
        let state = self.begin(&request)?;
        let id = &request.get_ref().image_id;
        let found = state.images.iter().find(|image| image.image_id == *id).cloned();
        found.map(Response::new).ok_or_else(|| Status::not_found(id))
    }

    async fn deregister_image(&self, request: Request<DeregisterImageRequest>) -> Answer<DeregisterImageResponse> {
        self.begin(&request)?.deregistered.push(request.into_inner());
        Ok(Response::new(DeregisterImageResponse {}))
    }

    async fn create_bundle(&self, request: Request<CreateBundleRequest>) -> Answer<BundleTask> {
        let mut state = self.begin(&request)?;
        let request = request.into_inner();
        let task = BundleTask {
            bundle_id: format!("bun-{:017x}", 1),
            instance_id: request.instance_id.clone(),
            image_id: request.image_id.clone(),
            state: BundleTaskState::Pending.into(),
            ..BundleTask::default()
        };
        state.bundles_created.push(request);
        state.bundles = vec![BundleTask { state: BundleTaskState::Complete.into(), ..task.clone() }];
        Ok(Response::new(task))
    }

    async fn list_bundle_tasks(&self, request: Request<ListBundleTasksRequest>) -> Answer<ListBundleTasksResponse> {
        let mut state = self.begin(&request)?;
        let request = request.into_inner();
        let ids = &request.bundle_ids;
        let all = state.bundles.iter().filter(|task| ids.is_empty() || ids.contains(&task.bundle_id));
        let tasks = all.cloned().collect();
        state.filters = request.filters;
        Ok(Response::new(ListBundleTasksResponse { tasks, page: None }))
    }

    async fn cancel_bundle_task(&self, request: Request<CancelBundleTaskRequest>) -> Answer<BundleTask> {
        self.begin(&request)?.bundles_cancelled.push(request.into_inner().bundle_id);
        Ok(Response::new(BundleTask::default()))
    }

    async fn delete_bundle(&self, request: Request<DeleteBundleRequest>) -> Answer<DeleteBundleResponse> {
        self.begin(&request)?.objects_deleted.push(request.into_inner().image_location);
        Ok(Response::new(DeleteBundleResponse {}))
    }

    async fn delete_stored_image(
        &self,
        request: Request<DeleteStoredImageRequest>,
    ) -> Answer<DeleteStoredImageResponse> {
        self.begin(&request)?.objects_deleted.push(request.into_inner().object_key);
        Ok(Response::new(DeleteStoredImageResponse {}))
    }

    async fn create_store_image_task(&self, request: Request<CreateStoreImageTaskRequest>) -> Answer<StoreImageTask> {
        let mut state = self.begin(&request)?;
        let request = request.into_inner();
        let task = StoreImageTask {
            task_id: format!("storeimage-{:017x}", 1),
            image_id: request.image_id.clone(),
            object_key: format!("archive/1/{}/{}.bin", request.prefix, request.image_id),
            state: StoreImageTaskState::InProgress.into(),
            ..StoreImageTask::default()
        };
        state.stored = vec![StoreImageTask { state: StoreImageTaskState::Completed.into(), ..task.clone() }];
        Ok(Response::new(task))
    }

    async fn list_store_image_tasks(
        &self,
        request: Request<ListStoreImageTasksRequest>,
    ) -> Answer<ListStoreImageTasksResponse> {
        let mut state = self.begin(&request)?;
        let tasks = state.stored.clone();
        state.filters = request.into_inner().filters;
        Ok(Response::new(ListStoreImageTasksResponse { tasks, page: None }))
    }

    async fn list_restore_image_tasks(
        &self,
        request: Request<ListRestoreImageTasksRequest>,
    ) -> Answer<ListRestoreImageTasksResponse> {
        let one = |restored: &CreateRestoreImageTaskRequest| RestoreImageTask {
            object_key: restored.object_key.clone(),
            state: StoreImageTaskState::InProgress.into(),
            progress: 40,
            ..RestoreImageTask::default()
        };
        let mut state = self.begin(&request)?;
        let tasks = state.restored.iter().map(one).collect();
        state.filters = request.into_inner().filters;
        Ok(Response::new(ListRestoreImageTasksResponse { tasks, page: None }))
    }

    async fn create_restore_image_task(&self, request: Request<CreateRestoreImageTaskRequest>) -> Answer<Image> {
        let mut state = self.begin(&request)?;
        let request = request.into_inner();
        let image_id = format!("ami-{:017x}", 0xe);
        let made = Image { image_id, name: request.name.clone(), ..Image::default() };
        state.restored.push(request);
        state.images.push(Image { state: ImageState::Available.into(), ..made.clone() });
        Ok(Response::new(Image { state: ImageState::Pending.into(), ..made }))
    }

    async fn register_image(&self, request: Request<RegisterImageRequest>) -> Answer<Image> {
        let mut state = self.begin(&request)?;
        let request = request.into_inner();
        state.registered.push(request.clone());
        Ok(Response::new(Image { image_id: format!("ami-{:017x}", 8), name: request.name, ..Image::default() }))
    }

    /// Pending at first, available when it is listed.
    async fn create_image(&self, request: Request<CreateImageRequest>) -> Answer<Image> {
        let mut state = self.begin(&request)?;
        let request = request.into_inner();
        state.images_created.push(request.clone());
        let mut image = Image {
            image_id: format!("ami-{:017x}", 9),
            name: request.name,
            state: ImageState::Available.into(),
            ..Image::default()
        };
        state.images.push(image.clone());
        image.set_state(ImageState::Pending);
        Ok(Response::new(image))
    }

    async fn copy_image(&self, _: Request<CopyImageRequest>) -> Answer<Image> {
        Err(Status::unimplemented("copy"))
    }

    type ExportImageStream = ReceiverStream<Result<ExportImageResponse, Status>>;

    async fn export_image(&self, request: Request<ExportImageRequest>) -> Answer<Self::ExportImageStream> {
        let mut state = self.begin(&request)?;
        state.exported.push(request.into_inner());
        let (sender, receiver) = mpsc::channel(16);
        let answers = std::mem::take(&mut state.export);
        tokio::spawn(async move {
            for message in answers {
                let _ = sender.send(Ok(ExportImageResponse { message: Some(message) })).await;
            }
        });
        Ok(Response::new(ReceiverStream::new(receiver)))
    }
}

/// A running fake and the program pointed at it.
pub struct Bed {
    pub fake: Fake,
    pub address: SocketAddr,
    pub home: tempfile::TempDir,
}

/// What the program said.
#[derive(Debug)]
pub struct Said {
    pub code: i32,
    pub out: String,
    pub err: String,
}

impl Bed {
    pub async fn new() -> Self {
        let fake = Fake::default();
        let address = fake.clone().start().await;
        Self { fake, address, home: tempfile::TempDir::new().unwrap() }
    }

    pub fn state(&self) -> std::sync::MutexGuard<'_, State> {
        self.fake.state.lock().unwrap()
    }

    pub fn path(&self, name: &str) -> PathBuf {
        self.home.path().join(name)
    }

    pub fn command(&self, args: &[&str]) -> tokio::process::Command {
        let mut command = tokio::process::Command::new(env!("CARGO_BIN_EXE_hearth"));
        command
            .args(args)
            .env_clear()
            .env("HOME", self.home.path())
            .env("HEARTH_ENDPOINT", format!("http://{}", self.address))
            .env("HEARTH_CREDENTIALS", self.credentials())
            .stdin(Stdio::null())
            .stdout(Stdio::piped())
            .stderr(Stdio::piped())
            .kill_on_drop(true);
        command
    }

    fn credentials(&self) -> PathBuf {
        let path = self.path("credentials.json");
        let text = format!(r#"{{"endpoint":"","ca_certificate":"","token":"{TOKEN}","account_id":"000000000001"}}"#);
        std::fs::write(&path, text).unwrap();
        path
    }

    pub async fn run(&self, args: &[&str]) -> Said {
        said(self.command(args).output().await.unwrap())
    }

    pub async fn run_with_input(&self, args: &[&str], input: &[u8]) -> Said {
        let mut child = self.command(args).stdin(Stdio::piped()).spawn().unwrap();
        let mut stdin = child.stdin.take().unwrap();
        stdin.write_all(input).await.unwrap();
        drop(stdin);
        said(child.wait_with_output().await.unwrap())
    }
}

fn said(output: Output) -> Said {
    Said {
        code: output.status.code().unwrap_or(-1),
        out: String::from_utf8_lossy(&output.stdout).into_owned(),
        err: String::from_utf8_lossy(&output.stderr).into_owned(),
    }
}
