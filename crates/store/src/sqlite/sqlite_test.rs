use std::sync::Arc;

use proptest::prelude::*;

use super::*;
use crate::conformance::model;

/// A store whose watchers fall back to the log almost always.
fn forgetful() -> Options {
    Options { recent_revisions: 2, ..Options::default() }
}

mod conformance {
    use super::*;
    crate::conformance_tests!(Arc::new(SqliteStore::open_temporary().unwrap()));
}

mod conformance_from_the_log {
    use super::*;
    crate::conformance_tests!(Arc::new(SqliteStore::open_temporary_with(forgetful()).unwrap()));
}

fn check_model(options: Options, steps: Vec<model::Step>) {
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("store.db");
    let open = || -> Arc<dyn Store> { Arc::new(SqliteStore::open_with(&path, options.clone()).unwrap()) };
    runtime.block_on(model::check(open(), steps, async |store| {
        drop(store);
        open()
    }));
}

/// A number of histories that takes seconds; `PROPTEST_CASES` asks for more.
fn histories() -> ProptestConfig {
    let mut config = ProptestConfig::default();
    if std::env::var_os("PROPTEST_CASES").is_none() {
        config.cases = 80;
    }
    config
}

proptest! {
    #![proptest_config(histories())]

    #[test]
    fn random_histories_match_the_model(steps in model::histories(60)) {
        check_model(Options::default(), steps);
    }

    #[test]
    fn random_histories_match_the_model_from_the_log(steps in model::histories(60)) {
        check_model(forgetful(), steps);
    }
}

#[tokio::test]
async fn a_watcher_that_compaction_overtakes_is_told() {
    let store = SqliteStore::open_temporary_with(forgetful()).unwrap();
    let mut watch = store.watch("/", 0).await.unwrap();
    for i in 0..10 {
        store.txn(Txn::new().put("/a", vec![i])).await.unwrap();
    }
    assert_eq!(watch.next().await.unwrap().unwrap().revision, 1);
    for i in 0..800 {
        store.txn(Txn::new().put("/a", vec![i as u8; 1000])).await.unwrap();
    }
    store.compact(805).await.unwrap();
    // What it has read ahead is still good; then it learns where to begin anew.
    let mut last = 1;
    let error = loop {
        match watch.next().await.unwrap() {
            Ok(batch) => {
                assert_eq!(batch.revision, last + 1);
                last = batch.revision;
            }
            Err(error) => break error,
        }
    };
    assert!(last < 805);
    assert_eq!(error, Error::Compacted { oldest: 806 });
    assert_eq!(watch.next().await, None);
    let mut anew = store.watch("/", 806).await.unwrap();
    assert_eq!(anew.next().await.unwrap().unwrap().revision, 806);
}

#[tokio::test]
async fn callers_that_go_away_leave_no_trace_but_their_writes() {
    let store = Arc::new(SqliteStore::open_temporary().unwrap());
    let value = vec![0_u8; 20_000];
    for round in 0..200 {
        let txn = Txn::new().put(format!("/a/{}", round % 7), value.clone()).put(format!("/b/{}", round % 7), "");
        // Polled once or for a moment, then dropped.
        let waited = Duration::from_micros(round % 3 * 100);
        drop(tokio::time::timeout(waited, store.txn(txn)).await);
    }
    // The queue's room came back, and revisions are whole.
    let revision = store.txn(Txn::new().put("/last", "")).await.unwrap().revision();
    let all = u32::try_from(QUEUE_BYTES / QUEUE_GRAIN).unwrap();
    drop(store.room.acquire_many(all).await.unwrap());
    let mut watch = store.watch("/", 1).await.unwrap();
    for expected in 1..revision {
        let batch = watch.next().await.unwrap().unwrap();
        assert_eq!((batch.revision, batch.events.len()), (expected, 2));
    }
}

#[tokio::test]
async fn more_than_the_queue_holds_waits_its_turn() {
    let store = Arc::new(SqliteStore::open_temporary().unwrap());
    // Seventy megabytes at once.
    let tasks: Vec<_> = (0..56)
        .map(|i| {
            let store = Arc::clone(&store);
            tokio::spawn(async move {
                let value = vec![i as u8; limits::MAX_VALUE_BYTES];
                let txn = (0..5).fold(Txn::new(), |txn, j| txn.put(format!("/{}/{j}", i % 4), value.clone()));
                store.txn(txn).await.unwrap().revision()
            })
        })
        .collect();
    let mut revisions = Vec::new();
    for task in tasks {
        revisions.push(task.await.unwrap());
    }
    revisions.sort_unstable();
    assert_eq!(revisions, (1..=56).collect::<Vec<_>>());
}

#[test]
fn commits_are_synced_to_the_disk() {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("store.db");
    schema::create(&path).unwrap();
    let conn = schema::open_writer(&path, u64::MAX).unwrap();
    let pragma =
        |name: &str| conn.pragma_query_value(None, name, |row| row.get::<_, rusqlite::types::Value>(0)).unwrap();
    // FULL: the log is synced by every commit (https://sqlite.org/pragma.html#pragma_synchronous).
    assert_eq!(pragma("synchronous"), rusqlite::types::Value::Integer(2));
    assert_eq!(pragma("journal_mode"), rusqlite::types::Value::Text("wal".into()));
}
