//! Random histories against a reference model.
//!
//! The model is the contract in its plainest form: a map per revision and the list of all events.

use std::collections::BTreeMap;
use std::ops::AsyncFnMut;
use std::sync::Arc;
use std::time::Duration;

use proptest::prelude::*;
use proptest::sample::{Index, select};

use super::commit;
use crate::{
    Compare, Error, Event, EventKind, KeyValue, LeaseId, Op, RangeRequest, Revision, Store, Txn, TxnOutcome,
    WatchBatch, WatchStream,
};

const KEYS: [&str; 8] = ["/a", "/a/1", "/a/2", "/a/2/x", "/a0", "/b", "/b/1", "/é"];
const PREFIXES: [&str; 7] = ["/", "/a", "/a/", "/a/2", "/b", "/none", "/é"];
const LEASE_TTL: Duration = Duration::from_secs(3600);

/// One step of a history. Numbers that depend on the history so far are drawn as an [`Index`].
#[derive(Debug, Clone)]
pub enum Step {
    /// A transaction: conditions, then changes.
    Txn(Vec<Condition>, Vec<Change>),
    /// A range; the last is the revision, if it is not the newest.
    Range(RangeRequest, Option<Index>),
    /// A point read.
    Get(&'static str),
    /// Begins a watch at a revision, which is read from later.
    Watch(&'static str, Index),
    /// Reads what a watch should have by now.
    Drain(Index),
    /// Compacts up to a revision.
    Compact(Index),
    /// Makes a lease.
    Grant,
    /// Ends a lease.
    Revoke(Index),
    /// Closes the store and opens it again, where that means something.
    Reopen,
}

/// A compare that is right or wrong at its time.
#[derive(Debug, Clone)]
pub enum Condition {
    /// The key exists.
    Exists(&'static str),
    /// The key is absent.
    Absent(&'static str),
    /// The key's value is the present one, or another.
    Value(&'static str, bool),
    /// The key's mod revision is the present one, or another.
    ModRevision(&'static str, bool),
    /// The key's create revision is the present one, or another.
    CreateRevision(&'static str, bool),
}

/// An operation.
#[derive(Debug, Clone)]
pub enum Change {
    /// A put, perhaps with one of the leases there are.
    Put(&'static str, Vec<u8>, Option<Index>),
    /// A deletion.
    Delete(&'static str),
    /// A deletion of a prefix.
    DeletePrefix(&'static str),
}

/// Histories of up to `length` steps.
pub fn histories(length: usize) -> impl Strategy<Value = Vec<Step>> {
    proptest::collection::vec(step(), 1..=length)
}

fn key() -> impl Strategy<Value = &'static str> {
    select(&KEYS[..])
}

fn prefix() -> impl Strategy<Value = &'static str> {
    select(&PREFIXES[..])
}

fn step() -> impl Strategy<Value = Step> {
    let conditions = proptest::collection::vec(condition(), 0..3);
    let changes = proptest::collection::vec(change(), 0..5);
    prop_oneof![
        12 => (conditions, changes).prop_map(|(conditions, changes)| Step::Txn(conditions, changes)),
        4 => (range(), proptest::option::of(any::<Index>())).prop_map(|(range, at)| Step::Range(range, at)),
        1 => key().prop_map(Step::Get),
        2 => (prefix(), any::<Index>()).prop_map(|(prefix, from)| Step::Watch(prefix, from)),
        2 => any::<Index>().prop_map(Step::Drain),
        1 => any::<Index>().prop_map(Step::Compact),
        1 => Just(Step::Grant),
        1 => any::<Index>().prop_map(Step::Revoke),
        1 => Just(Step::Reopen),
    ]
}

fn condition() -> impl Strategy<Value = Condition> {
    let mostly = || proptest::bool::weighted(0.85);
    prop_oneof![
        key().prop_map(Condition::Exists),
        key().prop_map(Condition::Absent),
        (key(), mostly()).prop_map(|(key, right)| Condition::Value(key, right)),
        (key(), mostly()).prop_map(|(key, right)| Condition::ModRevision(key, right)),
        (key(), mostly()).prop_map(|(key, right)| Condition::CreateRevision(key, right)),
    ]
}

fn change() -> impl Strategy<Value = Change> {
    let value = prop_oneof![
        4 => proptest::collection::vec(any::<u8>(), 0..6),
        // More than a database page.
        1 => (any::<u8>(), 4000_usize..9000).prop_map(|(byte, length)| vec![byte; length]),
    ];
    prop_oneof![
        5 => (key(), value, proptest::option::weighted(0.3, any::<Index>()))
            .prop_map(|(key, value, lease)| Change::Put(key, value, lease)),
        2 => key().prop_map(Change::Delete),
        1 => prefix().prop_map(Change::DeletePrefix),
    ]
}

fn range() -> impl Strategy<Value = RangeRequest> {
    let bounds = prop_oneof![
        prefix().prop_map(RangeRequest::prefix),
        (key(), key()).prop_map(|(start, end)| RangeRequest::between(start, end)),
    ];
    (bounds, 0_usize..5, proptest::option::of(key())).prop_map(|(mut request, limit, after)| {
        request.after = after.map(str::to_owned);
        request.limit(limit)
    })
}

/// The reference.
struct Model {
    /// Revision before the history.
    base: Revision,
    /// State at `base` + index.
    states: Vec<BTreeMap<String, KeyValue>>,
    /// Events of `base` + 1 + index.
    batches: Vec<WatchBatch>,
    compacted: Revision,
    leases: Vec<LeaseId>,
    watches: Vec<OpenWatch>,
}

struct OpenWatch {
    stream: WatchStream,
    prefix: &'static str,
    next: Revision,
}

/// Runs a history on an empty `store` and compares every answer with the model's. `reopen` closes
/// and opens the store, or gives it back as it is.
pub async fn check(
    store: Arc<dyn Store>,
    steps: Vec<Step>,
    mut reopen: impl AsyncFnMut(Arc<dyn Store>) -> Arc<dyn Store>,
) {
    let mut store = store;
    let base = store.revision().await.unwrap();
    let mut model = Model {
        base,
        states: vec![BTreeMap::new()],
        batches: Vec::new(),
        compacted: base,
        leases: Vec::new(),
        watches: Vec::new(),
    };
    store.compact(base).await.unwrap();
    for step in steps {
        match step {
            Step::Reopen => {
                model.watches.clear();
                store = reopen(store).await;
            }
            step => model.step(store.as_ref(), step).await,
        }
        assert_eq!(store.revision().await.unwrap(), model.newest());
    }
    while !model.watches.is_empty() {
        model.drain(0).await;
    }
    for at in model.compacted..=model.newest() {
        let page = store.range(RangeRequest::prefix("/").at(at)).await.unwrap();
        assert_eq!(page.kvs, model.state_at(at).values().cloned().collect::<Vec<_>>(), "at revision {at}");
    }
    let after = commit(store.as_ref(), Txn::new().put("/after", "")).await;
    assert_eq!(after, model.newest() + 1);
}

impl Model {
    fn newest(&self) -> Revision {
        self.base + self.batches.len() as Revision
    }

    fn now(&self) -> &BTreeMap<String, KeyValue> {
        self.states.last().unwrap()
    }

    fn state_at(&self, revision: Revision) -> &BTreeMap<String, KeyValue> {
        &self.states[usize::try_from(revision - self.base).unwrap()]
    }

    /// A revision that exists, existed, or just does not exist yet.
    fn pick(&self, index: Index) -> Revision {
        self.base + 1 + index.index(self.batches.len() + 2) as Revision
    }

    async fn step(&mut self, store: &dyn Store, step: Step) {
        match step {
            Step::Txn(conditions, changes) => {
                let txn = Txn {
                    compares: conditions.iter().map(|condition| self.compare(condition)).collect(),
                    ops: changes.iter().map(|change| self.op(change)).collect(),
                };
                let expected = self.txn(&txn);
                assert_eq!(store.txn(txn.clone()).await, expected, "{txn:?}");
            }
            Step::Range(mut request, at) => {
                request.at = at.map(|at| self.pick(at));
                self.range(store, request).await;
            }
            Step::Get(key) => assert_eq!(store.get(key).await.unwrap().as_ref(), self.now().get(key)),
            Step::Watch(prefix, from) => {
                let next = self.pick(from);
                match store.watch(prefix, next).await {
                    Ok(stream) => {
                        assert!(next > self.compacted);
                        self.watches.push(OpenWatch { stream, prefix, next });
                    }
                    Err(error) => {
                        assert!(next <= self.compacted);
                        assert_eq!(error, Error::Compacted { oldest: self.compacted + 1 });
                    }
                }
            }
            Step::Drain(index) => {
                if !self.watches.is_empty() {
                    self.drain(index.index(self.watches.len())).await;
                }
            }
            Step::Compact(at) => {
                let at = self.pick(at);
                let result = store.compact(at).await;
                if at > self.newest() {
                    assert_eq!(result, Err(Error::FutureRevision { requested: at, current: self.newest() }));
                } else {
                    result.unwrap();
                    self.compacted = self.compacted.max(at);
                }
            }
            Step::Grant => self.leases.push(store.lease_grant(LEASE_TTL).await.unwrap()),
            Step::Revoke(index) => {
                if !self.leases.is_empty() {
                    let id = self.leases.swap_remove(index.index(self.leases.len()));
                    let revision = store.lease_revoke(id).await.unwrap();
                    self.revoke(id);
                    assert_eq!(revision, self.newest());
                }
            }
            Step::Reopen => unreachable!("handled by the caller"),
        }
    }

    fn compare(&self, condition: &Condition) -> Compare {
        let found = |key: &str| self.now().get(key);
        match *condition {
            Condition::Exists(key) => Compare::Exists { key: key.into() },
            Condition::Absent(key) => Compare::Absent { key: key.into() },
            Condition::Value(key, right) => {
                let value = found(key).map(|kv| kv.value.clone()).unwrap_or_default();
                let equals = if right { value } else { [&value[..], b"!"].concat().into() };
                Compare::Value { key: key.into(), equals }
            }
            Condition::ModRevision(key, right) => Compare::ModRevision {
                key: key.into(),
                equals: found(key).map_or(0, |kv| kv.mod_revision) + i64::from(!right),
            },
            Condition::CreateRevision(key, right) => Compare::CreateRevision {
                key: key.into(),
                equals: found(key).map_or(0, |kv| kv.create_revision) + i64::from(!right),
            },
        }
    }

    fn op(&self, change: &Change) -> Op {
        match change {
            Change::Put(key, value, lease) => Op::Put {
                key: (*key).into(),
                value: value.clone().into(),
                lease: lease.filter(|_| !self.leases.is_empty()).map(|lease| *lease.get(&self.leases)),
            },
            Change::Delete(key) => Op::Delete { key: (*key).into() },
            Change::DeletePrefix(prefix) => Op::DeletePrefix { prefix: (*prefix).into() },
        }
    }

    /// What the contract says of a transaction, which is applied if it commits.
    fn txn(&mut self, txn: &Txn) -> crate::Result<TxnOutcome> {
        let mut puts: Vec<&str> = Vec::new();
        for op in &txn.ops {
            if let Op::Put { key, .. } = op {
                if puts.contains(&key.as_str()) {
                    return Err(Error::DuplicateKey { key: key.clone() });
                }
                puts.push(key);
            }
        }
        for op in &txn.ops {
            let clashes = puts.iter().filter(|put| match op {
                Op::Put { .. } => false,
                Op::Delete { key } => key == *put,
                Op::DeletePrefix { prefix } => put.starts_with(prefix.as_str()),
            });
            if let Some(key) = clashes.min() {
                return Err(Error::DuplicateKey { key: (*key).to_owned() });
            }
        }
        let revision = self.newest();
        for (index, compare) in txn.compares.iter().enumerate() {
            let found = self.now().get(compare.key());
            let holds = match compare {
                Compare::Exists { .. } => found.is_some(),
                Compare::Absent { .. } => found.is_none(),
                Compare::Value { equals, .. } => found.map(|kv| &kv.value) == Some(equals),
                Compare::ModRevision { equals, .. } => found.map_or(0, |kv| kv.mod_revision) == *equals,
                Compare::CreateRevision { equals, .. } => found.map_or(0, |kv| kv.create_revision) == *equals,
            };
            if !holds {
                return Ok(TxnOutcome::Conflict { index, revision });
            }
        }
        let mut state = self.now().clone();
        let mut events = Vec::new();
        for op in &txn.ops {
            match op {
                Op::Put { key, value, lease } => {
                    let prev = state.get(key).cloned();
                    let kv = KeyValue {
                        key: key.clone(),
                        value: value.clone(),
                        create_revision: prev.as_ref().map_or(revision + 1, |kv| kv.create_revision),
                        mod_revision: revision + 1,
                        version: prev.as_ref().map_or(0, |kv| kv.version) + 1,
                        lease: *lease,
                    };
                    state.insert(key.clone(), kv.clone());
                    events.push(Event { revision: revision + 1, kind: EventKind::Put(kv), prev });
                }
                Op::Delete { key } => remove(&mut state, &mut events, revision + 1, |kv| kv.key == *key),
                Op::DeletePrefix { prefix } => {
                    remove(&mut state, &mut events, revision + 1, |kv| kv.key.starts_with(prefix.as_str()));
                }
            }
        }
        self.seal(state, events);
        Ok(TxnOutcome::Committed { revision: self.newest() })
    }

    fn revoke(&mut self, id: LeaseId) {
        let (mut state, mut events) = (self.now().clone(), Vec::new());
        remove(&mut state, &mut events, self.newest() + 1, |kv| kv.lease == Some(id));
        self.seal(state, events);
    }

    fn seal(&mut self, state: BTreeMap<String, KeyValue>, events: Vec<Event>) {
        if !events.is_empty() {
            self.states.push(state);
            self.batches.push(WatchBatch { revision: self.newest() + 1, events });
        }
    }

    async fn range(&self, store: &dyn Store, request: RangeRequest) {
        let at = request.at.unwrap_or(self.newest());
        let result = store.range(request.clone()).await;
        if at > self.newest() {
            assert_eq!(result, Err(Error::FutureRevision { requested: at, current: self.newest() }));
            return;
        }
        if at < self.compacted {
            assert_eq!(result, Err(Error::Compacted { oldest: self.compacted }));
            return;
        }
        let within = |key: &str| {
            request.start.as_str() <= key
                && request.end.as_deref().is_none_or(|end| key < end)
                && request.after.as_deref().is_none_or(|after| key > after)
        };
        let mut kvs: Vec<KeyValue> = self.state_at(at).values().filter(|kv| within(&kv.key)).cloned().collect();
        let limit = if request.limit == 0 { usize::MAX } else { request.limit };
        let more = kvs.len() > limit;
        kvs.truncate(limit);
        let page = result.unwrap();
        assert_eq!((page.kvs, page.more, page.revision), (kvs, more, at), "{request:?}");
    }

    /// Reads from a watch all it should have by now. One that compaction overtook may end instead.
    async fn drain(&mut self, index: usize) {
        let mut watch = self.watches.swap_remove(index);
        for batch in &self.batches {
            let events: Vec<Event> =
                batch.events.iter().filter(|event| event.key().starts_with(watch.prefix)).cloned().collect();
            if batch.revision < watch.next || events.is_empty() {
                continue;
            }
            match watch.stream.next().await.unwrap() {
                Ok(seen) => assert_eq!(seen, WatchBatch { revision: batch.revision, events }),
                Err(error) => {
                    assert!(watch.next <= self.compacted, "{error} at {}", watch.next);
                    assert_eq!(error, Error::Compacted { oldest: self.compacted + 1 });
                    assert!(watch.stream.next().await.is_none());
                    return;
                }
            }
            watch.next = batch.revision + 1;
        }
        let rest = futures::poll!(std::pin::pin!(watch.stream.next()));
        match rest {
            std::task::Poll::Pending => {}
            std::task::Poll::Ready(Some(Err(Error::Compacted { .. }))) if watch.next <= self.compacted => {}
            std::task::Poll::Ready(extra) => panic!("{extra:?} after all events of {:?}", watch.prefix),
        }
    }
}

/// Deletes the keys that match, in order.
fn remove(
    state: &mut BTreeMap<String, KeyValue>,
    events: &mut Vec<Event>,
    revision: Revision,
    matches: impl Fn(&KeyValue) -> bool,
) {
    let keys: Vec<String> = state.values().filter(|kv| matches(kv)).map(|kv| kv.key.clone()).collect();
    for key in keys {
        let prev = state.remove(&key);
        events.push(Event { revision, kind: EventKind::Delete { key }, prev });
    }
}
