//! Uploads of disk images: holes and zeros travel as numbers, not as bytes.

use std::fs::File;
use std::os::unix::fs::FileExt;
use std::path::Path;

use hearth_proto::v1::import_image_request::Message;
use hearth_proto::v1::{BootOverride, Image, ImageState, ImportImageHeader, ImportImageRequest, ImportImageResponse};
use hearth_snapshot::{Format, ImageError, detect, next_data};
use indicatif::ProgressBar;
use tokio::sync::mpsc;
use tokio_stream::wrappers::ReceiverStream;

use super::meter::Meter;
use crate::args::image::{ImageFormat, ImportArgs};
use crate::client::{self, Client, tags};
use crate::error::CliError;

/// Bytes in one message: large enough to be quick, well below gRPC's 4 MiB.
const CHUNK: usize = 512 << 10;
/// Messages that wait for the network.
const QUEUE: usize = 4;

pub async fn import(client: &Client, args: ImportArgs) -> Result<Image, CliError> {
    let path = &args.file;
    let file = File::open(path).map_err(CliError::io(format!("open {}", path.display())))?;
    let metadata = file.metadata().map_err(CliError::io(format!("look at {}", path.display())))?;
    if !metadata.is_file() {
        return Err(CliError::Usage(format!("{} is not a file", path.display())));
    }
    check_format(path, args.format)?;
    let name = match args.name {
        Some(name) => name,
        None => path.file_stem().map(|stem| stem.to_string_lossy().into_owned()).unwrap_or_default(),
    };
    let register = args.register;
    let boot = BootOverride { extra_cmdline: register.extra_cmdline, cmdline: register.cmdline };
    let header = ImportImageHeader {
        name,
        description: register.description,
        format: args.format.map(|format| format.name().to_owned()).unwrap_or_default(),
        file_bytes: metadata.len(),
        tags: tags(&register.tags),
        client_token: client::client_token(args.client_token)?,
        boot: Some(boot).filter(|boot| *boot != BootOverride::default()),
    };
    let (sender, receiver) = mpsc::channel(QUEUE);
    let meter = Meter::new("uploading", metadata.len());
    let reader = read_file(file, path.to_owned(), header, sender, meter.bar.clone());
    let reader = tokio::task::spawn_blocking(reader);

    let mut images = client.images().send_compressed(tonic::codec::CompressionEncoding::Zstd);
    let answer = images.import_image(ReceiverStream::new(receiver)).await;
    let outcome = match answer {
        Ok(answer) => receive(client, answer.into_inner(), &meter).await,
        Err(status) => Err(client.failure(status)),
    };
    meter.bar.finish_and_clear();
    // When the file could not be read, the server only saw an upload that broke off.
    match (reader.await, outcome) {
        (Ok(Err(error)), _) => Err(error),
        (_, outcome) => outcome,
    }
}

/// What is surely no disk image need not travel.
fn check_format(path: &Path, given: Option<ImageFormat>) -> Result<(), CliError> {
    let wanted = match given {
        Some(ImageFormat::Raw) => return Ok(()),
        Some(ImageFormat::Qcow2) => Some(Format::Qcow2),
        Some(ImageFormat::Vmdk) => Some(Format::Vmdk),
        None => None,
    };
    let found = detect(path)?;
    match wanted {
        Some(wanted) if wanted != found => Err(ImageError::WrongFormat(wanted).into()),
        _ => Ok(()),
    }
}

/// Sends the header and then the file; ends early without error when nobody listens any more.
fn read_file(
    file: File,
    path: std::path::PathBuf,
    header: ImportImageHeader,
    sender: mpsc::Sender<ImportImageRequest>,
    bar: ProgressBar,
) -> impl FnOnce() -> Result<(), CliError> + Send + 'static {
    move || {
        let send = |message| sender.blocking_send(ImportImageRequest { message: Some(message) }).is_ok();
        let failed = || CliError::io(format!("read {}", path.display()));
        let size = header.file_bytes;
        if !send(Message::Header(header)) {
            return Ok(());
        }
        let mut position = 0;
        let mut zeros = 0;
        while position < size {
            let (start, end) = next_data(&file, position, size).map_err(failed())?.unwrap_or((size, size));
            zeros += start - position;
            position = start;
            while position < end {
                let mut chunk = vec![0; CHUNK.min((end - position) as usize)];
                file.read_exact_at(&mut chunk, position).map_err(failed())?;
                position += chunk.len() as u64;
                if chunk.iter().all(|byte| *byte == 0) {
                    zeros += chunk.len() as u64;
                    continue;
                }
                if zeros > 0 && !send(Message::Zeros(std::mem::take(&mut zeros))) || !send(Message::Chunk(chunk.into()))
                {
                    return Ok(());
                }
                bar.set_position(position);
            }
        }
        if zeros > 0 {
            send(Message::Zeros(zeros));
        }
        bar.set_position(size);
        Ok(())
    }
}

async fn receive(
    client: &Client,
    mut answers: tonic::Streaming<ImportImageResponse>,
    meter: &Meter,
) -> Result<Image, CliError> {
    while let Some(answer) = answers.message().await.map_err(|status| client.failure(status))? {
        if let Some(image) = answer.image {
            if image.state() == ImageState::Failed {
                let reason = image.state_reason.clone().unwrap_or_default();
                let message = format!("{} is no image ({}): {}", image.name, image.image_id, reason.message);
                return Err(CliError::Failed { message, reason: reason.code });
            }
            return Ok(image);
        }
        if let Some(progress) = answer.progress {
            meter.show(&progress.step, progress.done_bytes, progress.total_bytes);
        }
    }
    Err(CliError::Program("the control plane ended the import without an answer; see `hearth image list`".to_owned()))
}
