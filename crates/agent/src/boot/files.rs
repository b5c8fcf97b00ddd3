//! From a root disk to opened files for the VMM, with a cache of unpacked kernels.

use std::fs::{File, OpenOptions};
use std::io::{self, Write};
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::SystemTime;

use nix::fcntl::{FcntlArg, SealFlag, fcntl};
use nix::sys::memfd::{MFdFlags, memfd_create};
use parking_lot::Mutex;
use sha2::{Digest, Sha256};

use super::{BootError, FileDisk, KernelKind, Override, ReadAt, discover, extract_vmlinux, kernel_kind};
use crate::launch::BootFiles;
use crate::state::{sync_dir, write_atomically};

/// Unpacked kernels that are kept.
const KEPT_KERNELS: usize = 16;

/// Finds what a disk boots and opens it for a VMM.
#[derive(Debug)]
pub struct BootLoader {
    kernels: PathBuf,
    /// One discovery at a time: it may hold a kernel and an initrd of some hundred MiB in memory.
    busy: Mutex<()>,
}

/// Why nothing can be handed to a VMM.
#[derive(Debug, thiserror::Error)]
pub enum BootFilesError {
    /// The disk's fault.
    #[error(transparent)]
    Image(#[from] BootError),
    /// The host's fault.
    #[error("{action}: {source}")]
    Host {
        /// What was tried.
        action: String,
        /// What the system said.
        source: io::Error,
    },
}

fn host(action: impl Into<String>) -> impl FnOnce(io::Error) -> BootFilesError {
    move |source| BootFilesError::Host { action: action.into(), source }
}

impl BootLoader {
    /// A loader that caches unpacked kernels in `folder`.
    pub fn new(folder: &Path) -> io::Result<Self> {
        std::fs::create_dir_all(folder)?;
        Ok(Self { kernels: folder.to_owned(), busy: Mutex::new(()) })
    }

    /// Finds kernel, initrd and command line in the raw disk at `path`. Blocks.
    pub fn load(&self, path: &Path, overrides: &Override) -> Result<BootFiles, BootFilesError> {
        let opened = File::open(path).and_then(FileDisk::new).map_err(host(format!("opening {}", path.display())))?;
        let file = Arc::new(opened);
        self.load_from(&(file.clone() as Arc<dyn ReadAt>), &path.display().to_string(), overrides, || {
            file.take_failure()
        })
    }

    /// The same in any disk; `name` is for messages, `failure` tells what went wrong beneath the disk since it was last asked.
    pub fn load_from(
        &self,
        disk: &Arc<dyn ReadAt>,
        name: &str,
        overrides: &Override,
        failure: impl Fn() -> Option<io::Error>,
    ) -> Result<BootFiles, BootFilesError> {
        let _one_at_a_time = self.busy.lock();
        let found = discover(disk, overrides).map_err(|error| match failure() {
            // What could not be read may well be there: nothing is said against the disk's content.
            Some(source) => host(format!("reading {name}"))(source),
            None => BootFilesError::Image(error),
        })?;
        let kernel = self.kernel(&found.kernel)?;
        let initrd = found.initrd.as_deref().map(|content| in_memory(c"initrd", content)).transpose();
        let initrd = initrd.map_err(host("keeping the initrd in memory"))?;
        tracing::debug!(disk = name, kernel = found.kernel_place, cmdline = found.cmdline, "found what to boot");
        Ok(BootFiles { kernel, initrd, cmdline: found.cmdline })
    }

    /// The vmlinux of a kernel from the cache, or the kernel itself when it cannot be unpacked.
    fn kernel(&self, content: &[u8]) -> Result<File, BootFilesError> {
        if kernel_kind(content) == KernelKind::Vmlinux {
            return in_memory(c"kernel", content).map_err(host("keeping the kernel in memory"));
        }
        let folder = self.kernels.join(hex::encode(Sha256::digest(content)));
        let path = folder.join("vmlinux");
        match OpenOptions::new().read(true).custom_flags(libc::O_NOFOLLOW).open(&path) {
            Ok(file) => {
                // Recently used: the folder's time orders the cache. It is no harm if it cannot be set.
                let _ = File::open(&folder).and_then(|folder| folder.set_modified(SystemTime::now()));
                return Ok(file);
            }
            Err(error) if error.kind() == io::ErrorKind::NotFound => {}
            Err(error) => return Err(host(format!("opening {}", path.display()))(error)),
        }
        match extract_vmlinux(content) {
            Ok(vmlinux) => {
                self.keep(&folder, &path, &vmlinux).map_err(host(format!("writing {}", path.display())))?;
                File::open(&path).map_err(host(format!("opening {}", path.display())))
            }
            Err(reason) => {
                tracing::info!(reason, "booting the bzImage as it is");
                in_memory(c"kernel", content).map_err(host("keeping the kernel in memory"))
            }
        }
    }

    fn keep(&self, folder: &Path, path: &Path, vmlinux: &[u8]) -> io::Result<()> {
        std::fs::create_dir_all(folder)?;
        // Read-only: running VMMs map it.
        write_atomically(path, vmlinux, 0o444)?;
        sync_dir(&self.kernels)?;
        let mut kept: Vec<(SystemTime, PathBuf)> = std::fs::read_dir(&self.kernels)?
            .flatten()
            .filter_map(|entry| Some((entry.metadata().ok()?.modified().ok()?, entry.path())))
            .collect();
        kept.sort();
        let surplus = kept.len().saturating_sub(KEPT_KERNELS);
        for (_, old) in kept.iter().take(surplus).filter(|(_, old)| old != folder) {
            // VMMs that use it keep their mapping.
            std::fs::remove_dir_all(old)?;
        }
        Ok(())
    }
}

/// A sealed memory file: nobody who gets its descriptor can change it.
fn in_memory(name: &std::ffi::CStr, content: &[u8]) -> io::Result<File> {
    let fd = memfd_create(name, MFdFlags::MFD_CLOEXEC | MFdFlags::MFD_ALLOW_SEALING)?;
    let mut file = File::from(fd);
    file.write_all(content)?;
    let seals = SealFlag::F_SEAL_SHRINK | SealFlag::F_SEAL_GROW | SealFlag::F_SEAL_WRITE | SealFlag::F_SEAL_SEAL;
    fcntl(&file, FcntlArg::F_ADD_SEALS(seals))?;
    Ok(file)
}

#[cfg(test)]
#[path = "files_test.rs"]
mod tests;
