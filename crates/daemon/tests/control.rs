//! The built daemon as a control plane: what it logs and how it ends.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::indexing_slicing, clippy::panic, missing_docs)]

use std::io::{BufRead, BufReader, Read};
use std::path::Path;
use std::process::{Child, ChildStderr, Command, Output, Stdio};

use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;

fn hearthd(args: &[&str]) -> Command {
    let mut command = Command::new(env!("CARGO_BIN_EXE_hearthd"));
    command.args(args).env_clear().env("HEARTHD_CONFIG", "/dev/null").stdin(Stdio::null());
    command
}

fn run(args: &[&str]) -> (Option<i32>, String) {
    let Output { status, stdout, stderr } = hearthd(args).output().unwrap();
    (status.code(), format!("{}{}", String::from_utf8_lossy(&stdout), String::from_utf8_lossy(&stderr)))
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

    /// The term in which it leads, and the cluster that it made (if it made one).
    fn term(&self) -> u64 {
        let after = self.said.split_once("leads term=").unwrap().1;
        after.split_whitespace().next().unwrap().parse().unwrap()
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

#[test]
fn a_backup_is_made_while_it_runs_and_restored_while_it_does_not() {
    let state = tempfile::tempdir().unwrap();
    let other = tempfile::tempdir().unwrap();
    let (dir, file) = (state.path().to_str().unwrap(), other.path().join("copy.db"));
    let file = file.to_str().unwrap();
    let backup = || run(&["backup", "--state-dir", dir, file]);
    let (code, said) = backup();
    assert_eq!(code, Some(1), "{said}");
    assert!(said.contains("there is no such file"), "{said}");
    assert!(!Path::new(file).exists());

    let control = Running::start(state.path());
    let first = control.term();
    let (code, said) = backup();
    assert_eq!(code, Some(0), "{said}");
    assert!(said.contains("as of revision"), "{said}");
    let (code, said) = backup();
    assert!(code == Some(1) && said.contains("exists already"), "a backup is never overwritten: {said}");
    for force in [&[][..], &["--force"]] {
        let (code, said) = run(&[&["restore", "--state-dir", dir, file], force].concat());
        assert_eq!(code, Some(1), "{said}");
        assert!(said.contains(if force.is_empty() { "--force" } else { "stop the control plane" }), "{said}");
    }
    let (_, log) = control.end(Signal::SIGKILL);
    assert!(!log.contains("ERROR"), "a backup does not disturb: {log}");

    let (code, said) = run(&["restore", "--state-dir", dir, file]);
    assert!(code == Some(1) && said.contains("there is a store already") && said.contains("--force"), "{said}");
    let garbage = other.path().join("garbage");
    std::fs::write(&garbage, vec![7; 100_000]).unwrap();
    let before = std::fs::read(state.path().join("control/hearth.db")).unwrap();
    let (code, said) = run(&["restore", "--force", "--state-dir", dir, garbage.to_str().unwrap()]);
    assert_eq!(code, Some(1), "{said}");
    assert_eq!(std::fs::read(state.path().join("control/hearth.db")).unwrap(), before);

    let (code, said) = run(&["restore", "--force", "--state-dir", dir, file]);
    assert_eq!(code, Some(0), "{said}");
    assert!(said.contains("kept as") && said.contains("hearth.db.replaced-1"), "{said}");
    assert!(state.path().join("control/hearth.db.replaced-1").exists());
    let control = Running::start(state.path());
    assert!(control.term() > first + 1_000_000, "agents that have seen the lost store obey this one");
    assert!(!control.said.contains("made a new cluster"), "{}", control.said);
    control.end(Signal::SIGTERM);

    // On a new machine.
    let fresh = other.path().join("fresh");
    let fresh = fresh.to_str().unwrap();
    let (code, said) = run(&["restore", "--state-dir", fresh, file]);
    assert_eq!(code, Some(0), "{said}");
    let control = Running::start(Path::new(fresh));
    assert!(!control.said.contains("made a new cluster"), "{}", control.said);
    control.end(Signal::SIGTERM);
}
