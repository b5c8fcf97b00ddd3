//! The built daemon as a control plane: what it logs and how it ends.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::indexing_slicing, clippy::panic, missing_docs)]

use std::io::{BufRead, BufReader, Read};
use std::path::Path;
use std::process::{Child, ChildStderr, Command, Stdio};

use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;

fn hearthd(args: &[&str]) -> Command {
    let mut command = Command::new(env!("CARGO_BIN_EXE_hearthd"));
    command.args(args).env_clear().env("HEARTHD_CONFIG", "/dev/null").stdin(Stdio::null());
    command
}

/// A control plane that runs; killed when it is dropped.
struct Running {
    child: Child,
    log: BufReader<ChildStderr>,
    said: String,
}

impl Running {
    fn start(state: &Path) -> Self {
        let state = state.to_str().unwrap();
        let mut child = hearthd(&["control", "--state-dir", state, "--listen", "127.0.0.1:0"])
            .stderr(Stdio::piped())
            .spawn()
            .unwrap();
        let log = BufReader::new(child.stderr.take().unwrap());
        let mut running = Self { child, log, said: String::new() };
        running.read_until("the control plane is up");
        running
    }

    fn read_until(&mut self, wanted: &str) {
        while !self.said.contains(wanted) {
            let more = self.log.read_line(&mut self.said).unwrap();
            assert!(more > 0, "it ended without '{wanted}':\n{}", self.said);
        }
    }

    /// Ends it with a signal; its exit status and everything it logged.
    fn end(mut self, signal: Signal) -> (Option<i32>, String) {
        kill(Pid::from_raw(self.child.id().try_into().unwrap()), signal).unwrap();
        self.log.read_to_string(&mut self.said).unwrap();
        let status = self.child.wait().unwrap();
        (status.code(), std::mem::take(&mut self.said))
    }
}

impl Drop for Running {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

#[test]
fn a_stop_by_signal_is_clean_and_says_so() {
    let state = tempfile::tempdir().unwrap();
    for signal in [Signal::SIGTERM, Signal::SIGINT] {
        let (code, log) = Running::start(state.path()).end(signal);
        assert_eq!(code, Some(0), "{log}");
        assert!(log.contains(&format!("{signal}: ending")) && log.contains("ended cleanly"), "{log}");
        assert!(log.contains("the control plane has ended as asked"), "{log}");
        assert!(!log.contains("ERROR") && !log.contains("WARN"), "{log}");
    }
}
