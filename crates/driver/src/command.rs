//! Programs that are run for their answer.

use std::io::{self, Read};
use std::process::{Child, Command, ExitStatus, Stdio};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use crate::DriverError;

/// Most of a program's output that is kept, in bytes.
const MAX_OUTPUT: u64 = 64 << 20;
/// Most of a program's words that an error repeats, in bytes.
const MAX_WORDS: usize = 1000;
const SHORTEST_WAIT: Duration = Duration::from_millis(2);
const LONGEST_WAIT: Duration = Duration::from_millis(50);

/// Runs a program and returns its standard output.
///
/// # Errors
/// It cannot be started, fails, or has not ended after `patience`; then it is killed.
pub(crate) fn run(program: &str, arguments: &[String], patience: Duration) -> Result<Vec<u8>, DriverError> {
    let started = Command::new(program)
        .args(arguments)
        .stdin(Stdio::null())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn();
    let mut child = started.map_err(|source| DriverError::Start { program: program.to_owned(), source })?;
    let output = read_all(child.stdout.take());
    let words = read_all(child.stderr.take());
    let waited = wait(&mut child, patience);
    if !matches!(waited, Ok(Some(_))) {
        // It has not ended: this ends it, and with it the threads that read.
        let _ = child.kill();
        let _ = child.wait();
    }
    let (output, words) = (join(output), join(words));
    let command = || format!("{program} {}", arguments.join(" "));
    let status = match waited.map_err(DriverError::io(format!("wait for {program}")))? {
        Some(status) => status,
        None => return Err(DriverError::TimedOut { command: command(), patience }),
    };
    if status.success() {
        return output.map_err(|error| DriverError::Output { command: command(), why: error.to_string() });
    }
    Err(failure(command(), status, &words.unwrap_or_default()))
}

/// `rbd` and `ceph` exit with an errno where they have one; `rados` exits with 1 and writes the errno as in "(2) No such file".
fn failure(command: String, status: ExitStatus, words: &[u8]) -> DriverError {
    let text = last_words(words);
    let code = match status.code() {
        Some(1) => written_errno(&text).or(Some(1)),
        code => code,
    };
    match code {
        Some(nix::libc::ENOENT | nix::libc::ENODATA) => DriverError::NotFound { command, text },
        Some(nix::libc::EEXIST) => DriverError::Exists { command, text },
        Some(nix::libc::EBUSY | nix::libc::ENOTEMPTY) => DriverError::InUse { command, text },
        _ => DriverError::Failed { command, status: status.to_string(), text },
    }
}

fn written_errno(text: &str) -> Option<i32> {
    let (_, behind) = text.rsplit_once('(')?;
    behind.split_once(") ")?.0.parse().ok()
}

/// The end of what a program said, on one line.
pub(crate) fn last_words(words: &[u8]) -> String {
    let from = words.len().saturating_sub(MAX_WORDS);
    let text = String::from_utf8_lossy(words.get(from..).unwrap_or_default()).into_owned();
    text.lines().map(str::trim).filter(|line| !line.is_empty()).collect::<Vec<_>>().join("; ")
}

fn read_all(pipe: Option<impl Read + Send + 'static>) -> JoinHandle<io::Result<Vec<u8>>> {
    std::thread::spawn(move || {
        let mut bytes = Vec::new();
        if let Some(pipe) = pipe {
            pipe.take(MAX_OUTPUT).read_to_end(&mut bytes)?;
        }
        Ok(bytes)
    })
}

fn join(reader: JoinHandle<io::Result<Vec<u8>>>) -> io::Result<Vec<u8>> {
    reader.join().unwrap_or_else(|_| Err(io::Error::other("the thread that read it panicked")))
}

/// Waits for the end of a process; `None` when it has not come after `patience`.
pub(crate) fn wait(child: &mut Child, patience: Duration) -> io::Result<Option<ExitStatus>> {
    let end = Instant::now() + patience;
    let mut pause = SHORTEST_WAIT;
    loop {
        let status = child.try_wait()?;
        if status.is_some() || Instant::now() >= end {
            return Ok(status);
        }
        std::thread::sleep(pause);
        pause = (pause * 2).min(LONGEST_WAIT);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn shell(script: &str, patience: Duration) -> Result<Vec<u8>, DriverError> {
        run("sh", &["-c".to_owned(), script.to_owned()], patience)
    }

    #[test]
    fn answers_and_failures_are_told_apart() {
        let patience = Duration::from_secs(60);
        assert_eq!(shell("echo answer; echo noise >&2", patience).unwrap(), b"answer\n");
        assert!(matches!(shell("exit 2", patience), Err(DriverError::NotFound { .. })));
        assert!(matches!(shell("exit 17", patience), Err(DriverError::Exists { .. })));
        assert!(matches!(shell("exit 16", patience), Err(DriverError::InUse { .. })));
        assert!(matches!(shell("exit 39", patience), Err(DriverError::InUse { .. })));
        let rados = "echo 'error getting xattr pool/a/b: (2) No such file or directory' >&2; exit 1";
        assert!(matches!(shell(rados, patience), Err(DriverError::NotFound { .. })));
        let error = shell("printf 'one\\n\\n two\\n' >&2; exit 1", patience).unwrap_err().to_string();
        assert!(error.ends_with("one; two") && error.starts_with("sh -c"), "{error}");
        let error = run("hearth-no-such-program", &[], patience).unwrap_err();
        assert!(matches!(error, DriverError::Start { .. }), "{error}");
    }

    #[test]
    fn more_output_than_a_pipe_holds_is_read() {
        assert_eq!(shell("yes | head -c 3000000", Duration::from_secs(60)).unwrap().len(), 3_000_000);
    }

    #[test]
    fn a_program_that_hangs_is_ended() {
        let error = shell("echo working >&2; exec sleep 1000", Duration::from_millis(200)).unwrap_err();
        assert!(matches!(error, DriverError::TimedOut { .. }), "{error}");
    }
}
