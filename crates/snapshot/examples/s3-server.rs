//! An S3 server over a folder, with faults, latency and bandwidth by option: what tests and measurements run against where no real one
//! is at hand. `cargo run --example s3-server -- --root /tmp/s3 --latency-ms 20 --mbit 1000 --fault-percent 5`
#![allow(clippy::panic)]

#[path = "../tests/support/mod.rs"]
mod support;

use std::fs::File;
use std::io::Write;
use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use clap::Parser;
use support::{ACCESS_KEY, BUCKET, Line, Note, SECRET_KEY, random_faults, serve};

#[derive(Parser)]
struct Options {
    /// Folder of the buckets.
    #[arg(long)]
    root: PathBuf,
    /// Where to listen.
    #[arg(long, default_value = "127.0.0.1:9000")]
    listen: SocketAddr,
    /// Added to every answer.
    #[arg(long, default_value_t = 0)]
    latency_ms: u64,
    /// Bandwidth of all connections together in Mbit/s, 0 = unlimited.
    #[arg(long, default_value_t = 0)]
    mbit: u64,
    /// How many of a hundred requests fail in some way.
    #[arg(long, default_value_t = 0)]
    fault_percent: u64,
    /// Chooses which.
    #[arg(long, default_value_t = 1)]
    seed: u64,
    /// File that gets a line for each answer: method, path, status, bytes of its body.
    #[arg(long)]
    log: Option<PathBuf>,
}

fn note(log: Option<&Path>) -> Note {
    let Some(path) = log else { return Line::default().note };
    let log =
        File::options().create(true).append(true).open(path).unwrap_or_else(|e| panic!("{}: {e}", path.display()));
    Arc::new(move |method, path, status, bytes| {
        let line = format!("{method} {path} {} {bytes}\n", status.as_u16());
        (&log).write_all(line.as_bytes()).unwrap_or_else(|e| panic!("writing the log: {e}"));
    })
}

#[tokio::main]
async fn main() {
    let options = Options::parse();
    let line = Line {
        plan: random_faults(options.seed, options.fault_percent),
        latency: Duration::from_millis(options.latency_ms),
        bits_per_second: options.mbit * 1_000_000,
        note: note(options.log.as_deref()),
    };
    let server = serve(&options.root, options.listen, line, None).await;
    println!("http://{} bucket {BUCKET}, access key {ACCESS_KEY}, secret {SECRET_KEY}", server.address);
    match support::for_ever().await {}
}
