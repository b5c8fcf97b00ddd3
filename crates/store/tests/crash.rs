//! `kill -9` at random moments: nothing acknowledged is lost, nothing is half done, time does not run
//! backwards.

#![allow(clippy::unwrap_used, clippy::expect_used, clippy::indexing_slicing, clippy::panic)]

mod common;

use std::collections::BTreeMap;
use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use common::{Process, child_store, report};
use hearth_store::leader::campaign;
use hearth_store::sqlite::{self, Options, SqliteStore};
use hearth_store::{Error, EventKind, KeyValue, LeaseId, RangeRequest, Revision, Store, Txn, TxnOutcome, list};

const TASKS: usize = 8;
const KILLS: usize = 40;
const LEASE_TTL: Duration = Duration::from_secs(24 * 3600);

/// Small, so that history is compacted and the watchers' ring overflows all the time.
fn options() -> Options {
    Options { keep_revisions: Some(200), recent_revisions: 16, ..Options::default() }
}

fn number(kv: Option<&KeyValue>) -> u64 {
    kv.map_or(0, |kv| std::str::from_utf8(&kv.value).unwrap().parse().unwrap())
}

/// Step `n` of a task: a counter, a pair of keys, and every tenth time the deletion of an older pair.
fn step(task: usize, n: u64, counter: Revision, lease: LeaseId) -> Txn {
    let value = n.to_string();
    let txn = Txn::new()
        .compare_mod_revision(format!("/counter/{task}"), counter)
        .put(format!("/counter/{task}"), value.clone())
        .put(format!("/pair/{task}/{n}/a"), value.clone().repeat(1 + n as usize % 50))
        .put(format!("/pair/{task}/{n}/b"), value.clone())
        .put_with_lease(format!("/leased/{task}"), value, lease);
    if n.is_multiple_of(10) { txn.delete_prefix(format!("/pair/{task}/{}/", n - 5)) } else { txn }
}

/// What a task's counter says must be there.
fn expected(task: usize, counter: u64) -> Vec<String> {
    (1..=counter)
        .filter(|n| !(n % 10 == 5 && n + 5 <= counter))
        .flat_map(|n| [format!("/pair/{task}/{n}/a"), format!("/pair/{task}/{n}/b")])
        .collect()
}

/// The child: writes for ever and reports what was acknowledged.
async fn write_for_ever(path: &str) {
    let store = Arc::new(SqliteStore::open_with(path, options()).unwrap());
    report(&format!("OPEN {}", store.revision().await.unwrap()));
    let leader = campaign(store.as_ref(), "crash-test", LEASE_TTL).await.unwrap();
    report(&format!("TERM {}", leader.term));
    let lease = store.lease_grant(LEASE_TTL).await.unwrap();
    let tasks: Vec<_> = (0..TASKS)
        .map(|task| {
            let (store, leader) = (Arc::clone(&store), leader.clone());
            tokio::spawn(async move {
                let found = store.get(&format!("/counter/{task}")).await.unwrap();
                let (mut n, mut counter) = (number(found.as_ref()), found.map_or(0, |kv| kv.mod_revision));
                loop {
                    n += 1;
                    match store.txn(step(task, n, counter, lease).guard(&leader)).await.unwrap() {
                        TxnOutcome::Committed { revision } => counter = revision,
                        conflict => panic!("nobody else writes, yet {conflict:?}"),
                    }
                    report(&format!("ACK {task} {n} {counter}"));
                    if task == 0 && n.is_multiple_of(50) {
                        store.compact(counter - 20).await.unwrap();
                        report(&format!("COMPACTED {}", counter - 20));
                    }
                }
            })
        })
        .collect();
    let (ended, _, _) = futures::future::select_all(tasks).await;
    ended.unwrap();
}

/// What the parent knows for certain.
#[derive(Default)]
struct Known {
    revision: Revision,
    term: Revision,
    compacted: Revision,
    /// Per task: acknowledged step and its revision.
    steps: BTreeMap<usize, (u64, Revision)>,
    acknowledged: usize,
}

impl Known {
    fn learn(&mut self, report: &str) {
        let words: Vec<&str> = report.split(' ').collect();
        let numbers: Vec<i64> = words[1..].iter().map(|word| word.parse().unwrap()).collect();
        match (words[0], &numbers[..]) {
            ("OPEN", [revision]) => {
                assert!(*revision >= self.revision, "opened at {revision} after {}", self.revision);
            }
            ("TERM", [term]) => {
                assert!(*term > self.term, "term {term} after {}", self.term);
                self.term = *term;
            }
            ("ACK", [task, n, revision]) => {
                self.steps.insert(*task as usize, (*n as u64, *revision));
                self.revision = self.revision.max(*revision);
                self.acknowledged += 1;
            }
            ("COMPACTED", [revision]) => self.compacted = self.compacted.max(*revision),
            _ => panic!("unknown report {report:?}"),
        }
    }

    async fn check(&self, store: &dyn Store) {
        let revision = store.revision().await.unwrap();
        assert!(revision >= self.revision, "revision {revision} after {} was acknowledged", self.revision);
        for task in 0..TASKS {
            let counter = store.get(&format!("/counter/{task}")).await.unwrap();
            let n = number(counter.as_ref());
            if let Some((acknowledged, at)) = self.steps.get(&task) {
                assert!(n >= *acknowledged, "task {task}: step {n} after {acknowledged} was acknowledged");
                if n == *acknowledged {
                    assert_eq!(counter.as_ref().unwrap().mod_revision, *at);
                }
            }
            let (pairs, _) = list(store, &format!("/pair/{task}/")).await.unwrap();
            let mut wanted = expected(task, n);
            wanted.sort();
            assert_eq!(pairs.iter().map(|kv| kv.key.clone()).collect::<Vec<_>>(), wanted, "task {task} at {n}");
            let halves = pairs.chunks(2).all(|pair| pair[0].mod_revision == pair[1].mod_revision);
            assert!(halves, "task {task} has pairs of two revisions");
            if let Some(leased) = store.get(&format!("/leased/{task}")).await.unwrap() {
                let lease = store.lease_info(leased.lease.unwrap()).await.unwrap();
                assert!(lease.keys.contains(&leased.key));
                assert_eq!(lease.ttl, LEASE_TTL);
            }
        }
        self.check_history(store, revision).await;
    }

    /// The kept history, replayed on its beginning, gives the present.
    async fn check_history(&self, store: &dyn Store, revision: Revision) {
        let compacted = match store.watch("/", 1).await {
            Err(Error::Compacted { oldest }) => oldest - 1,
            watch => watch.map(|_| 0).unwrap(),
        };
        assert!(compacted >= self.compacted, "{compacted} after compaction up to {}", self.compacted);
        let mut state: BTreeMap<String, KeyValue> = BTreeMap::new();
        let mut request = RangeRequest::prefix("/").at(compacted);
        loop {
            let page = store.range(request.clone()).await.unwrap();
            state.extend(page.kvs.into_iter().map(|kv| (kv.key.clone(), kv)));
            if !page.more {
                break;
            }
            request = request.after(state.last_key_value().unwrap().0.clone());
        }
        let mut watch = store.watch("/", compacted + 1).await.unwrap();
        for expected in compacted + 1..=revision {
            let batch = watch.next().await.unwrap().unwrap();
            assert_eq!(batch.revision, expected);
            for event in batch.events {
                let before = match event.kind {
                    EventKind::Put(kv) => state.insert(kv.key.clone(), kv),
                    EventKind::Delete { key } => state.remove(&key),
                };
                assert_eq!(before, event.prev);
            }
        }
        let (present, _) = list(store, "/").await.unwrap();
        assert!(state.into_values().eq(present), "the replayed history differs from the present");
    }
}

fn runtime() -> tokio::runtime::Runtime {
    tokio::runtime::Builder::new_multi_thread().worker_threads(2).enable_all().build().unwrap()
}

#[test]
fn kill_9_loses_nothing_that_was_acknowledged() {
    if let Some(path) = child_store() {
        runtime().block_on(write_for_ever(&path));
        return;
    }
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("store.db");
    let mut known = Known::default();
    for kill in 0..KILLS {
        let child = Process::start("kill_9_loses_nothing_that_was_acknowledged", &path);
        // Every fourth time it is killed while it starts, else while it is writing.
        if kill % 4 != 0 {
            for _ in 0..rand::random_range(3..300) {
                known.learn(&child.next().expect("the writer ended by itself"));
            }
        }
        std::thread::sleep(Duration::from_micros(rand::random_range(0..20_000)));
        for report in child.kill() {
            known.learn(&report);
        }
        // A kill can come before the store exists; then there is nothing to look at, nor to lose.
        if known.revision > 0 || path.exists() {
            let store = SqliteStore::open_with(&path, options()).unwrap();
            runtime().block_on(known.check(&store));
        }
    }
    println!("{KILLS} kills, {} transactions acknowledged, revision {}", known.acknowledged, known.revision);
    assert!(known.acknowledged > KILLS, "too little was written for the kills to mean anything");
}

/// The child: makes stores, backs them up and restores them, for ever.
async fn make_stores_for_ever(first: &Path) {
    for round in 0.. {
        let path = first.with_extension(format!("{round}.db"));
        let store = SqliteStore::open(&path).unwrap();
        for n in 0..3 {
            store.txn(Txn::new().put("/n", n.to_string())).await.unwrap();
        }
        store.backup(&path.with_extension("backup")).await.unwrap();
        sqlite::restore(&path.with_extension("backup"), &path.with_extension("restored")).unwrap();
        report("MADE");
    }
}

#[test]
fn kill_9_leaves_no_half_made_file_under_a_final_name() {
    if let Some(path) = child_store() {
        runtime().block_on(make_stores_for_ever(Path::new(&path)));
        return;
    }
    let mut files = 0;
    let mut cut_short = 0;
    for _ in 0..15 {
        let directory = tempfile::tempdir().unwrap();
        let child =
            Process::start("kill_9_leaves_no_half_made_file_under_a_final_name", &directory.path().join("store.db"));
        for _ in 0..rand::random_range(0..3) {
            child.next().expect("the maker ended by itself");
        }
        std::thread::sleep(Duration::from_micros(rand::random_range(0..30_000)));
        child.kill();
        let names: Vec<_> = std::fs::read_dir(directory.path()).unwrap().map(|entry| entry.unwrap().path()).collect();
        cut_short += names.iter().filter(|path| path.to_string_lossy().contains(".partial")).count();
        for path in names {
            let kind = path.extension().unwrap_or_default().to_string_lossy().into_owned();
            if !["db", "backup", "restored"].contains(&kind.as_str()) {
                continue;
            }
            files += 1;
            let store = SqliteStore::open(&path).unwrap();
            runtime().block_on(async {
                let n = store.get("/n").await.unwrap();
                if kind != "db" {
                    assert_eq!(n.unwrap().value, "2");
                }
                // A backup or restore that was cut short does not stand in the way of the next.
                store.txn(Txn::new().put("/n", "again")).await.unwrap();
                let again = path.with_extension(format!("{kind}.backup"));
                store.backup(&again).await.unwrap();
                sqlite::restore(&again, &again.with_extension("restored")).unwrap();
            });
        }
    }
    println!("{files} files, {cut_short} half-made ones under provisional names");
    assert!(files > 15, "too little was made for the kills to mean anything: {files} files");
}
