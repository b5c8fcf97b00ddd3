//! An S3 service in the test's network namespace, which can be stopped, ended and started again.

use std::net::TcpStream;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};

use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;

use crate::cloud::{Settings, kill_now, wait_until};
use crate::console::PATIENCE;
use crate::example;

const ADDRESS: &str = "127.0.0.1:9000";

/// The example `s3-server` of hearth-snapshot over a folder.
pub struct S3Server {
    folder: PathBuf,
    options: Vec<String>,
    child: Option<Child>,
}

impl S3Server {
    /// Starts it over a folder, with options of that program.
    pub fn start(folder: &Path, options: &[&str]) -> Self {
        let options = options.iter().map(|option| (*option).to_owned()).collect();
        let mut server = Self { folder: folder.join("buckets"), options, child: None };
        server.restart();
        server
    }

    /// Starts it again, with everything in it.
    pub fn restart(&mut self) {
        let mut command = Command::new(example("s3-server"));
        command.arg("--root").arg(&self.folder).args(["--listen", ADDRESS]).args(&self.options);
        self.child = Some(command.stdin(Stdio::null()).stdout(Stdio::null()).spawn().unwrap());
        assert!(wait_until(PATIENCE, || TcpStream::connect(ADDRESS).is_ok()), "the S3 server does not listen");
    }

    /// Starts it again with other options.
    pub fn restart_with(&mut self, options: &[&str]) {
        self.options = options.iter().map(|option| (*option).to_owned()).collect();
        self.restart();
    }

    /// `kill -9`.
    pub fn kill(&mut self) {
        kill_now(&mut self.child.take().expect("the S3 server runs"));
    }

    fn signal(&self, signal: Signal) {
        let child = self.child.as_ref().expect("the S3 server runs");
        kill(Pid::from_raw(child.id() as i32), signal).unwrap();
    }

    /// Stops it in mid-air: connections stay open, nothing is answered.
    pub fn stop(&self) {
        self.signal(Signal::SIGSTOP);
    }

    /// After [`stop`](Self::stop).
    pub fn go_on(&self) {
        self.signal(Signal::SIGCONT);
    }

    /// What a control plane needs to have its objects here.
    pub fn settings() -> Settings {
        let control = ["--object-store", "s3://cloud/hearth"].map(str::to_owned).into();
        let variables = [
            ("AWS_ENDPOINT_URL", format!("http://{ADDRESS}")),
            ("AWS_ALLOW_HTTP", "true".to_owned()),
            ("AWS_ACCESS_KEY_ID", "hearth".to_owned()),
            ("AWS_SECRET_ACCESS_KEY", "not-so-secret".to_owned()),
        ];
        Settings { control, variables: variables.into(), ..Settings::default() }
    }
}

impl Drop for S3Server {
    fn drop(&mut self) {
        if let Some(child) = &mut self.child {
            kill_now(child);
        }
    }
}
