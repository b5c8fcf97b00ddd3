//! The leader's lease runs out although the control plane goes on.

use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use async_trait::async_trait;
use hearth_control::ControlError;
use hearth_proto::v1;
use hearth_store::leader::{self, LEADER_KEY};
use hearth_store::sqlite::SqliteStore;
use hearth_store::{
    Error, KeyValue, LeaseId, LeaseInfo, RangeRequest, RangeResponse, Result, Revision, Store, Txn, TxnOutcome,
    WatchStream, limits,
};
use v1::InstanceState as S;

use crate::agent::FakeAgent;
use crate::cloud::{Cloud, PATIENCE, config, request};

/// A store whose keep-alives arrive too late while it is stalled.
struct Stalling {
    inner: SqliteStore,
    stalled: AtomicBool,
}

#[async_trait]
impl Store for Stalling {
    async fn get(&self, key: &str) -> Result<Option<KeyValue>> {
        self.inner.get(key).await
    }
    async fn range(&self, request: RangeRequest) -> Result<RangeResponse> {
        self.inner.range(request).await
    }
    async fn txn(&self, txn: Txn) -> Result<TxnOutcome> {
        self.inner.txn(txn).await
    }
    async fn watch(&self, prefix: &str, from: Revision) -> Result<WatchStream> {
        self.inner.watch(prefix, from).await
    }
    async fn lease_grant(&self, ttl: Duration) -> Result<LeaseId> {
        self.inner.lease_grant(ttl).await
    }
    async fn lease_keep_alive(&self, id: LeaseId) -> Result<Duration> {
        while self.stalled.load(Ordering::SeqCst) {
            tokio::time::sleep(Duration::from_millis(10)).await;
        }
        self.inner.lease_keep_alive(id).await
    }
    async fn lease_revoke(&self, id: LeaseId) -> Result<Revision> {
        self.inner.lease_revoke(id).await
    }
    async fn lease_info(&self, id: LeaseId) -> Result<LeaseInfo> {
        self.inner.lease_info(id).await
    }
    async fn compact(&self, at: Revision) -> Result<()> {
        self.inner.compact(at).await
    }
    async fn revision(&self) -> Result<Revision> {
        self.inner.revision().await
    }
    async fn backup(&self, path: &Path) -> Result<Revision> {
        self.inner.backup(path).await
    }
}

impl Stalling {
    fn new() -> Arc<Self> {
        Arc::new(Self { inner: SqliteStore::open_temporary().unwrap(), stalled: AtomicBool::new(false) })
    }

    async fn leader(&self) -> KeyValue {
        self.inner.get(LEADER_KEY).await.unwrap().expect("somebody leads")
    }

    /// Ends the leader's term as an expiry does.
    async fn expire(&self) {
        let lease = self.leader().await.lease.unwrap();
        self.inner.lease_revoke(lease).await.unwrap();
    }

    /// Waits until somebody leads in a later term.
    async fn later_term(&self, than: Revision) -> Revision {
        let waiting = tokio::time::timeout(PATIENCE, async {
            loop {
                match self.inner.get(LEADER_KEY).await.unwrap() {
                    Some(kv) if kv.create_revision > than => return kv.create_revision,
                    _ => tokio::time::sleep(Duration::from_millis(10)).await,
                }
            }
        });
        waiting.await.expect("nobody leads again")
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_stalled_leader_leads_again_and_no_call_fails() {
    let dir = tempfile::tempdir().unwrap();
    let store = Stalling::new();
    let mut settings = config(dir.path());
    settings.leader_ttl = limits::MIN_LEASE_TTL;
    let cloud = Cloud::start_on(settings, store.clone()).await.unwrap();
    let (agent, _session) = FakeAgent::connected(&cloud, "host-a").await;
    let mut user = cloud.user().await;
    let image = user.import("debian").await;
    let id = user.run(request(&image, "t3.nano")).await.unwrap().instances[0].instance_id.clone();
    user.wait_state(&id, S::Running).await;

    let first = store.leader().await.create_revision;
    store.stalled.store(true, Ordering::SeqCst);
    let second = store.later_term(first).await;
    store.stalled.store(false, Ordering::SeqCst);
    // The session goes on, and brings the new term.
    user.stop(&id).await.unwrap();
    user.wait_state(&id, S::Stopped).await;
    assert!(agent.memory.lock().highest_term >= u64::try_from(second).unwrap());

    // Terms end under calls that are on their way; each is done once.
    let calls = (0..40).map(|_| {
        let (mut user, request) = (user.clone(), request(&image, "t3.nano"));
        tokio::spawn(async move { user.run(request).await.unwrap() })
    });
    let calls: Vec<_> = calls.collect();
    let mut term = store.leader().await.create_revision;
    for _ in 0..5 {
        store.expire().await;
        term = store.later_term(term).await;
    }
    for call in calls {
        call.await.unwrap();
    }
    for instance in user.list().await.iter().filter(|instance| instance.instance_id != id) {
        user.wait_state(&instance.instance_id, S::Running).await;
    }
    assert_eq!(user.list().await.len(), 41);
    assert_eq!(user.host(&agent.host_id).await.allocated.unwrap().vcpus, 40, "the books are right");
    cloud.stop().await.unwrap();
    assert!(store.inner.get(LEADER_KEY).await.unwrap().is_none(), "leadership is given up at the end");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_leader_ends_when_another_leads() {
    let dir = tempfile::tempdir().unwrap();
    let store = Stalling::new();
    let cloud = Cloud::start_on(config(dir.path()), store.clone()).await.unwrap();
    let user = cloud.user().await;
    store.expire().await;
    // The control plane notices at its next write only.
    let other = leader::campaign(&store.inner, "other", Duration::from_secs(3600)).await.unwrap();
    let create = v1::CreateAccountRequest { name: "team".into(), is_operator: false };
    let mut accounts = user.accounts.clone();
    let error = accounts.create_account(create).await.unwrap_err();
    assert_eq!(error.code(), tonic::Code::Unavailable, "{error}");
    let ended = cloud.ended().await.unwrap_err();
    assert!(matches!(&ended, ControlError::Store(Error::LeadershipLost { .. })), "{ended}");
    assert!(ended.to_string().contains("'other' leads now"), "{ended}");
    assert_eq!(store.leader().await.create_revision, other.term);
}
