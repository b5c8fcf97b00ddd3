//! Talking to a guest's shell on its serial console.

use std::io::{Read, Write};
use std::sync::mpsc::{Receiver, RecvTimeoutError, channel};
use std::time::{Duration, Instant};

/// How long a guest may take for anything, on an emulated CPU beside other guests.
pub const PATIENCE: Duration = Duration::from_secs(150);

/// A console, whatever carries its bytes.
pub struct Console {
    input: Box<dyn Write + Send>,
    output: Receiver<Vec<u8>>,
    seen: String,
    /// Everything before this has been looked at by `wait_for`.
    read_to: usize,
    /// Tells this console's commands from those of an earlier one, whose output may come again as backlog.
    salt: u32,
    commands: u32,
    /// What the other side is doing, for the message when it does not answer.
    diagnosis: Box<dyn Fn() -> String + Send>,
}

impl Console {
    /// Reads `output` on a thread of its own until it ends.
    pub fn new(input: impl Write + Send + 'static, mut output: impl Read + Send + 'static) -> Self {
        let (sender, receiver) = channel();
        std::thread::spawn(move || {
            let mut buffer = [0u8; 4096];
            while let Ok(length) = output.read(&mut buffer) {
                if length == 0 || sender.send(buffer[..length].to_vec()).is_err() {
                    break;
                }
            }
        });
        let salt = std::time::UNIX_EPOCH.elapsed().unwrap().subsec_micros();
        Self {
            input: Box::new(input),
            output: receiver,
            seen: String::new(),
            read_to: 0,
            salt,
            commands: 0,
            diagnosis: Box::new(String::new),
        }
    }

    /// What to tell, beside the console's output, when the guest does not answer in time.
    pub fn on_silence(&mut self, diagnosis: impl Fn() -> String + Send + 'static) {
        self.diagnosis = Box::new(diagnosis);
    }

    /// Everything so far.
    pub fn seen(&self) -> &str {
        &self.seen
    }

    /// Waits for a text after what earlier calls waited for, and returns what came up to its end.
    pub fn wait_for(&mut self, text: &str) -> String {
        self.wait_for_within(text, PATIENCE)
    }

    /// The same with a patience of one's own.
    pub fn wait_for_within(&mut self, text: &str, patience: Duration) -> String {
        match self.try_wait_for(text, patience) {
            Ok(found) => found,
            Err(RecvTimeoutError::Timeout) => {
                panic!("no {text:?} within {patience:?}; console:\n{}\n{}", self.seen, (self.diagnosis)())
            }
            Err(RecvTimeoutError::Disconnected) => panic!("the console ended before {text:?}:\n{}", self.seen),
        }
    }

    fn try_wait_for(&mut self, text: &str, patience: Duration) -> Result<String, RecvTimeoutError> {
        let end = Instant::now() + patience;
        loop {
            if let Some(at) = self.seen[self.read_to..].find(text) {
                let from = self.read_to;
                self.read_to = from + at + text.len();
                return Ok(self.seen[from..self.read_to].to_owned());
            }
            let bytes = self.output.recv_timeout(end.saturating_duration_since(Instant::now()))?;
            self.seen += &String::from_utf8_lossy(&bytes);
        }
    }

    /// Waits until the guest's shell answers. What is typed before it runs is lost, so it is asked again and again.
    pub fn wait_for_shell(&mut self) {
        let end = Instant::now() + PATIENCE;
        loop {
            self.commands += 1;
            let number = format!("{}-{}", self.salt, self.commands);
            self.send(&format!("echo \"<\"{number}:shell"));
            match self.try_wait_for(&format!("\n<{number}:shell"), Duration::from_secs(4)) {
                Ok(_) => return,
                Err(RecvTimeoutError::Timeout) if Instant::now() < end => {}
                Err(_) => panic!("no shell answers; console:\n{}\n{}", self.seen, (self.diagnosis)()),
            }
        }
    }

    /// Waits until the console ends and returns all of it.
    pub fn to_end(&mut self) -> &str {
        let end = Instant::now() + PATIENCE;
        loop {
            match self.output.recv_timeout(end.saturating_duration_since(Instant::now())) {
                Ok(bytes) => self.seen += &String::from_utf8_lossy(&bytes),
                Err(RecvTimeoutError::Disconnected) => return &self.seen,
                Err(RecvTimeoutError::Timeout) => panic!("the console does not end:\n{}", self.seen),
            }
        }
    }

    /// Types a line.
    pub fn send(&mut self, line: &str) {
        self.input.write_all(format!("{line}\n").as_bytes()).and_then(|()| self.input.flush()).unwrap();
    }

    /// Runs a shell command in the guest; its output, and its exit code must be 0.
    pub fn run(&mut self, command: &str) -> String {
        let (output, code) = self.try_run(command);
        assert_eq!(code, 0, "{command}: {output}");
        output
    }

    /// Runs a shell command in the guest; its output and exit code. What the guest's own programs report meanwhile is left out.
    pub fn try_run(&mut self, command: &str) -> (String, i32) {
        self.commands += 1;
        // The marker is typed in two pieces, so that the echo of the command does not look like it.
        let number = format!("{}-{}", self.salt, self.commands);
        let (begin, end) = (format!("<{number}:"), format!(":{number}>"));
        self.send(&format!("echo \"<\"{number}:; {command}; echo \":\"$?:{number}\">\""));
        self.wait_for(&format!("\n{begin}"));
        let output = self.wait_for(&end);
        let output = output.strip_suffix(&end).unwrap();
        let (output, code) = output.rsplit_once(':').unwrap();
        let output = output.replace('\r', "");
        let lines: Vec<&str> = output.lines().filter(|line| !line.starts_with("HEARTH-GUEST ")).collect();
        (lines.join("\n").trim_matches('\n').to_owned(), code.trim().parse().unwrap())
    }
}
