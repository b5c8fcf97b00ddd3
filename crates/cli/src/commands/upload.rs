//! Uploads of disk images: holes and zeros travel as numbers, not as bytes. When the connection breaks, the upload goes on by itself
//! where the control plane has it; when this program ends, the next run of the same command does.

mod file;

use std::path::Path;
use std::time::{Duration, Instant};

use hearth_proto::v1::import_image_request::Message;
use hearth_proto::v1::{BootOverride, Image, ImageState, ImportImageHeader, ImportImageRequest, ImportImageResponse};
use hearth_snapshot::{Format, ImageError, detect};
use prost::Message as _;
use tokio::sync::mpsc;
use tokio::task::{JoinError, JoinHandle};
use tokio_stream::wrappers::ReceiverStream;
use tonic::Code;

use self::file::UploadFile;
use super::meter::Meter;
use crate::args::image::{ImageFormat, ImportArgs};
use crate::client::{Client, tags};
use crate::error::CliError;
use crate::human;

/// Messages that wait for the network.
const QUEUE: usize = 4;
/// Pause before the connection is tried again, at first and at most.
const FIRST_PAUSE: Duration = Duration::from_millis(250);
const LONGEST_PAUSE: Duration = Duration::from_secs(5);

pub async fn import(client: &Client, args: ImportArgs) -> Result<Image, CliError> {
    let path = &args.file;
    let file = UploadFile::open(path)?;
    check_format(path, args.format)?;
    let name = match args.name {
        Some(name) => name,
        None => path.file_stem().map(|stem| stem.to_string_lossy().into_owned()).unwrap_or_default(),
    };
    let register = args.register;
    let boot = BootOverride { extra_cmdline: register.extra_cmdline, cmdline: register.cmdline };
    let mut header = ImportImageHeader {
        name,
        description: register.description,
        format: args.format.map(|format| format.name().to_owned()).unwrap_or_default(),
        file_bytes: file.size(),
        tags: tags(&register.tags),
        client_token: String::new(),
        boot: Some(boot).filter(|boot| *boot != BootOverride::default()),
        resumable: true,
    };
    header.client_token = args.client_token.unwrap_or_else(|| token_of(&header, &file));
    let meter = Meter::new("uploading", file.size());
    let mut upload = Upload { client, header, file: Some(file), meter, answers: 0, best: (false, 0) };
    let image = upload.run(args.reconnect_for).await;
    upload.meter.bar.finish_and_clear();
    image
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

/// The same for the same file under the same name and with the same flags, so that a repeated command goes on with its upload. That
/// the content is the same too is checked before anything is sent.
fn token_of(header: &ImportImageHeader, file: &UploadFile) -> String {
    let mut hasher = blake3::Hasher::new_derive_key("hearth 2026-11-30 client tokens of image imports");
    hasher.update(&file.modified_nanos().to_le_bytes()).update(&header.encode_to_vec());
    hasher.finalize().to_hex().chars().take(32).collect()
}

/// A file on its way, and how that ended.
type Sending = JoinHandle<(UploadFile, Result<(), CliError>)>;

struct Upload<'a> {
    client: &'a Client,
    header: ImportImageHeader,
    /// Not here while it is being sent.
    file: Option<UploadFile>,
    meter: Meter,
    /// Answers that have come in this run.
    answers: u64,
    /// How far it was at best: whether it was being converted, and bytes of that step.
    best: (bool, u64),
}

impl Upload<'_> {
    async fn run(&mut self, patience: Duration) -> Result<Image, CliError> {
        let (mut spent, mut pause) = (Duration::ZERO, FIRST_PAUSE);
        loop {
            let (best, answers, began) = (self.best, self.answers, Instant::now());
            let error = match self.attempt().await {
                Ok(image) => return Ok(image),
                Err(error) => error,
            };
            // What was never there need not be waited for.
            if self.answers == 0 || !comes_back(&error) {
                return Err(error);
            }
            if self.best > best {
                (spent, pause) = (Duration::ZERO, FIRST_PAUSE);
            } else if self.answers == answers {
                spent += began.elapsed();
            }
            if spent >= patience {
                return Err(CliError::Timeout(format!(
                    "gave up after {} without getting further: {error}\nWhat has been uploaded stays on the control plane for a \
                     while: run the same command again to go on.",
                    human::duration(patience)
                )));
            }
            self.meter.wait(&error.to_string(), patience - spent);
            tokio::time::sleep(pause).await;
            spent += pause;
            pause = (pause * 2).min(LONGEST_PAUSE);
        }
    }

    /// One call, from where the control plane says to its end.
    async fn attempt(&mut self) -> Result<Image, CliError> {
        let (sender, receiver) = mpsc::channel(QUEUE);
        let header = ImportImageRequest { message: Some(Message::Header(self.header.clone())) };
        // There is room for the first.
        let _ = sender.try_send(header);
        let mut images = self.client.images().send_compressed(tonic::codec::CompressionEncoding::Zstd);
        let answer = images.import_image(ReceiverStream::new(receiver)).await;
        let answers = answer.map_err(|status| self.client.failure(status))?.into_inner();
        let mut sending = None;
        let outcome = self.receive(answers, sender, &mut sending).await;
        if sending.is_none() {
            return outcome;
        }
        // When the file could not be read, the server only saw an upload that broke off.
        self.take_back(sent(&mut sending).await).and(outcome)
    }

    fn take_back(&mut self, sent: Result<(UploadFile, Result<(), CliError>), JoinError>) -> Result<(), CliError> {
        let (file, sent) = sent.map_err(|error| CliError::Program(format!("reading the file: {error}")))?;
        self.file = Some(file);
        sent
    }

    async fn receive(
        &mut self,
        mut answers: tonic::Streaming<ImportImageResponse>,
        sender: mpsc::Sender<ImportImageRequest>,
        sending: &mut Option<Sending>,
    ) -> Result<Image, CliError> {
        let mut sender = Some(sender);
        loop {
            let answer = tokio::select! {
                answer = answers.message() => answer.map_err(|status| self.client.failure(status))?,
                done = sent(sending) => {
                    self.take_back(done)?;
                    continue;
                }
            };
            let Some(answer) = answer else { return Err(CliError::Interrupted) };
            self.answers += 1;
            if let Some(image) = answer.image {
                if self.answers == 1 && image.state() == ImageState::Available {
                    self.meter.note(&format!("{} was imported before", image.name));
                }
                return ended(image);
            }
            if let Some(position) = answer.upload
                && let Some(sender) = sender.take()
                && let Some(mut file) = self.file.take()
            {
                if position.offset > 0 {
                    let share = human::progress(position.offset, self.header.file_bytes);
                    self.meter.note(&format!("resuming at {share}"));
                }
                self.best = self.best.max((false, position.offset));
                let bar = self.meter.bar.clone();
                *sending = Some(tokio::task::spawn_blocking(move || {
                    let sent = file.send(&position, sender, &bar);
                    (file, sent)
                }));
            }
            if let Some(progress) = answer.progress {
                self.best = self.best.max((progress.step != "uploading", progress.done_bytes));
                self.meter.show(&progress.step, progress.done_bytes, progress.total_bytes);
            }
        }
    }
}

/// Waits until the file is sent, for ever when none is.
async fn sent(sending: &mut Option<Sending>) -> Result<(UploadFile, Result<(), CliError>), JoinError> {
    let Some(running) = sending else { return std::future::pending().await };
    let done = running.await;
    *sending = None;
    done
}

fn ended(image: Image) -> Result<Image, CliError> {
    if image.state() != ImageState::Failed {
        return Ok(image);
    }
    let reason = image.state_reason.clone().unwrap_or_default();
    let message = match reason.code.as_str() {
        "Server.InternalError" => format!("{} was not imported ({}): {}", image.name, image.image_id, reason.message),
        _ => format!("{} is no image ({}): {}", image.name, image.image_id, reason.message),
    };
    Err(CliError::Failed { message, reason: reason.code })
}

/// Whether the upload can go on after this.
fn comes_back(error: &CliError) -> bool {
    match error {
        CliError::Interrupted => true,
        // A stream that was cut off, or others that have taken the places.
        CliError::Api(failure) if failure.code == Code::Cancelled || failure.reason == "RequestLimitExceeded" => true,
        error => error.is_transient(),
    }
}
