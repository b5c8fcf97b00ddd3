//! One microVM without agent or control plane: `hearth-vmm run`.

use std::fs::File;
use std::os::unix::process::ExitStatusExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, ExitStatus, Stdio};
use std::sync::Arc;
use std::time::{Duration, Instant};

use hearth_agent::boot::{FileDisk, Override, ReadAt, discover};

use crate::console::{Console, PATIENCE};
use crate::program;

/// What to boot: kernel and initrd as files, found in an image as the agent finds them.
pub struct BootFiles {
    /// Kernel file.
    pub kernel: PathBuf,
    /// Initrd file.
    pub initrd: PathBuf,
    /// Command line.
    pub cmdline: String,
}

/// Takes kernel and initrd out of an image and puts them into `folder`; the kernel as the vmlinux inside its bzImage.
pub fn boot_files(image: &Path, folder: &Path) -> BootFiles {
    let files = packed_boot_files(image, folder);
    let packed = std::fs::read(&files.kernel).unwrap();
    std::fs::write(&files.kernel, hearth_agent::boot::extract_vmlinux(&packed).unwrap()).unwrap();
    files
}

/// The same with the kernel as it is in the image, a bzImage.
pub fn packed_boot_files(image: &Path, folder: &Path) -> BootFiles {
    let disk: Arc<dyn ReadAt> = Arc::new(FileDisk::new(File::open(image).unwrap()).unwrap());
    let found = discover(&disk, &Override::default()).unwrap();
    let files = BootFiles { kernel: folder.join("kernel"), initrd: folder.join("initrd"), cmdline: found.cmdline };
    std::fs::write(&files.kernel, &found.kernel).unwrap();
    std::fs::write(&files.initrd, found.initrd.expect("the image has an initrd")).unwrap();
    files
}

/// A sparse copy of an image.
pub fn copy_disk(image: &Path, to: &Path) {
    let status = Command::new("cp").arg("--sparse=always").args([image, to]).status().unwrap();
    assert!(status.success());
}

/// What the threads of a VMM do, and what KVM does within a second: tells a guest that spins from one that sleeps.
pub fn activity(pid: u32) -> String {
    let mut lines = Vec::new();
    for thread in std::fs::read_dir(format!("/proc/{pid}/task")).into_iter().flatten().flatten() {
        let read = |name: &str| std::fs::read_to_string(thread.path().join(name)).unwrap_or_default();
        let stat = read("stat");
        let times: Vec<_> = stat.rsplit(") ").next().unwrap_or_default().split(' ').collect();
        lines.push(format!(
            "{}: state {} ticks {}+{} in {}",
            read("comm").trim(),
            times.first().unwrap_or(&"?"),
            times.get(11).unwrap_or(&"?"),
            times.get(12).unwrap_or(&"?"),
            read("wchan"),
        ));
    }
    let counters = || -> Vec<(String, u64)> {
        let files = std::fs::read_dir("/sys/kernel/debug/kvm").into_iter().flatten().flatten();
        let mut counters: Vec<_> = files
            .filter_map(|f| {
                let count = std::fs::read_to_string(f.path()).ok()?.trim().parse().ok()?;
                Some((f.file_name().to_string_lossy().into_owned(), count))
            })
            .collect();
        counters.sort();
        counters
    };
    let before = counters();
    std::thread::sleep(Duration::from_secs(1));
    for ((name, then), (_, now)) in before.iter().zip(counters()) {
        if now != *then {
            lines.push(format!("kvm {name}: {} in a second", now.wrapping_sub(*then)));
        }
    }
    lines.join("\n")
}

/// A running `hearth-vmm run`.
pub struct Machine {
    child: Child,
    /// COM1.
    pub console: Console,
}

impl Drop for Machine {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

impl Machine {
    /// Starts it with these options; the console is on pipes.
    pub fn start(boot: &BootFiles, options: &[&str]) -> Self {
        let mut child = Command::new(program("hearth-vmm"))
            .arg("run")
            .arg("--kernel")
            .arg(&boot.kernel)
            .arg("--initrd")
            .arg(&boot.initrd)
            .args(["--cmdline", &boot.cmdline])
            .args(options)
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .stderr(Stdio::inherit())
            .spawn()
            .unwrap();
        let mut console = Console::new(child.stdin.take().unwrap(), child.stdout.take().unwrap());
        let pid = child.id();
        console.on_silence(move || activity(pid));
        Self { child, console }
    }

    /// The VMM's process id.
    pub fn pid(&self) -> i32 {
        self.child.id() as i32
    }

    /// Waits for the end of the process.
    pub fn exit(&mut self) -> ExitStatus {
        let end = Instant::now() + PATIENCE;
        loop {
            if let Some(status) = self.child.try_wait().unwrap() {
                return status;
            }
            assert!(Instant::now() < end, "the VMM does not end; console:\n{}", self.console.seen());
            std::thread::sleep(Duration::from_millis(20));
        }
    }

    /// Waits for the end; the exit code, which must be there (no signal).
    pub fn exit_code(&mut self) -> i32 {
        let status = self.exit();
        status.code().unwrap_or_else(|| panic!("the VMM died by signal {:?}", status.signal()))
    }
}
