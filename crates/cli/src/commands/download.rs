//! Exported disks: a sparse file that appears when it is complete.

use std::fs::{File, Permissions};
use std::os::unix::fs::{FileExt, PermissionsExt};
use std::path::Path;

use hearth_proto::v1::export_image_response::Message;
use hearth_proto::v1::{ExportImageRequest, ExportImageResponse};
use tempfile::NamedTempFile;
use tokio::signal::ctrl_c;

use super::meter::Meter;
use crate::args::image::ExportArgs;
use crate::client::Client;
use crate::error::CliError;

/// Saves the root disk of an image; answers the file's size in bytes.
pub async fn export(client: &Client, image_id: &str, args: &ExportArgs) -> Result<u64, CliError> {
    let path = &args.file;
    if !args.overwrite && path.symlink_metadata().is_ok() {
        return Err(CliError::Usage(format!("{} exists already; --overwrite replaces it", path.display())));
    }
    if path.is_dir() {
        return Err(CliError::Usage(format!("{} is a folder; name the file", path.display())));
    }
    let folder = match path.parent() {
        Some(folder) if folder != Path::new("") => folder,
        _ => Path::new("."),
    };
    // Beside the file, so that it can be renamed; gone when the export breaks off.
    let part = tempfile::Builder::new()
        .prefix(".hearth-export-")
        .permissions(Permissions::from_mode(0o666))
        .tempfile_in(folder)
        .map_err(CliError::io(format!("create a file in {}", folder.display())))?;
    let request = ExportImageRequest { image_id: image_id.to_owned(), format: args.format().name().to_owned() };
    let meter = Meter::new("exporting", 0);
    let received = tokio::select! {
        received = receive(client, request, part.as_file(), path, &meter) => received,
        _ = ctrl_c() => Err(CliError::Program("interrupted; nothing was kept".to_owned())),
    };
    meter.bar.finish_and_clear();
    let size = received?;
    keep(part, path, args.overwrite)?;
    Ok(size)
}

async fn receive(
    client: &Client,
    request: ExportImageRequest,
    file: &File,
    path: &Path,
    meter: &Meter,
) -> Result<u64, CliError> {
    let mut answers = client.unwrap(client.images().export_image(request).await)?;
    let mut writer = SparseWriter::new(file);
    let failed = || CliError::io(format!("write {}", path.display()));
    while let Some(ExportImageResponse { message }) =
        answers.message().await.map_err(|status| client.failure(status))?
    {
        match message {
            Some(Message::Progress(progress)) => {
                meter.show(&progress.step, progress.done_bytes, progress.total_bytes);
                continue;
            }
            Some(Message::FileBytes(size)) => writer.size = Some(size),
            Some(Message::Data(data)) if writer.fits(data.len() as u64) => writer.data(&data).map_err(failed())?,
            Some(Message::Zeros(count)) if writer.fits(count) => writer.position += count,
            Some(Message::Data(_) | Message::Zeros(_)) => {
                return Err(CliError::Program("the control plane sent more than it said the file has".to_owned()));
            }
            None => {}
        }
        meter.show("downloading", writer.position, writer.size.unwrap_or_default());
    }
    match writer.size {
        Some(size) if size == writer.position => {
            writer.finish(size).map_err(failed())?;
            Ok(size)
        }
        _ => Err(CliError::Program("the control plane ended the export before the file was complete".to_owned())),
    }
}

/// Puts the complete file in its place.
fn keep(part: NamedTempFile, path: &Path, overwrite: bool) -> Result<(), CliError> {
    let kept = if overwrite { part.persist(path) } else { part.persist_noclobber(path) };
    kept.map(|_| ()).map_err(|error| CliError::io(format!("name the file {}", path.display()))(error.error))
}

/// Writes a file whose zeros are holes.
struct SparseWriter<'a> {
    file: &'a File,
    /// Of the whole file, once it is told.
    size: Option<u64>,
    position: u64,
}

impl<'a> SparseWriter<'a> {
    fn new(file: &'a File) -> Self {
        Self { file, size: None, position: 0 }
    }

    /// Whether so many bytes more belong to the file.
    fn fits(&self, count: u64) -> bool {
        let end = self.position.checked_add(count);
        end.zip(self.size).is_some_and(|(end, size)| end <= size)
    }

    fn data(&mut self, data: &[u8]) -> std::io::Result<()> {
        self.file.write_all_at(data, self.position)?;
        self.position += data.len() as u64;
        Ok(())
    }

    /// Zeros at the end are a hole too.
    fn finish(&self, size: u64) -> std::io::Result<()> {
        self.file.set_len(size)?;
        self.file.sync_all()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;
    use std::os::unix::fs::MetadataExt;

    #[test]
    fn nothing_beyond_the_told_size_is_taken() {
        let file = tempfile::tempfile().unwrap();
        let mut writer = SparseWriter::new(&file);
        assert!(!writer.fits(0), "the size comes first");
        writer.size = Some(10);
        assert!(writer.fits(10) && !writer.fits(11));
        writer.position = 8;
        assert!(writer.fits(2) && !writer.fits(3) && !writer.fits(u64::MAX));
    }

    #[test]
    fn zeros_take_no_room() {
        let file = tempfile::tempfile().unwrap();
        let mut writer = SparseWriter::new(&file);
        writer.data(b"begin").unwrap();
        writer.position += 1 << 30;
        writer.data(b"end").unwrap();
        writer.position += 1 << 30;
        writer.finish(writer.position).unwrap();
        let metadata = file.metadata().unwrap();
        assert_eq!(metadata.len(), (2 << 30) + 8);
        assert!(metadata.blocks() * 512 < 1 << 20, "{} blocks", metadata.blocks());
    }

    proptest! {
        #[test]
        fn the_file_is_what_was_sent(pieces in prop::collection::vec((any::<bool>(), prop::collection::vec(any::<u8>(), 0..50)), 0..20)) {
            let file = tempfile::NamedTempFile::new().unwrap();
            let mut writer = SparseWriter::new(file.as_file());
            let mut wanted = Vec::new();
            for (zeros, bytes) in pieces {
                if zeros {
                    writer.position += bytes.len() as u64;
                    wanted.resize(wanted.len() + bytes.len(), 0);
                } else {
                    writer.data(&bytes).unwrap();
                    wanted.extend(&bytes);
                }
            }
            writer.finish(writer.position).unwrap();
            prop_assert_eq!(std::fs::read(file.path()).unwrap(), wanted);
        }
    }
}
