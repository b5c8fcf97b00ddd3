//! A whole cloud: attaching a volume as its user sees it, and a guest that writes while its disk is snapshotted.

use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::Instant;

use hearth_tests::cloud::{Cloud, Shape};
use hearth_tests::console::Console;
use hearth_tests::machine::copy_disk;
use hearth_tests::tiny_image;
use serde_json::{Value, json};

use crate::guests::Setting;
use crate::io::Found;
use crate::median;

/// What the guest writes to, in MiB: so many chunks change, twice over.
const WRITTEN_MIB: u64 = 64;
/// Where the partition of the image begins.
const PARTITION: u64 = 1 << 20;

/// The tiny image with the benchmark's program in it.
fn image(setting: &Setting) -> PathBuf {
    let image = setting.path("tiny.raw");
    copy_disk(&tiny_image(), &image);
    let program = setting.work.join("guest_load");
    let request = format!("write {} bin/guest_load", program.display());
    let target = format!("{}?offset={PARTITION}", image.display());
    let done = Command::new("debugfs").args(["-w", "-R", &request, &target]).output().unwrap();
    assert!(done.status.success(), "{done:?}");
    image
}

fn load(console: &mut Console, seconds: f64) -> Found {
    Found::read(&console.run(&format!("guest_load load write 1 {seconds} /dev/vdb {WRITTEN_MIB}")))
}

/// Objects of chunks in the store, and their bytes.
fn stored(folder: &Path) -> (u64, u64) {
    let mut found = (0, 0);
    for entry in std::fs::read_dir(folder).into_iter().flatten().flatten() {
        let about = entry.metadata().unwrap();
        let (count, bytes) = if about.is_dir() { stored(&entry.path()) } else { (1, about.len()) };
        found = (found.0 + count, found.1 + bytes);
    }
    found
}

/// The figure behind the last `name=` in the daemon's log.
fn logged(cloud: &Cloud, name: &str) -> f64 {
    let log = std::fs::read_to_string(cloud.path("control.log")).unwrap();
    let value =
        log.rsplit_once(&format!("{name}=")).map(|(_, rest)| rest.split_whitespace().next().unwrap_or_default());
    value.and_then(|value| value.parse().ok()).unwrap_or_else(|| panic!("no {name} in the log:\n{log}"))
}

/// Milliseconds from the call for an attachment until the guest has the disk, and for a call that changes nothing.
fn attach(cloud: &Cloud, console: &mut Console) -> (f64, f64) {
    let ms = |began: Instant| began.elapsed().as_secs_f64() * 1e3;
    let began = Instant::now();
    cloud.hearth(&["volume", "describe", "data"]);
    let looked = ms(began);
    let began = Instant::now();
    cloud.hearth(&["volume", "attach", "data", "a"]);
    console.wait_for("BENCH-DISK add vdb");
    (ms(began), looked)
}

pub fn run(setting: &Setting, rounds: usize, seconds: f64) -> Value {
    let cloud = Cloud::start(Shape::One);
    cloud.hearth(&["image", "import", image(setting).to_str().unwrap(), "--name", "tiny"]);
    cloud.hearth(&["instance", "run", "tiny", "--type", "h1.tiny", "--name", "a", "--wait"]);
    let mut console = cloud.console("a");
    console.wait_for_shell();
    cloud.hearth(&["volume", "create", "--name", "data", "--size", "1G", "--wait"]);
    console.run("chmod 755 /bin/guest_load; (guest_load watch &)");
    let mut attached = Vec::new();
    for round in 0..rounds {
        let figures = attach(&cloud, &mut console);
        eprintln!("{}/{rounds} attached after {:.0} ms, a call takes {:.0} ms", round + 1, figures.0, figures.1);
        attached.push(figures);
        if round + 1 < rounds {
            cloud.hearth(&["volume", "detach", "data", "--yes", "--wait"]);
            console.wait_for("BENCH-DISK remove vdb");
        }
    }
    let chunks = cloud.path("state/control/objects/chunk");
    let mut writes = Vec::new();
    let mut snapshots = Vec::new();
    // What was never written is written once; the first snapshot would be another kind of work than those that follow.
    for round in 0..=rounds {
        let quiet = load(&mut console, seconds);
        let before = stored(&chunks);
        let name = format!("round-{round}");
        let mut call = cloud.command(&["snapshot", "create", "data", "--name", &name, "--wait"]);
        // This program's own output is its figures.
        let mut call = call.stdout(Stdio::null()).spawn().unwrap();
        let busy = load(&mut console, seconds);
        let during = call.try_wait().unwrap().is_none();
        assert!(call.wait().unwrap().success());
        let after = stored(&chunks);
        let (held_us, frozen) = (logged(&cloud, "held_us"), logged(&cloud, "frozen_chunks"));
        let (uploaded, bytes) = (after.0 - before.0, after.1 - before.1);
        eprintln!(
            "{round}/{rounds} held {held_us} us; p99 {} us, without {} us; {uploaded} of {frozen} chunks, {bytes} bytes; \
             {}",
            busy.p99_us,
            quiet.p99_us,
            if during { "it took longer than the load" } else { "it ended before the load" },
        );
        if round > 0 {
            writes.push((quiet, busy));
            snapshots.push((held_us, frozen, uploaded as f64, bytes as f64));
        }
    }
    cloud.hearth(&["instance", "terminate", "a", "--yes", "--wait"]);
    let of = |part: fn(&(f64, f64, f64, f64)) -> f64| median(snapshots.iter().map(part));
    json!({
        "attach_call": { "ms": median(attached.iter().map(|a| a.0)), "call_ms": median(attached.iter().map(|a| a.1)) },
        "snapshot": {
            "held_ms": of(|s| s.0) / 1e3,
            "held_ms_max": snapshots.iter().map(|s| s.0).fold(0.0, f64::max) / 1e3,
            "frozen_chunks": of(|s| s.1), "uploaded_chunks": of(|s| s.2), "uploaded_bytes": of(|s| s.3),
            "p99_us": median(writes.iter().map(|(quiet, _)| quiet.p99_us)),
            "p99_us_during": median(writes.iter().map(|(_, busy)| busy.p99_us)),
            "p99_ratio": median(writes.iter().map(|(quiet, busy)| busy.p99_us / quiet.p99_us)),
            "p50_ratio": median(writes.iter().map(|(quiet, busy)| busy.p50_us / quiet.p50_us)),
            "max_us_during": median(writes.iter().map(|(_, busy)| busy.max_us)),
        },
    })
}
