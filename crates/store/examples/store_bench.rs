//! Measures the SQLite store: durable transactions per second and their latency at several numbers
//! of concurrent writers, point reads, listing, and how late a watcher sees a commit.
//!
//! `cargo run --release -p hearth-store --example store_bench -- [--objects N] [--seconds S] [--dir PATH] [--json]`
//!
//! A transaction is what the control plane does most: compare the object's revision, put the
//! object (600 bytes) and an index key.

use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::{Duration, Instant};

use hearth_store::sqlite::{Options, SqliteStore};
use hearth_store::{Store, Txn, TxnOutcome, list};

type Failure = Box<dyn std::error::Error + Send + Sync>;

struct Settings {
    objects: usize,
    seconds: f64,
    dir: Option<PathBuf>,
    json: bool,
}

#[derive(Default)]
struct Figures(Vec<(String, f64, &'static str)>);

impl Figures {
    fn add(&mut self, name: impl Into<String>, value: f64, unit: &'static str) {
        self.0.push((name.into(), value, unit));
    }

    fn print(&self, json: bool) {
        if json {
            let fields: Vec<String> =
                self.0.iter().map(|(name, value, unit)| format!("\"{name}_{unit}\": {value:.3}")).collect();
            println!("{{{}}}", fields.join(", "));
        } else {
            for (name, value, unit) in &self.0 {
                println!("{name:<32} {value:>14.3} {unit}");
            }
        }
    }
}

#[tokio::main]
async fn main() -> Result<(), Failure> {
    let settings = settings()?;
    let directory = match &settings.dir {
        Some(dir) => tempfile::tempdir_in(dir)?,
        None => tempfile::tempdir()?,
    };
    let path = directory.path().join("bench.db");
    let store = Arc::new(SqliteStore::open_with(&path, Options::default())?);
    let mut figures = Figures::default();

    fill(store.as_ref(), settings.objects, &mut figures).await?;
    for writers in [1, 16, 256] {
        write_load(&store, writers, &settings, &mut figures).await?;
    }
    for readers in [1, 16] {
        read_load(&store, readers, &settings, &mut figures).await?;
    }
    let started = Instant::now();
    let (kvs, _) = list(store.as_ref(), "/objects/").await?;
    figures.add(format!("list_{}", kvs.len()), started.elapsed().as_secs_f64() * 1e3, "ms");
    let started = Instant::now();
    store.backup(&directory.path().join("backup.db")).await?;
    figures.add("backup", started.elapsed().as_secs_f64() * 1e3, "ms");
    figures.add("file", std::fs::metadata(&path)?.len() as f64 / 1e6, "MB");
    drop(store);
    let started = Instant::now();
    let store = SqliteStore::open(&path)?;
    figures.add("open", started.elapsed().as_secs_f64() * 1e3, "ms");
    drop(store);
    figures.print(settings.json);
    Ok(())
}

fn settings() -> Result<Settings, Failure> {
    let mut settings = Settings { objects: 100_000, seconds: 3.0, dir: None, json: false };
    let mut args = std::env::args().skip(1);
    while let Some(arg) = args.next() {
        let mut value = || args.next().ok_or(format!("{arg} needs a value"));
        match arg.as_str() {
            "--objects" => settings.objects = value()?.parse()?,
            "--seconds" => settings.seconds = value()?.parse()?,
            "--dir" => settings.dir = Some(value()?.into()),
            "--json" => settings.json = true,
            _ => return Err(format!("unknown argument {arg}").into()),
        }
    }
    if settings.objects == 0 {
        return Err("--objects must be at least 1".into());
    }
    Ok(settings)
}

fn object(index: usize) -> String {
    format!("/objects/123456789012/i-{index:017x}")
}

async fn fill(store: &dyn Store, objects: usize, figures: &mut Figures) -> Result<(), Failure> {
    let started = Instant::now();
    let indices: Vec<usize> = (0..objects).collect();
    for chunk in indices.chunks(64) {
        let txn = chunk.iter().fold(Txn::new(), |txn, index| txn.put(object(*index), vec![b'x'; 600]));
        store.txn(txn).await?;
    }
    figures.add("fill", objects as f64 / started.elapsed().as_secs_f64(), "keys/s");
    Ok(())
}

/// One transaction of the load: compare-and-swap of an object, with an index key.
async fn change(store: &dyn Store, index: usize) -> Result<(), Failure> {
    let key = object(index);
    let revision = store.get(&key).await?.map_or(0, |kv| kv.mod_revision);
    let txn = Txn::new()
        .compare_mod_revision(&key, revision)
        .put(&key, vec![b'y'; 600])
        .put(format!("/by-host/h-{:04}/i-{index:017x}", index % 1000), "");
    match store.txn(txn).await? {
        TxnOutcome::Committed { .. } => Ok(()),
        outcome => Err(format!("objects are not shared between writers, yet {outcome:?}").into()),
    }
}

async fn write_load(
    store: &Arc<SqliteStore>,
    writers: usize,
    settings: &Settings,
    figures: &mut Figures,
) -> Result<(), Failure> {
    let stop = Arc::new(AtomicBool::new(false));
    let mut watch = store.watch("/objects/", 0).await?;
    let seen = Arc::new(AtomicU64::new(0));
    let counter = Arc::clone(&seen);
    let watcher = tokio::spawn(async move {
        while let Some(Ok(_)) = watch.next().await {
            counter.fetch_add(1, Ordering::Relaxed);
        }
    });
    let started = Instant::now();
    let tasks: Vec<_> = (0..writers)
        .map(|writer| {
            let (store, stop, objects) = (Arc::clone(store), Arc::clone(&stop), settings.objects);
            tokio::spawn(async move {
                let mut latencies = Vec::new();
                let mut round = 0_usize;
                while !stop.load(Ordering::Relaxed) {
                    // Scattered over the key space, and never the same key from two writers.
                    let slot = round.wrapping_mul(7919) % (objects / writers).max(1);
                    let asked = Instant::now();
                    change(store.as_ref(), slot * writers + writer).await?;
                    latencies.push(asked.elapsed());
                    round += 1;
                }
                Ok::<_, Failure>(latencies)
            })
        })
        .collect();
    tokio::time::sleep(Duration::from_secs_f64(settings.seconds)).await;
    stop.store(true, Ordering::Relaxed);
    let mut latencies = Vec::new();
    for task in tasks {
        latencies.extend(task.await??);
    }
    let elapsed = started.elapsed().as_secs_f64();
    figures.add(format!("txns_{writers}_writers"), latencies.len() as f64 / elapsed, "per_s");
    percentiles(&format!("txn_{writers}_writers"), latencies, figures);
    watcher.abort();
    Ok(())
}

async fn read_load(
    store: &Arc<SqliteStore>,
    readers: usize,
    settings: &Settings,
    figures: &mut Figures,
) -> Result<(), Failure> {
    let until = Instant::now() + Duration::from_secs_f64(settings.seconds);
    let started = Instant::now();
    let tasks: Vec<_> = (0..readers)
        .map(|reader| {
            let (store, objects) = (Arc::clone(store), settings.objects);
            tokio::spawn(async move {
                let mut latencies = Vec::new();
                while Instant::now() < until {
                    let asked = Instant::now();
                    store.get(&object((latencies.len() * 7919 + reader) % objects)).await?;
                    latencies.push(asked.elapsed());
                }
                Ok::<_, Failure>(latencies)
            })
        })
        .collect();
    let mut latencies = Vec::new();
    for task in tasks {
        latencies.extend(task.await??);
    }
    figures.add(format!("gets_{readers}_readers"), latencies.len() as f64 / started.elapsed().as_secs_f64(), "per_s");
    percentiles(&format!("get_{readers}_readers"), latencies, figures);
    Ok(())
}

fn percentiles(name: &str, mut latencies: Vec<Duration>, figures: &mut Figures) {
    latencies.sort_unstable();
    for (label, share) in [("p50", 0.5), ("p99", 0.99), ("p999", 0.999)] {
        let index = (latencies.len() as f64 * share) as usize;
        if let Some(latency) = latencies.get(index) {
            figures.add(format!("{name}_{label}"), latency.as_secs_f64() * 1e3, "ms");
        }
    }
}
