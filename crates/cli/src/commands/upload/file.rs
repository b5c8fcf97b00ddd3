//! The file of an upload: sent piece by piece, and compared with what the control plane has of it.

use std::fs::{File, Metadata};
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use hearth_proto::v1::import_image_request::Message;
use hearth_proto::v1::{ImportImageRequest, UploadPosition};
use hearth_snapshot::{PIECE_BYTES, PrefixDigest, next_piece};
use indicatif::ProgressBar;
use tokio::sync::mpsc;

use crate::error::CliError;
use crate::human;

/// Longest silence: the control plane does not wait for more than a minute.
const LONGEST_SILENCE: Duration = Duration::from_secs(10);

/// See the module.
pub struct UploadFile {
    file: File,
    path: PathBuf,
    metadata: Metadata,
    /// What is known of the file's beginning: digests, by where the pieces with content end.
    digests: Vec<(u64, PrefixDigest)>,
    /// Up to where they go.
    known: u64,
}

/// Whether the connection still wants more.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Heard {
    Yes,
    No,
}

/// Where messages go, and when the last one went.
struct Outlet {
    sender: mpsc::Sender<ImportImageRequest>,
    last: Instant,
}

impl Outlet {
    fn send(&mut self, message: Option<Message>) -> Heard {
        self.last = Instant::now();
        match self.sender.blocking_send(ImportImageRequest { message }) {
            Ok(()) => Heard::Yes,
            Err(_) => Heard::No,
        }
    }

    fn is_silent(&self) -> bool {
        self.last.elapsed() >= LONGEST_SILENCE
    }
}

impl UploadFile {
    pub fn open(path: &Path) -> Result<Self, CliError> {
        let file = File::open(path).map_err(CliError::io(format!("open {}", path.display())))?;
        let metadata = file.metadata().map_err(CliError::io(format!("look at {}", path.display())))?;
        if !metadata.is_file() {
            let why = "is not a file: an upload must know its size, and be able to begin again in the middle";
            return Err(CliError::Usage(format!("{} {why}", path.display())));
        }
        Ok(Self { file, path: path.to_owned(), metadata, digests: Vec::new(), known: 0 })
    }

    /// Size in bytes.
    pub fn size(&self) -> u64 {
        self.metadata.len()
    }

    /// Nanoseconds since 1970 of the last change, as far as the file system knows it.
    pub fn modified_nanos(&self) -> i128 {
        use std::os::unix::fs::MetadataExt;
        i128::from(self.metadata.mtime()) * 1_000_000_000 + i128::from(self.metadata.mtime_nsec())
    }

    fn failed(&self) -> impl FnOnce(std::io::Error) -> CliError + use<> {
        CliError::io(format!("read {}", self.path.display()))
    }

    fn note(&mut self, end: u64, digest: PrefixDigest) {
        self.digests.push((end, digest));
        self.known = end;
    }

    fn last_digest(&self) -> PrefixDigest {
        self.digests.last().map(|(_, digest)| *digest).unwrap_or_default()
    }

    /// Digest of what is before `offset`, which is known.
    fn digest_at(&self, offset: u64) -> PrefixDigest {
        let count = self.digests.partition_point(|(end, _)| *end <= offset);
        count.checked_sub(1).and_then(|last| self.digests.get(last)).map(|(_, digest)| *digest).unwrap_or_default()
    }

    /// Compares the file's beginning with what the control plane has, and sends the rest. Ends early without error when nobody
    /// listens any more.
    pub fn send(
        &mut self,
        position: &UploadPosition,
        sender: mpsc::Sender<ImportImageRequest>,
        bar: &ProgressBar,
    ) -> Result<(), CliError> {
        let mut outlet = Outlet { sender, last: Instant::now() };
        let now = self.file.metadata().map_err(self.failed())?;
        let stamp = |metadata: &Metadata| (metadata.len(), metadata.modified().ok());
        if stamp(&now) != stamp(&self.metadata) {
            return Err(self.changed(&position.image_id, "it has been changed since the upload began"));
        }
        if self.check(position, &mut outlet, bar)? == Heard::No {
            return Ok(());
        }
        self.send_from(position.offset, &mut outlet, bar)
    }

    fn check(&mut self, position: &UploadPosition, outlet: &mut Outlet, bar: &ProgressBar) -> Result<Heard, CliError> {
        let mut piece = Vec::new();
        if self.known < position.offset {
            bar.set_message("checking what is there already");
        }
        while self.known < position.offset {
            let mut heard = Heard::Yes;
            let found = next_piece(&self.file, self.known, position.offset, &mut piece, |_| {
                if outlet.is_silent() && heard == Heard::Yes {
                    heard = outlet.send(None);
                }
            });
            match found.map_err(self.failed())? {
                Some(begin) => self.note(begin + piece.len() as u64, self.last_digest().with(begin, &piece)),
                None => self.known = position.offset,
            }
            bar.set_position(self.known);
            if outlet.is_silent() && heard == Heard::Yes {
                heard = outlet.send(None);
            }
            if heard == Heard::No {
                return Ok(Heard::No);
            }
        }
        let theirs = PrefixDigest::from_bytes(&position.digest);
        if position.offset > self.size() || theirs != Some(self.digest_at(position.offset)) {
            let why = format!("its first {} are others than those uploaded before", human::bytes(position.offset));
            return Err(self.changed(&position.image_id, &why));
        }
        Ok(Heard::Yes)
    }

    fn changed(&self, image_id: &str, why: &str) -> CliError {
        CliError::Blocked {
            message: format!("{} is not the file that image {image_id} was begun with: {why}", self.path.display()),
            advice: format!(
                "`hearth image deregister {image_id}` gives up what was uploaded; then import the file again."
            ),
        }
    }

    fn send_from(&mut self, begin: u64, outlet: &mut Outlet, bar: &ProgressBar) -> Result<(), CliError> {
        let size = self.size();
        bar.set_message("uploading");
        let mut piece = Vec::new();
        let mut sent = begin;
        while sent < size {
            let mut heard = Heard::Yes;
            let found = next_piece(&self.file, sent, size, &mut piece, |looked_at| {
                // Zeros that the disk holds take their time to be read.
                if outlet.is_silent() && heard == Heard::Yes {
                    heard = outlet.send(Some(Message::Zeros(looked_at - sent)));
                    sent = looked_at;
                }
            });
            let begin = found.map_err(self.failed())?.unwrap_or(size);
            if heard == Heard::Yes && begin > sent {
                heard = outlet.send(Some(Message::Zeros(begin - sent)));
            }
            sent = begin;
            if heard == Heard::Yes && begin < size {
                if begin >= self.known {
                    self.note(begin + piece.len() as u64, self.last_digest().with(begin, &piece));
                }
                sent = begin + piece.len() as u64;
                heard = outlet.send(Some(Message::Chunk(piece.clone().into())));
            }
            if heard == Heard::No {
                return Ok(());
            }
            self.known = self.known.max(sent);
            bar.set_position(sent);
        }
        Ok(())
    }
}

/// One message holds one piece, well below gRPC's 4 MiB.
const _: () = assert!(PIECE_BYTES <= 2 << 20);
