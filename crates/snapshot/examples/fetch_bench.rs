//! What it takes to fetch chunks from an object store that is 20 ms and 1 Gbit/s away, without a guest that boots beside it. Tells how
//! long that took, and how much of this process's CPU time.
//!
//! `fetch_bench S3-SERVER IMAGE CHUNKS PARALLEL`: CHUNKS of the file IMAGE that are not zeros, PARALLEL at a time; S3-SERVER is the
//! example `s3-server`.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::indexing_slicing, clippy::panic)]

use std::fs::File;
use std::io::Read;
use std::net::TcpStream;
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use futures::{StreamExt, TryStreamExt};
use hearth_snapshot::{
    CHUNK_BYTES, ChunkRef, ChunkStore, Epoch, KeyDomain, KeyDomainId, S3Options, StoreOptions, open_store,
};

const ADDRESS: &str = "127.0.0.1:9001";

struct Server(Child);

impl Drop for Server {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

/// CPU time of this process, user's and kernel's, in ms.
fn cpu_ms() -> f64 {
    const TICK_MS: f64 = 10.0;
    let stat = std::fs::read_to_string("/proc/self/stat").unwrap();
    let fields: Vec<&str> = stat.rsplit_once(')').unwrap().1.split_whitespace().collect();
    [11, 12].map(|at| fields[at].parse::<f64>().unwrap() * TICK_MS).iter().sum()
}

#[tokio::main]
async fn main() -> Result<(), Box<dyn std::error::Error>> {
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    let (wanted, parallel): (usize, usize) = (arguments[2].parse().unwrap(), arguments[3].parse().unwrap());
    let folder = tempfile::tempdir().unwrap();
    let mut server = Command::new(&arguments[0]);
    server.args(["--latency-ms", "20", "--mbit", "1000", "--listen", ADDRESS, "--root"]).arg(folder.path());
    let _server = Server(server.stdout(Stdio::null()).spawn().unwrap_or_else(|e| panic!("{server:?}: {e}")));
    let began = Instant::now();
    while TcpStream::connect(ADDRESS).is_err() {
        assert!(began.elapsed() < Duration::from_secs(60), "the object store does not start");
        std::thread::sleep(Duration::from_millis(20));
    }
    let s3 = S3Options {
        endpoint: Some(format!("http://{ADDRESS}")),
        access_key_id: Some("hearth".into()),
        secret_access_key: Some("not-so-secret".into()),
        allow_http: true,
        ..S3Options::default()
    };
    // No panic from here on: in a release build that would leave the server running.
    let objects = open_store("s3://cloud", &StoreOptions { s3, ..StoreOptions::default() })?;
    let domain = KeyDomain::new(KeyDomainId::new("bench")?, &[7; 32]);
    let store = ChunkStore::new(objects, domain);
    let mut image = File::open(&arguments[1])?;
    let mut chunks: Vec<ChunkRef> = Vec::new();
    let mut content = vec![0; CHUNK_BYTES];
    while chunks.len() < wanted && image.read_exact(&mut content).is_ok() {
        chunks.extend(store.put_chunk(Epoch(0), content.clone().into()).await?);
    }
    let (began, cpu) = (Instant::now(), cpu_ms());
    let fetches = futures::stream::iter(&chunks).map(|chunk| store.get_chunk(chunk));
    let bytes = fetches.buffer_unordered(parallel).try_fold(0, |sum, chunk| async move { Ok(sum + chunk.len()) });
    let bytes = bytes.await?;
    let (seconds, cpu) = (began.elapsed().as_secs_f64(), cpu_ms() - cpu);
    println!(
        "{} chunks ({} MiB) in {seconds:.2} s, {:.1} ms of CPU for each",
        chunks.len(),
        bytes >> 20,
        cpu / chunks.len() as f64
    );
    Ok(())
}
