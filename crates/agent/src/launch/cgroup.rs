//! One cgroup (v2) per instance. Source: the kernel's Documentation/admin-guide/cgroup-v2.rst.

use std::fs;
use std::io;
use std::path::{Path, PathBuf};
use std::time::Duration;

use hearth_types::InstanceId;
use thiserror::Error;

/// Controllers that limits need.
const CONTROLLERS: [&str; 3] = ["cpu", "memory", "pids"];
/// Period of cpu.max in microseconds.
const PERIOD_US: u64 = 100_000;
/// Memory a VMM may use beyond the guest's own: its tables and the page cache of its disks.
const HEADROOM_MIB: u64 = 128;
/// Threads of a VMM beyond its vCPUs.
const EXTRA_THREADS: u64 = 32;

/// What an instance may use.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Limits {
    /// Virtual CPUs: the weight among instances when CPU time is short.
    pub vcpus: u32,
    /// CPU time in microseconds of each 100 ms, over all threads; `None` = not limited.
    pub cpu_quota_us: Option<u64>,
    /// Guest memory in MiB.
    pub memory_mib: u64,
}

/// Why cgroups cannot be used.
#[derive(Debug, Error)]
pub enum CgroupError {
    /// Not mounted, or cgroup v1.
    #[error(
        "{} is not a cgroup v2 file system; mount it with `mount -t cgroup2 none {}`, or boot with \
         systemd.unified_cgroup_hierarchy=1",
        .0.display(), .0.display()
    )]
    NotCgroup2(PathBuf),
    /// Some controllers cannot be had.
    #[error(
        "cgroup controllers {missing} are not available in {}; hearth needs cpu, memory and pids there (in a container, \
         delegate them; on an old kernel, boot without cgroup_disable=)", path.display()
    )]
    MissingControllers {
        /// Names.
        missing: String,
        /// In which cgroup.
        path: PathBuf,
    },
    /// A file of the hierarchy.
    #[error("{action} {}: {source}", path.display())]
    Io {
        /// What was tried.
        action: &'static str,
        /// Which file.
        path: PathBuf,
        /// What the system said.
        source: io::Error,
    },
}

fn io_error(action: &'static str, path: &Path) -> impl FnOnce(io::Error) -> CgroupError {
    let path = path.to_owned();
    move |source| CgroupError::Io { action, path, source }
}

fn write(path: &Path, value: &str) -> Result<(), CgroupError> {
    fs::write(path, value).map_err(io_error("writing", path))
}

/// The cgroups of one agent's instances, all below one folder.
#[derive(Clone, Debug)]
pub struct Cgroups {
    root: PathBuf,
}

impl Cgroups {
    /// Makes `parent` below the mount point and enables the controllers on the way.
    pub fn open(mount: &Path, parent: &Path) -> Result<Self, CgroupError> {
        let magic = nix::sys::statfs::statfs(mount).map(|info| info.filesystem_type());
        if magic != Ok(nix::sys::statfs::CGROUP2_SUPER_MAGIC) {
            return Err(CgroupError::NotCgroup2(mount.to_owned()));
        }
        let mut folder = mount.to_owned();
        enable_controllers(&folder)?;
        for part in parent.components().filter(|part| matches!(part, std::path::Component::Normal(_))) {
            folder.push(part);
            match fs::create_dir(&folder) {
                Err(error) if error.kind() != io::ErrorKind::AlreadyExists => {
                    return Err(io_error("creating", &folder)(error));
                }
                _ => enable_controllers(&folder)?,
            }
        }
        Ok(Self { root: folder })
    }

    fn path(&self, id: &InstanceId) -> PathBuf {
        self.root.join(id.as_str())
    }

    /// Makes (or finds) an instance's cgroup with these limits; its folder, opened.
    pub fn create(&self, id: &InstanceId, limits: &Limits) -> Result<fs::File, CgroupError> {
        let folder = self.path(id);
        match fs::create_dir(&folder) {
            Err(error) if error.kind() != io::ErrorKind::AlreadyExists => {
                return Err(io_error("creating", &folder)(error));
            }
            _ => {}
        }
        let weight = (100 * u64::from(limits.vcpus)).clamp(1, 10_000);
        write(&folder.join("cpu.weight"), &weight.to_string())?;
        let quota = limits.cpu_quota_us.map_or_else(|| "max".to_owned(), |quota| quota.max(1000).to_string());
        write(&folder.join("cpu.max"), &format!("{quota} {PERIOD_US}"))?;
        let memory = limits.memory_mib.saturating_add(HEADROOM_MIB).saturating_add(limits.memory_mib / 64);
        write(&folder.join("memory.max"), &memory.saturating_mul(1 << 20).to_string())?;
        // A VMM without some of its threads is of no use.
        write(&folder.join("memory.oom.group"), "1")?;
        write(&folder.join("pids.max"), &(u64::from(limits.vcpus) + EXTRA_THREADS).to_string())?;
        fs::File::open(&folder).map_err(io_error("opening", &folder))
    }

    /// Processes in an instance's cgroup. Threads that KVM runs in the kernel on the VMM's behalf are listed there too; they are
    /// left out.
    pub fn processes(&self, id: &InstanceId) -> Result<Vec<i32>, CgroupError> {
        let path = self.path(id).join("cgroup.procs");
        match fs::read_to_string(&path) {
            Ok(text) => {
                let pids = text.lines().filter_map(|line| line.trim().parse().ok());
                Ok(pids.filter(|pid| !is_kernel_thread(*pid)).collect())
            }
            Err(error) if matches!(error.raw_os_error(), Some(libc::ENOENT | libc::ENODEV)) => Ok(Vec::new()),
            Err(error) => Err(io_error("reading", &path)(error)),
        }
    }

    /// Whether a process is in an instance's cgroup now.
    pub fn holds(&self, id: &InstanceId, pid: i32) -> Result<bool, CgroupError> {
        Ok(self.processes(id)?.contains(&pid))
    }

    /// Kills whatever runs in an instance's cgroup and removes it.
    pub async fn remove(&self, id: &InstanceId) -> Result<(), CgroupError> {
        let folder = self.path(id);
        for attempt in 0..200u64 {
            match fs::remove_dir(&folder) {
                Ok(()) => return Ok(()),
                Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(()),
                Err(error) if attempt == 199 => return Err(io_error("removing", &folder)(error)),
                Err(_) => {
                    // Gone in between is as good.
                    let _ = fs::write(folder.join("cgroup.kill"), "1");
                    tokio::time::sleep(Duration::from_millis(attempt.clamp(1, 50))).await;
                }
            }
        }
        Ok(())
    }

    /// Instances that have a cgroup here.
    pub fn instances(&self) -> Result<Vec<InstanceId>, CgroupError> {
        let entries = fs::read_dir(&self.root).map_err(io_error("reading", &self.root))?;
        Ok(entries.flatten().filter_map(|entry| entry.file_name().to_str()?.parse().ok()).collect())
    }
}

/// PF_KTHREAD in the flags of /proc/PID/stat (proc(5); the name before them may hold anything, also blanks).
fn is_kernel_thread(pid: i32) -> bool {
    const PF_KTHREAD: u32 = 0x0020_0000;
    let stat = fs::read_to_string(format!("/proc/{pid}/stat")).unwrap_or_default();
    let flags = stat.rsplit_once(')').and_then(|(_, rest)| rest.split_whitespace().nth(6)?.parse::<u32>().ok());
    flags.is_some_and(|flags| flags & PF_KTHREAD != 0)
}

fn enable_controllers(folder: &Path) -> Result<(), CgroupError> {
    let read = |name: &str| {
        let path = folder.join(name);
        fs::read_to_string(&path).map_err(io_error("reading", &path))
    };
    let has = |list: &str, name: &str| list.split_whitespace().any(|word| word == name);
    let enabled = read("cgroup.subtree_control")?;
    let wanted: Vec<&str> = CONTROLLERS.into_iter().filter(|name| !has(&enabled, name)).collect();
    if wanted.is_empty() {
        return Ok(());
    }
    let available = read("cgroup.controllers")?;
    let missing: Vec<&str> = wanted.iter().copied().filter(|name| !has(&available, name)).collect();
    if !missing.is_empty() {
        return Err(CgroupError::MissingControllers { missing: missing.join(", "), path: folder.to_owned() });
    }
    let request = wanted.iter().map(|name| format!("+{name}")).collect::<Vec<_>>().join(" ");
    write(&folder.join("cgroup.subtree_control"), &request)
}
