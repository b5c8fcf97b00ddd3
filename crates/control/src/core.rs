//! What all parts of the control plane share: the store behind its leader guard, the tables, the scheduler's books, sessions.

use std::collections::{BTreeSet, HashMap};
use std::sync::Arc;
use std::time::Duration;

use hearth_store::{Bytes, Leadership, Revision, Store, Txn, TxnOutcome};
use hearth_types::Catalogue;
use parking_lot::{Mutex, MutexGuard, RwLock, RwLockReadGuard};
use prost::Message;
use tokio::sync::{Notify, Semaphore, broadcast, watch};
use tokio_util::sync::CancellationToken;
use tokio_util::task::TaskTracker;

use crate::api_error::{ApiError, ApiResult};
use crate::clock;
use crate::config::ControlConfig;
use crate::console::Consoles;
use crate::error::ControlError;
use crate::live::Live;
use crate::pki::Pki;
use crate::placement::Placement;
use crate::service::fast_restore::Fills;
use crate::service::idempotency::TokenLocks;
use crate::service::import::seats::Seats;
use crate::service::task::Jobs;
use crate::storage::Storage;
use crate::tables::{Tables, Touched};
use crate::transfers::Transfers;

/// Longest wait for the tables to show a write that the store has answered.
const APPLY_TIMEOUT: Duration = Duration::from_secs(30);
/// Change notes kept for slow watchers; one that falls behind looks at everything again.
const CHANGE_QUEUE: usize = 1024;
/// Attempts of a read-change-write before the call gives up.
const MAX_ATTEMPTS: u32 = 20;

/// How a transaction ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Commit {
    /// It is durable and the tables show it.
    Done,
    /// The compare of this index did not hold; the tables show why.
    Conflict(usize),
}

/// See the module.
pub(crate) struct Core {
    pub config: ControlConfig,
    pub catalogue: Catalogue,
    pub pki: Pki,
    pub live: Live,
    /// What hosts have of snapshots that they are to have whole.
    pub fills: Fills,
    pub consoles: Consoles,
    pub token_locks: TokenLocks,
    pub storage: Storage,
    /// One permit for each transfer that may go on.
    pub imports: Arc<Semaphore>,
    pub transfers: Transfers,
    pub uploads: Seats,
    pub jobs: Jobs,
    /// Work that goes on by itself; the end waits for it.
    pub tasks: TaskTracker,
    /// Lets the reconcilers run now.
    pub reconcile: Notify,
    /// Cancelled when this control plane must stop acting.
    pub stop: CancellationToken,
    /// Cancelled when the tables are fed no more.
    blind: CancellationToken,
    store: Arc<dyn Store>,
    /// The newest term.
    leadership: watch::Sender<Leadership>,
    /// Highest term that a write has found to be over.
    over: watch::Sender<Revision>,
    tables: RwLock<Tables>,
    /// Locked after `tables`, never before.
    placement: Mutex<Placement>,
    applied: watch::Sender<Revision>,
    changes: broadcast::Sender<Arc<Touched>>,
    fatal: Mutex<Option<ControlError>>,
}

impl Core {
    #[expect(clippy::too_many_arguments, reason = "called once")]
    pub fn new(
        config: ControlConfig,
        catalogue: Catalogue,
        pki: Pki,
        storage: Storage,
        store: Arc<dyn Store>,
        leadership: Leadership,
        tables: Tables,
        revision: Revision,
        stop: CancellationToken,
    ) -> Self {
        let live = Live::new(config.host_timeout);
        let mut placement = Placement::new();
        let long_ago = clock::now_ms().saturating_sub(clock::as_ms(config.host_timeout));
        for (host, entry) in &tables.hosts {
            // What was connected when the last control plane ended gets time to come back, what was not does not.
            if entry.status.as_ref().is_none_or(|status| !status.connected && status.last_seen_ms < long_ago) {
                live.gone_before(host);
            }
            placement.sync_host(&tables, host, live.is_up(host));
        }
        for instance in tables.instances.keys() {
            placement.sync_instance(&tables, instance);
        }
        let imports = Arc::new(Semaphore::new(config.max_concurrent_imports));
        let (most, most_of_account) = (config.max_concurrent_imports, config.max_transfers_per_account);
        Self {
            transfers: Transfers::new(imports.clone(), most, most_of_account),
            imports,
            uploads: Seats::default(),
            consoles: Consoles::default(),
            token_locks: TokenLocks::default(),
            jobs: Jobs::default(),
            tasks: TaskTracker::new(),
            reconcile: Notify::new(),
            live,
            fills: Fills::default(),
            config,
            catalogue,
            pki,
            storage,
            store,
            over: watch::Sender::new(0),
            leadership: watch::Sender::new(leadership),
            stop,
            blind: CancellationToken::new(),
            tables: RwLock::new(tables),
            placement: Mutex::new(placement),
            applied: watch::Sender::new(revision),
            changes: broadcast::Sender::new(CHANGE_QUEUE),
            fatal: Mutex::new(None),
        }
    }

    pub fn tables(&self) -> RwLockReadGuard<'_, Tables> {
        self.tables.read()
    }

    /// The books, for who holds the tables already.
    pub fn placement(&self, _tables: &Tables) -> MutexGuard<'_, Placement> {
        self.placement.lock()
    }

    /// Works on the books with the tables they must agree with.
    pub fn with_placement<T>(&self, work: impl FnOnce(&Tables, &mut Placement) -> T) -> T {
        let tables = self.tables.read();
        let mut placement = self.placement.lock();
        work(&tables, &mut placement)
    }

    pub fn term(&self) -> u64 {
        u64::try_from(self.leadership.borrow().term).unwrap_or(0)
    }

    pub fn changes(&self) -> broadcast::Receiver<Arc<Touched>> {
        self.changes.subscribe()
    }

    /// Commits as leader, then waits until the tables show the outcome, so that the caller reads its own write (or, after a
    /// conflict, what it lost against). When the term turns out to be over, it waits for the next one and tries again: there
    /// is one only if nobody else has led in between, so what the transaction was made from still holds.
    pub async fn commit(&self, txn: Txn) -> ApiResult<Commit> {
        let mut leading = self.leadership.subscribe();
        loop {
            let leadership = leading.borrow_and_update().clone();
            let outcome = match self.store.txn(txn.clone().guard(&leadership)).await {
                Ok(outcome) => outcome,
                Err(error) => {
                    use hearth_store::Error as E;
                    if matches!(error, E::WritesStopped { .. } | E::Closed) {
                        self.die(ControlError::Store(error.clone()));
                    }
                    return Err(error.into());
                }
            };
            match outcome {
                TxnOutcome::Conflict { index: 0, .. } => {
                    self.over.send_if_modified(|over| std::mem::replace(over, leadership.term.max(*over)) < *over);
                    self.wait_for_term(&mut leading).await?;
                }
                TxnOutcome::Conflict { index, revision } => {
                    self.wait_applied(revision).await?;
                    return Ok(Commit::Conflict(index - 1));
                }
                TxnOutcome::Committed { revision } => {
                    self.wait_applied(revision).await?;
                    return Ok(Commit::Done);
                }
            }
        }
    }

    /// Waits until this control plane has a new term.
    async fn wait_for_term(&self, leading: &mut watch::Receiver<Leadership>) -> ApiResult<()> {
        tokio::select! {
            biased;
            // The sender lives as long as `self`.
            _ = leading.changed() => Ok(()),
            () = self.stop.cancelled() => Err(ApiError::unavailable("this control plane is ending")),
            () = tokio::time::sleep(APPLY_TIMEOUT) => Err(ApiError::unavailable("this control plane does not lead now; try again")),
        }
    }

    /// Reads tables, makes a transaction and commits it, again from the start when somebody else was faster. `prepare` answers
    /// `Err` to give up, `Ok((None, result))` when there is nothing to write.
    pub async fn update<T>(&self, mut prepare: impl FnMut(&Tables) -> ApiResult<(Option<Txn>, T)>) -> ApiResult<T> {
        for _ in 0..MAX_ATTEMPTS {
            let (txn, result) = prepare(&self.tables())?;
            let Some(txn) = txn else { return Ok(result) };
            if self.commit(txn).await? == Commit::Done {
                return Ok(result);
            }
        }
        Err(ApiError::unavailable("too many changes at the same time; try again"))
    }

    async fn wait_applied(&self, revision: Revision) -> ApiResult<()> {
        let mut applied = self.applied.subscribe();
        tokio::select! {
            biased;
            shown = tokio::time::timeout(APPLY_TIMEOUT, applied.wait_for(|seen| *seen >= revision)) => {
                if matches!(shown, Ok(Ok(_))) {
                    return Ok(());
                }
            }
            () = self.blind.cancelled() => {}
        }
        Err(ApiError::unavailable("the write is durable but cannot be shown yet"))
    }

    /// Feeds the tables until the store ends the watch. Calls that still run at a shutdown need it too, so it goes on to the end.
    pub async fn follow(&self) -> ControlError {
        let _blind = self.blind.clone().drop_guard();
        self.feed().await.err().unwrap_or(ControlError::Stopped("the store's watch"))
    }

    async fn feed(&self) -> Result<(), ControlError> {
        let from = *self.applied.borrow();
        let mut watch = self.store.watch("/", from + 1).await?;
        while let Some(batch) = watch.next().await {
            let batch = batch?;
            let mut touched = Touched::default();
            {
                let mut tables = self.tables.write();
                tables.apply(&batch.events, &mut touched)?;
                let mut placement = self.placement.lock();
                for host in &touched.hosts {
                    placement.sync_host(&tables, host, self.live.is_up(host));
                }
                for instance in &touched.instances {
                    placement.sync_instance(&tables, instance);
                }
            }
            self.applied.send_replace(batch.revision);
            self.announce(touched);
        }
        Ok(())
    }

    /// Tells sessions, watchers and reconcilers that something changed.
    pub fn announce(&self, touched: Touched) {
        for host in &touched.hosts {
            self.live.kick(host);
        }
        let seen = [&touched.instances, &touched.hosts, &touched.volumes, &touched.snapshots];
        if seen.iter().any(|ids| !ids.is_empty()) {
            // No receiver is no error.
            let _ = self.changes.send(Arc::new(touched));
        }
        self.reconcile.notify_one();
    }

    /// Tells watchers of an instance that what is seen of it changed, without any record having changed.
    pub fn announce_view(&self, instance: &str) {
        let touched = Touched { instances: [instance.to_owned()].into(), ..Touched::default() };
        // No receiver is no error.
        let _ = self.changes.send(Arc::new(touched));
    }

    /// The same for a snapshot.
    pub fn announce_snapshot(&self, snapshot: &str) {
        let touched = Touched { snapshots: [snapshot.to_owned()].into(), ..Touched::default() };
        // No receiver is no error.
        let _ = self.changes.send(Arc::new(touched));
    }

    /// The same for a volume.
    pub fn announce_volume(&self, volume: &str) {
        let touched = Touched { volumes: [volume.to_owned()].into(), ..Touched::default() };
        // No receiver is no error.
        let _ = self.changes.send(Arc::new(touched));
    }

    /// A host's session came or went: new placements, status checks and watchers follow.
    pub fn host_changed(&self, host: &str) {
        let (instances, volumes) = self.with_placement(|tables, placement| {
            placement.sync_host(tables, host, self.live.is_up(host));
            let here = |of_hosts: &HashMap<String, BTreeSet<String>>| of_hosts.get(host).cloned().unwrap_or_default();
            (here(&tables.instances_on), here(&tables.volumes_on))
        });
        self.announce(Touched { instances, volumes, hosts: [host.to_owned()].into(), ..Touched::default() });
    }

    /// Keeps the lease, and takes it again when a stall has cost it, until another control plane leads. Nothing needs to be
    /// rebuilt for a new term: the tables follow the store whoever leads, and the books with them; sessions send the newest
    /// term with every message; calls try again ([`Self::commit`]).
    pub async fn hold_leadership(&self) -> ControlError {
        let store = self.store.as_ref();
        let mut over = self.over.subscribe();
        loop {
            let leadership = self.leadership.borrow().clone();
            let term = leadership.term;
            tokio::select! {
                lost = leadership.hold(store) => tracing::warn!(term, %lost, "the term is over"),
                _ = over.wait_for(|over| *over >= term) => tracing::warn!(term, "the term is over: a write was refused"),
            }
            match leadership.retake(store).await {
                Ok(new) => {
                    tracing::info!(
                        term = new.term,
                        before = term,
                        name = new.name,
                        "leads again; nobody else has led since"
                    );
                    self.leadership.send_replace(new);
                    self.reconcile.notify_one();
                }
                Err(error) => return ControlError::Store(error),
            }
        }
    }

    /// Lets another control plane take over at once.
    pub async fn resign(&self) {
        let leadership = self.leadership.borrow().clone();
        if let Err(error) = leadership.resign(self.store.as_ref()).await {
            tracing::debug!(%error, "leadership could not be given up; its lease will expire");
        }
    }

    /// Stops everything with this error; the first one counts.
    pub fn die(&self, error: ControlError) {
        let mut fatal = self.fatal.lock();
        if fatal.is_none() {
            tracing::error!(%error, "the control plane stops");
            *fatal = Some(error);
        }
        self.stop.cancel();
    }

    /// Why it stopped, if not because it was told to.
    pub fn take_fatal(&self) -> Option<ControlError> {
        self.fatal.lock().take()
    }
}

/// A record as the store keeps it.
pub(crate) fn encode(record: &impl Message) -> Bytes {
    record.encode_to_vec().into()
}

/// An id as value of a key that only makes something unique.
pub(crate) fn id_value(id: &str) -> Bytes {
    Bytes::copy_from_slice(id.as_bytes())
}
