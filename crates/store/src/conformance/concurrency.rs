//! Many clients at once.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicI64, Ordering};

use super::{next, put};
use crate::{Compare, EventKind, RangeRequest, Revision, Store, Txn, TxnOutcome, list};

const CLIENTS: usize = 16;
const ROUNDS: usize = 25;

fn number(value: &[u8]) -> i64 {
    std::str::from_utf8(value).unwrap().parse().unwrap()
}

/// Adds `amount` to a counter by compare-and-swap. Returns the revision and the new number.
async fn add(store: &dyn Store, key: &str, amount: i64) -> (Revision, i64) {
    loop {
        let found = store.get(key).await.unwrap();
        let (old, revision) = found.map_or((0, 0), |kv| (number(&kv.value), kv.mod_revision));
        let txn = Txn::new().compare_mod_revision(key, revision).put(key, (old + amount).to_string());
        match store.txn(txn).await.unwrap() {
            TxnOutcome::Committed { revision } => return (revision, old + amount),
            TxnOutcome::Conflict { revision: seen, .. } => assert!(seen >= revision),
        }
    }
}

/// Compare-and-swap increments from many clients: every number is given out once, in the order of
/// the revisions, and a watcher sees each.
pub async fn increments_are_never_lost(store: Arc<dyn Store>) {
    let mut watch = store.watch("/counter", 0).await.unwrap();
    let tasks: Vec<_> = (0..CLIENTS)
        .map(|_| {
            let store = Arc::clone(&store);
            tokio::spawn(async move {
                let mut done = Vec::new();
                for _ in 0..ROUNDS {
                    done.push(add(store.as_ref(), "/counter", 1).await);
                }
                done
            })
        })
        .collect();
    let mut all = Vec::new();
    for task in tasks {
        let done = task.await.unwrap();
        assert!(done.is_sorted(), "a client's own increments went back: {done:?}");
        all.extend(done);
    }
    all.sort_unstable();
    let numbers: Vec<i64> = all.iter().map(|(_, number)| *number).collect();
    assert_eq!(numbers, (1..=(CLIENTS * ROUNDS) as i64).collect::<Vec<_>>());
    for (revision, expected) in all {
        let batch = next(&mut watch).await;
        let EventKind::Put(kv) = &batch.events[0].kind else { panic!("{batch:?}") };
        assert_eq!((batch.revision, number(&kv.value)), (revision, expected));
    }
}

/// Watchers that begin at different moments of a busy history all see exactly it.
pub async fn an_observer_sees_every_revision_in_order(store: Arc<dyn Store>) {
    let first = put(store.as_ref(), "/start", "").await;
    let writers: Vec<_> = (0..CLIENTS)
        .map(|client| {
            let store = Arc::clone(&store);
            tokio::spawn(async move {
                for round in 0..ROUNDS {
                    let key = format!("/k/{client}/{}", round % 3);
                    if round % 4 == 3 {
                        store.txn(Txn::new().delete(&key).put("/last", &b"x"[..])).await.unwrap();
                    } else {
                        put(store.as_ref(), &key, &round.to_string()).await;
                    }
                }
            })
        })
        .collect();
    let total = (CLIENTS * ROUNDS) as Revision;
    let watchers: Vec<_> = (0..8)
        .map(|i| {
            let store = Arc::clone(&store);
            tokio::spawn(async move {
                let from = match i % 2 {
                    0 => first,
                    _ => store.revision().await.unwrap() + 1,
                };
                if from > first + total {
                    return;
                }
                let mut watch = store.watch("/", from).await.unwrap();
                for revision in from..=first + total {
                    assert_eq!(next(&mut watch).await.revision, revision);
                }
            })
        })
        .collect();
    for task in writers.into_iter().chain(watchers) {
        task.await.unwrap();
    }
}

/// Real-time order: a read that begins after another ended never sees less, whichever call it is,
/// and always sees the writes that were answered before.
pub async fn reads_never_go_back(store: Arc<dyn Store>) {
    put(store.as_ref(), "/a", "0").await;
    let (answered, stop) = (Arc::new(AtomicI64::new(0)), Arc::new(AtomicBool::new(false)));
    let readers: Vec<_> = (0..6)
        .map(|reader| {
            let (store, answered, stop) = (Arc::clone(&store), Arc::clone(&answered), Arc::clone(&stop));
            tokio::spawn(async move {
                let mut round = reader;
                while !stop.load(Ordering::SeqCst) {
                    round += 1;
                    let floor = answered.load(Ordering::SeqCst);
                    let seen = match round % 4 {
                        0 => store.get("/a").await.unwrap().unwrap().mod_revision,
                        1 => store.range(RangeRequest::prefix("/a")).await.unwrap().revision,
                        2 => store.txn(Txn::new()).await.unwrap().revision(),
                        _ => store.revision().await.unwrap(),
                    };
                    assert!(seen >= floor, "saw revision {seen} after {floor}");
                    answered.fetch_max(seen, Ordering::SeqCst);
                }
            })
        })
        .collect();
    for i in 0..300 {
        let revision = put(store.as_ref(), "/a", &i.to_string()).await;
        answered.fetch_max(revision, Ordering::SeqCst);
    }
    stop.store(true, Ordering::SeqCst);
    for task in readers {
        task.await.unwrap();
    }
}

/// Money moves between accounts in transactions; every listing, now and in the past, has the same sum.
pub async fn transfers_keep_the_sum(store: Arc<dyn Store>) {
    const ACCOUNTS: usize = 8;
    let open = (0..ACCOUNTS).fold(Txn::new(), |txn, i| txn.put(format!("/account/{i}"), "100"));
    let opened = super::commit(store.as_ref(), open).await;
    let movers: Vec<_> = (0..CLIENTS)
        .map(|client| {
            let store = Arc::clone(&store);
            tokio::spawn(async move {
                for round in 0..ROUNDS {
                    let from = format!("/account/{}", (client * 7 + round) % ACCOUNTS);
                    let to = format!("/account/{}", (client * 3 + round * 5 + 1) % ACCOUNTS);
                    if from == to {
                        continue;
                    }
                    let (a, b) = (store.get(&from).await.unwrap().unwrap(), store.get(&to).await.unwrap().unwrap());
                    // On a conflict the transfer is given up: the sum is what matters.
                    let txn = Txn::new()
                        .compare_mod_revision(&from, a.mod_revision)
                        .compare_value(&to, b.value.clone())
                        .put(&from, (number(&a.value) - 1).to_string())
                        .put(&to, (number(&b.value) + 1).to_string());
                    store.txn(txn).await.unwrap();
                }
            })
        })
        .collect();
    let sum = |kvs: &[crate::KeyValue]| kvs.iter().map(|kv| number(&kv.value)).sum::<i64>();
    while !movers.iter().all(|task| task.is_finished()) {
        assert_eq!(sum(&list(store.as_ref(), "/account/").await.unwrap().0), 100 * ACCOUNTS as i64);
    }
    for task in movers {
        task.await.unwrap();
    }
    let newest = store.revision().await.unwrap();
    assert!(newest > opened);
    for revision in opened..=newest {
        let page = store.range(RangeRequest::prefix("/account/").at(revision)).await.unwrap();
        assert_eq!(sum(&page.kvs), 100 * ACCOUNTS as i64, "at revision {revision}");
    }
}

/// Many clients run transactions on a few keys, most of which conflict. Each answer names the
/// revision at which it was decided; there it must be true. As revisions order all transactions and
/// (see [`reads_never_go_back`]) follow real time, the history is strictly serializable.
pub async fn every_outcome_is_true_at_its_revision(store: Arc<dyn Store>) {
    const KEYS: usize = 3;
    let start = store.revision().await.unwrap();
    let clients: Vec<_> = (0..CLIENTS)
        .map(|client| {
            let store = Arc::clone(&store);
            tokio::spawn(async move {
                let mut done = Vec::new();
                for round in 0..ROUNDS {
                    let key = |offset: usize| format!("/k/{}", (client + round * 7 + offset) % KEYS);
                    let seen = store.get(&key(0)).await.unwrap();
                    let floor = store.revision().await.unwrap();
                    let txn = Txn::new().compare_mod_revision(key(0), seen.as_ref().map_or(0, |kv| kv.mod_revision));
                    let txn = match (client + round) % 4 {
                        0 => txn.compare_absent(key(1)).put(key(1), client.to_string()),
                        1 => txn.compare_exists(key(1)).delete(key(1)).put(key(2), client.to_string()),
                        2 => txn.put(key(0), client.to_string()).put(key(1), round.to_string()),
                        _ => txn.compare_exists(key(2)),
                    };
                    let outcome = store.txn(txn.clone()).await.unwrap();
                    assert!(outcome.revision() >= floor);
                    done.push((txn, outcome));
                }
                done
            })
        })
        .collect();
    let mut history = Vec::new();
    for client in clients {
        history.extend(client.await.unwrap());
    }
    let (mut committed, mut conflicts) = (0, 0);
    for (txn, outcome) in &history {
        let decided_at = match outcome {
            // A transaction that changes nothing is decided at the revision it names.
            TxnOutcome::Committed { revision } if txn.ops.is_empty() => *revision,
            TxnOutcome::Committed { revision } => revision - 1,
            TxnOutcome::Conflict { revision, .. } => *revision,
        };
        assert!(decided_at >= start);
        let state = store.range(RangeRequest::prefix("/k/").at(decided_at)).await.unwrap().kvs;
        let holds = |compare: &Compare| compare.holds(state.iter().find(|kv| kv.key == compare.key()));
        let first_failure = txn.compares.iter().position(|compare| !holds(compare));
        match outcome {
            TxnOutcome::Committed { .. } => {
                assert_eq!(first_failure, None, "{txn:?} {outcome:?} on {state:?}");
                committed += 1;
            }
            TxnOutcome::Conflict { index, .. } => {
                assert_eq!(first_failure, Some(*index), "{txn:?} {outcome:?} on {state:?}");
                conflicts += 1;
            }
        }
    }
    assert!(committed > 0 && conflicts > 0, "{committed} committed, {conflicts} conflicts");
}
