//! Launches from an object store that is 20 ms and 1 Gbit/s away: with nothing of the image on the host, with what earlier launches
//! noted to be fetched ahead, and with all of it here. Prints one line of JSON with the figures of each launch.
//!
//! `launch_bench S3-SERVER ROUNDS NAME FILE TYPE READY [NAME FILE TYPE READY]…`: images with the instance type to launch them as and what their
//! console says when the guest is ready. S3-SERVER is the example `s3-server` of `hearth-snapshot`.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::indexing_slicing, clippy::panic)]

use std::collections::HashSet;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use hearth_tests::cloud::{Cloud, Shape, kill_now, wait_until};
use serde_json::{Value, json};

/// How long a host may take to fetch a whole image.
const FILL: Duration = Duration::from_secs(900);
/// How long a host may take to store what a launch read.
const NOTED: Duration = Duration::from_secs(180);
const LATENCY_MS: &str = "20";
const MBIT: &str = "1000";

/// The object store, and what it has answered.
struct Store {
    folder: PathBuf,
    server: Child,
}

impl Drop for Store {
    fn drop(&mut self) {
        kill_now(&mut self.server);
    }
}

/// Chunks that the store has handed out, and their bytes.
#[derive(Clone, Copy, Default)]
struct Fetched {
    chunks: u64,
    bytes: u64,
}

impl Store {
    /// Starts it in the network namespace of this thread.
    fn start(server: &str, folder: &Path) -> Self {
        let folder = folder.join("s3");
        std::fs::create_dir(&folder).unwrap();
        let server = Command::new(server)
            .args(["--latency-ms", LATENCY_MS, "--mbit", MBIT, "--listen", "127.0.0.1:9000"])
            .arg("--root")
            .arg(folder.join("buckets"))
            .arg("--log")
            .arg(folder.join("log"))
            .stdout(Stdio::null())
            .spawn()
            .unwrap_or_else(|e| panic!("{server}: {e}"));
        let there = || std::net::TcpStream::connect("127.0.0.1:9000").is_ok();
        assert!(wait_until(Duration::from_secs(60), there), "the object store does not start");
        Self { folder, server }
    }

    /// Everything so far.
    fn fetched(&self) -> Fetched {
        let log = std::fs::read_to_string(self.folder.join("log")).unwrap_or_default();
        let mut fetched = Fetched::default();
        let mut seen = HashSet::new();
        for line in log.lines() {
            let words: Vec<&str> = line.split(' ').collect();
            if let ["GET", path, "200", bytes] = words[..]
                && path.contains("/chunk/")
            {
                seen.insert(path);
                fetched.chunks += 1;
                fetched.bytes += bytes.parse::<u64>().unwrap();
            }
        }
        fetched
    }

    /// The prefetch lists that are there.
    fn lists(&self) -> Vec<PathBuf> {
        let snapshots = std::fs::read_dir(self.folder.join("buckets/cloud/snap")).into_iter().flatten().flatten();
        snapshots.map(|folder| folder.path().join("prefetch")).filter(|list| list.is_file()).collect()
    }
}

/// A launched image, and what the host has of it.
struct Host<'a> {
    cloud: Cloud,
    store: Store,
    image: &'a [String],
    launches: u32,
}

impl Host<'_> {
    fn bases(&self) -> PathBuf {
        self.cloud.path("state/agent/bases")
    }

    /// Changes what is on the host while no agent runs.
    fn while_down(&mut self, change: impl FnOnce(&Self)) {
        self.cloud.kill_control();
        change(self);
        self.cloud.start_control();
        self.cloud.wait_for_hosts(1);
    }

    /// One launch, from the call to the guest's word that it is ready.
    fn launch(&mut self, patience: Duration) -> Value {
        self.launches += 1;
        let name = format!("{}-{}", self.image[0], self.launches);
        let before = self.store.fetched();
        let began = Instant::now();
        self.cloud.hearth(&["instance", "run", &self.image[0], "--type", &self.image[2], "--name", &name, "--wait"]);
        let running = began.elapsed().as_secs_f64();
        let mut console = self.cloud.console(&name);
        console.wait_for_within(&self.image[3], patience);
        let ready = began.elapsed().as_secs_f64();
        let after = self.store.fetched();
        let (chunks, bytes) = (after.chunks - before.chunks, after.bytes - before.bytes);
        eprintln!("{name}: running after {running:.2} s, ready after {ready:.2} s, {chunks} chunks fetched");
        json!({ "running_s": running, "ready_s": ready, "chunks": chunks, "bytes": bytes, "name": name })
    }

    fn terminate(&self, launched: &Value) {
        self.cloud.hearth(&["instance", "terminate", launched["name"].as_str().unwrap(), "--yes", "--wait"]);
    }
}

fn measure(server: &str, image: &[String], rounds: usize) -> Value {
    let mut store = None;
    let cloud = Cloud::start_with(Shape::One, |folder| {
        store = Some(Store::start(server, folder));
        "object-store = 's3://cloud'\n".into()
    });
    let mut host = Host { cloud, store: store.unwrap(), image, launches: 0 };
    host.cloud.hearth(&["image", "import", &image[1], "--name", &image[0]]);
    let about = host.cloud.json(&["image", "describe", &image[0]]);
    let snapshot =
        about["block_device_mappings"][0]["snapshot_id"].as_str().unwrap_or_else(|| panic!("{about:#}")).to_owned();
    let patience = Duration::from_secs(400);

    // All of it once: how much there is, and what the launches from a complete base begin with.
    let before = host.store.fetched();
    let name = host.cloud.json(&["host", "list"])[0]["name"].as_str().unwrap().to_owned();
    host.cloud.hearth(&["snapshot", "fast-restore", "enable", &snapshot, "--host", &name]);
    let whole = || {
        let all = host.cloud.json(&["snapshot", "fast-restore", "list"]);
        all[0]["state"] == "enabled"
    };
    assert!(wait_until(FILL, whole), "{:#}", host.cloud.json(&["snapshot", "fast-restore", "list"]));
    let nonzero = host.store.fetched().chunks - before.chunks;
    host.cloud.hearth(&["snapshot", "fast-restore", "disable", &snapshot]);
    let kept = host.cloud.path("kept-bases");
    let mut results: Vec<Value> = Vec::new();
    for round in 0..rounds {
        let (bases, here) = (host.bases(), kept.clone());
        host.while_down(|host| {
            std::fs::rename(&bases, &here).unwrap();
            std::fs::create_dir(&bases).unwrap();
            host.store.lists().iter().for_each(|list| std::fs::remove_file(list).unwrap());
        });
        let cold = host.launch(patience);
        let noted = wait_until(NOTED, || !host.store.lists().is_empty());
        assert!(noted, "the host does not store what the launch read");
        host.terminate(&cold);
        let bases = host.bases();
        host.while_down(|_| {
            std::fs::remove_dir_all(&bases).unwrap();
            std::fs::create_dir(&bases).unwrap();
        });
        let prefetched = host.launch(patience);
        host.terminate(&prefetched);
        let here = kept.clone();
        host.while_down(|_| {
            std::fs::remove_dir_all(&bases).unwrap();
            std::fs::rename(&here, &bases).unwrap();
        });
        let local = host.launch(patience);
        host.terminate(&local);
        assert_eq!(local["chunks"], 0, "the base was not complete");
        eprintln!("{} round {} of {rounds}", image[0], round + 1);
        results.push(json!({ "local": local, "cold": cold, "prefetched": prefetched }));
    }
    let bytes = std::fs::metadata(&image[1]).unwrap().len();
    json!({ "name": image[0], "bytes": bytes, "nonzero_chunks": nonzero, "rounds": results })
}

fn main() {
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    let rounds = arguments[1].parse().unwrap();
    // SAFETY: no other thread runs yet.
    unsafe {
        for (name, value) in [
            ("AWS_ACCESS_KEY_ID", "hearth"),
            ("AWS_SECRET_ACCESS_KEY", "not-so-secret"),
            ("AWS_ENDPOINT_URL_S3", "http://127.0.0.1:9000"),
            ("AWS_ALLOW_HTTP", "true"),
        ] {
            std::env::set_var(name, value);
        }
    }
    let images: Vec<Value> =
        arguments[2..].chunks_exact(4).map(|image| measure(&arguments[0], image, rounds)).collect();
    println!("{}", json!({ "images": images }));
}
