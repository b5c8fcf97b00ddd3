//! A storage daemon that serves one image over NBD on a Unix socket.

use std::fs::{self, File};
use std::io::Read;
use std::os::fd::OwnedFd;
use std::os::unix::fs::DirBuilderExt;
use std::os::unix::net::UnixStream;
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant, SystemTime};

use nix::errno::Errno;
use nix::fcntl::{FcntlArg, fcntl};
use nix::libc;
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;

use super::{Cluster, Name};
use crate::DriverError;
use crate::command::{last_words, wait};

const PROGRAM: &str = "qemu-storage-daemon";
const SOCKET: &str = "nbd.sock";
const PID_FILE: &str = "pid";
const LOG: &str = "log";
/// A volume has one connection; one more asks for the size after it grew, another may not have noticed its end.
const MAX_CONNECTIONS: u32 = 8;
/// How long one that is asked to end may flush.
const END_PATIENCE: Duration = Duration::from_secs(10);
const TICK: Duration = Duration::from_millis(10);

/// A folder with a storage daemon's socket, pid file and log. The daemon goes on when this is dropped, and when this process ends;
/// [`adopt`](Self::adopt) finds it again.
#[derive(Debug)]
pub struct Export {
    folder: PathBuf,
    /// When this process started it: to be waited for at its end.
    child: Option<Child>,
}

impl Export {
    /// Name of the NBD export.
    pub const NAME: &'static str = "volume";

    /// Serves an image out of `folder`, which is made if it is not there, for the attachment with this generation. A daemon that already
    /// serves out of the folder is ended before, and whoever else has the image open is shut out. Returns when the new one takes
    /// connections.
    ///
    /// # Errors
    /// [`DriverError::Fenced`]: there is a later attachment. The daemon cannot be started or ends at once (its words are in the
    /// error), or does not serve within the cluster's patience.
    pub fn start(
        cluster: &Cluster,
        image: &Name,
        generation: u64,
        read_only: bool,
        folder: &Path,
    ) -> Result<Self, DriverError> {
        let io = |what: &str| DriverError::io(format!("{what} {}", folder.display()));
        fs::DirBuilder::new().recursive(true).mode(0o700).create(folder).map_err(io("make"))?;
        Self { folder: folder.to_owned(), child: None }.stop()?;
        cluster.claim(image, generation)?;
        let log = File::create(folder.join(LOG)).map_err(io("make the log in"))?;
        let mut node = cluster.block_node(image);
        if let Some(fields) = node.as_object_mut() {
            fields.insert("read-only".to_owned(), read_only.into());
        }
        let path = |name: &str| folder.join(name).display().to_string();
        let server = serde_json::json!({
            "addr": { "type": "unix", "path": path(SOCKET) }, "max-connections": MAX_CONNECTIONS,
        });
        let export = serde_json::json!({
            "type": "nbd", "id": "export", "node-name": "disk", "name": Self::NAME, "writable": !read_only,
        });
        // A process group of its own: signals for the agent's do not concern it.
        let child = Command::new(PROGRAM)
            .args(["--blockdev", &node.to_string(), "--nbd-server", &server.to_string()])
            .args(["--export", &export.to_string(), "--pidfile", &path(PID_FILE)])
            .process_group(0)
            .stdin(Stdio::null())
            .stdout(log.try_clone().map_err(io("share the log in"))?)
            .stderr(log)
            .spawn()
            .map_err(|source| DriverError::Start { program: PROGRAM.to_owned(), source })?;
        let mut export = Self { folder: folder.to_owned(), child: Some(child) };
        export.wait_until_ready(cluster.patience)?;
        // It has the image open, and nobody has been connected to it yet.
        if let Err(error) = cluster.check_claim(image, generation) {
            export.end()?;
            return Err(error);
        }
        Ok(export)
    }

    fn wait_until_ready(&mut self, patience: Duration) -> Result<(), DriverError> {
        let end = Instant::now() + patience;
        loop {
            // The pid file is the last thing that it makes before it serves.
            if self.owner()?.is_some() && self.connect().is_ok() {
                return Ok(());
            }
            let ended = match &mut self.child {
                Some(child) => child.try_wait().map_err(DriverError::io("wait for the storage daemon"))?,
                None => None,
            };
            if let Some(status) = ended {
                self.child = None;
                return Err(self.failure(&status.to_string()));
            }
            if Instant::now() >= end {
                let error = self.failure(&format!("not ready after {patience:?}"));
                self.end()?;
                return Err(error);
            }
            std::thread::sleep(TICK);
        }
    }

    fn failure(&self, what: &str) -> DriverError {
        let mut words = Vec::new();
        // Without a log there are no words.
        let _ = File::open(self.folder.join(LOG)).and_then(|mut log| log.read_to_end(&mut words));
        let why = format!("{what}: {}", last_words(&words));
        DriverError::Export { folder: self.folder.display().to_string(), why }
    }

    /// The daemon that serves out of `folder`, started by whomever; `None` when none does.
    pub fn adopt(folder: &Path) -> Result<Option<Self>, DriverError> {
        let export = Self { folder: folder.to_owned(), child: None };
        Ok(export.owner()?.map(|_| export))
    }

    /// Whether the daemon runs.
    pub fn is_running(&self) -> Result<bool, DriverError> {
        Ok(self.owner()?.is_some())
    }

    /// When the daemon was started, by this host's clock; `None` when that cannot be told.
    pub fn started(&self) -> Option<SystemTime> {
        fs::metadata(self.folder.join(PID_FILE)).and_then(|file| file.modified()).ok()
    }

    /// The daemon's process. It holds a lock on its pid file for as long as it lives: a number that was used again is not taken for it.
    pub fn owner(&self) -> Result<Option<Pid>, DriverError> {
        let path = self.folder.join(PID_FILE);
        let failed = || DriverError::io(format!("look at {}", path.display()));
        let file = match File::options().read(true).write(true).open(&path) {
            Ok(file) => file,
            Err(error) if error.kind() == std::io::ErrorKind::NotFound => return Ok(None),
            Err(error) => return Err(failed()(error)),
        };
        let mut lock = libc::flock {
            l_type: libc::F_WRLCK as libc::c_short,
            l_whence: libc::SEEK_SET as libc::c_short,
            l_start: 0,
            l_len: 0,
            l_pid: 0,
        };
        fcntl(&file, FcntlArg::F_GETLK(&mut lock)).map_err(|errno| failed()(errno.into()))?;
        Ok((i32::from(lock.l_type) != libc::F_UNLCK && lock.l_pid > 0).then(|| Pid::from_raw(lock.l_pid)))
    }

    /// A new connection to pass to a VMM.
    pub fn connect(&self) -> Result<OwnedFd, DriverError> {
        let path = self.folder.join(SOCKET);
        let stream = UnixStream::connect(&path).map_err(DriverError::io(format!("connect to {}", path.display())))?;
        Ok(stream.into())
    }

    /// Lets the daemon go on by itself. A process of this one's that ends is not left behind as a zombie.
    pub fn leave(mut self) {
        if let Some(mut child) = self.child.take() {
            // Without a thread it is one, until this process ends.
            let _ = std::thread::Builder::new().name("storage daemon".to_owned()).spawn(move || child.wait());
        }
    }

    /// Ends the daemon: it flushes, if the cluster lets it. Does nothing when none runs.
    pub fn stop(mut self) -> Result<(), DriverError> {
        self.end()
    }

    fn end(&mut self) -> Result<(), DriverError> {
        for (signal, patience) in [(Signal::SIGTERM, END_PATIENCE), (Signal::SIGKILL, END_PATIENCE)] {
            let pid = match &self.child {
                Some(child) => Some(Pid::from_raw(child.id().cast_signed())),
                None => self.owner()?,
            };
            let Some(pid) = pid else { return Ok(()) };
            match kill(pid, signal) {
                Ok(()) | Err(Errno::ESRCH) => {}
                Err(errno) => return Err(DriverError::io(format!("end process {pid}"))(errno.into())),
            }
            if self.wait_for_end(patience)? {
                return Ok(());
            }
        }
        Err(self.failure("it does not end"))
    }

    fn wait_for_end(&mut self, patience: Duration) -> Result<bool, DriverError> {
        if let Some(child) = &mut self.child {
            let ended = wait(child, patience).map_err(DriverError::io("wait for the storage daemon"))?.is_some();
            if ended {
                self.child = None;
            }
            return Ok(ended);
        }
        let end = Instant::now() + patience;
        while self.owner()?.is_some() {
            if Instant::now() >= end {
                return Ok(false);
            }
            std::thread::sleep(TICK);
        }
        Ok(true)
    }
}
