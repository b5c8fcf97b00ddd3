//! Running a piece of a test in a process of its own, to be killed.

// Each test binary uses its part.
#![allow(dead_code)]

use std::io::{BufRead, BufReader};
use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::sync::mpsc::{Receiver, channel};

/// Tells the test binary that it is the child, and on which store.
const STORE: &str = "HEARTH_STORE_TEST_CHILD";
/// Marks the child's own lines among those of the test harness.
const MARK: &str = "> ";

/// The store's path, when this process is the child.
pub fn child_store() -> Option<String> {
    std::env::var(STORE).ok()
}

/// Reports something to the parent. The line is out when this returns.
pub fn report(line: &str) {
    println!("\n{MARK}{line}");
}

/// A child process and what it reports.
pub struct Process {
    child: Child,
    lines: Receiver<String>,
}

impl Process {
    /// Runs the test called `test` of this binary as a child on `store`.
    pub fn start(test: &str, store: &Path) -> Self {
        Self::run(Command::new(std::env::current_exe().unwrap()), test, store)
    }

    /// The same, with the store on a file system of its own of `bytes`, mounted at `mount` for the
    /// child alone. Needs `unshare` and user namespaces.
    pub fn start_on_small_disk(test: &str, mount: &Path, bytes: u64) -> Self {
        let script = format!("mount -t tmpfs -o size={bytes} none \"$0\" && exec \"$@\"");
        let mut command = Command::new("unshare");
        command.args(["--user", "--map-root-user", "--mount", "sh", "-c", &script]).arg(mount);
        command.arg(std::env::current_exe().unwrap());
        Self::run(command, test, &mount.join("store.db"))
    }

    fn run(mut command: Command, test: &str, store: &Path) -> Self {
        let mut child = command
            .args(["--exact", test, "--nocapture", "--test-threads=1"])
            .env(STORE, store)
            .stdin(Stdio::null())
            .stdout(Stdio::piped())
            .spawn()
            .unwrap();
        let stdout = BufReader::new(child.stdout.take().unwrap());
        let (sender, lines) = channel();
        std::thread::spawn(move || {
            // A line that was cut by the kill has no newline: it is not an acknowledgement.
            let mut stdout = stdout;
            let mut line = String::new();
            while stdout.read_line(&mut line).is_ok_and(|read| read > 0) {
                if let Some(report) = line.strip_suffix('\n').and_then(|line| line.strip_prefix(MARK))
                    && sender.send(report.to_owned()).is_err()
                {
                    return;
                }
                line.clear();
            }
        });
        Self { child, lines }
    }

    /// Process id.
    pub fn id(&self) -> u32 {
        self.child.id()
    }

    /// The next report; `None` when the child has ended.
    pub fn next(&self) -> Option<String> {
        self.lines.recv().ok()
    }

    /// `kill -9`, then everything reported until then.
    pub fn kill(mut self) -> Vec<String> {
        self.child.kill().unwrap();
        self.child.wait().unwrap();
        self.lines.iter().collect()
    }

    /// Waits for the child to end well, then everything it reported.
    pub fn finish(mut self) -> Vec<String> {
        let reports = self.lines.iter().collect();
        let status = self.child.wait().unwrap();
        assert!(status.success(), "{status}: {reports:?}");
        reports
    }
}
