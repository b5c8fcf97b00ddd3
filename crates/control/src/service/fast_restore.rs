//! Fast snapshot restore: hosts that have all content of a snapshot before anybody asks for it. Unlike EC2's it costs no credits
//! and can be had for single hosts.
//! Source: <https://docs.aws.amazon.com/ebs/latest/userguide/ebs-fast-snapshot-restore.html>

use std::borrow::Cow;
use std::collections::{BTreeMap, HashMap};

use hearth_proto::record::v1 as rec;
use hearth_proto::v1;
use hearth_store::Txn;
use parking_lot::Mutex;

use super::{Api, host, snapshot};
use crate::api_error::{ApiError, ApiResult};
use crate::auth::Caller;
use crate::check;
use crate::clock;
use crate::core::encode;
use crate::keys;
use crate::listing::Listing;
use crate::tables::Tables;

/// EC2's limit of snapshots of one account and region.
const MAX_SNAPSHOTS: usize = 5;
const FILTERS: [&str; 3] = ["snapshot-id", "state", "availability-zone"];

/// What connected hosts have said, by host and snapshot. Learned anew after a restart.
#[derive(Default)]
pub(crate) struct Fills(Mutex<HashMap<String, HashMap<String, v1::FillReport>>>);

impl Fills {
    pub fn report(&self, host: &str, report: v1::FillReport) {
        self.0.lock().entry(host.to_owned()).or_default().insert(report.snapshot_id.clone(), report);
    }

    /// Before the host says everything anew.
    pub fn forget(&self, host: &str) {
        self.0.lock().remove(host);
    }

    fn get(&self, host: &str, snapshot: &str) -> Option<v1::FillReport> {
        self.0.lock().get(host)?.get(snapshot).cloned()
    }
}

fn zone_of<'a>(tables: &'a Tables, host: &str) -> &'a str {
    let status = tables.hosts.get(host).and_then(|entry| entry.status.as_ref());
    status.map_or("", |status| status.availability_zone.as_str())
}

/// Why a host is to have a snapshot.
fn wish<'a>(tables: &Tables, spec: &'a rec::SnapshotSpec, host: &str) -> Option<&'a rec::FastRestore> {
    let zone = zone_of(tables, host);
    spec.fast_restores.iter().find(|wish| match wish.host_id.as_str() {
        "" => wish.availability_zone == zone,
        id => id == host,
    })
}

/// What a host is to have.
pub(crate) fn desired(tables: &Tables, host: &str) -> Vec<v1::BaseSnapshot> {
    let mut wanted = Vec::new();
    for (id, entry) in &tables.snapshots {
        let Some(spec) = entry.spec.as_ref().filter(|spec| !spec.deleted && wish(tables, spec, host).is_some()) else {
            continue;
        };
        // It was complete when this was asked for.
        if let Ok(source) = snapshot::find_completed(tables, &spec.account_id, id) {
            wanted.push(source.base());
        }
    }
    wanted
}

/// Whether a host has a wish for this snapshot.
pub(crate) fn is_wanted(tables: &Tables, host: &str, snapshot: &str) -> bool {
    tables.snapshot(snapshot).is_some_and(|(spec, _)| wish(tables, &spec, host).is_some())
}

/// What tells it from others of the list, in its order.
fn place_of(one: &v1::FastSnapshotRestore) -> String {
    format!("{}/{}/{}", one.snapshot_id, one.host_id, one.availability_zone)
}

fn filter_values<'a>(one: &'a v1::FastSnapshotRestore, name: &str) -> Vec<Cow<'a, str>> {
    use v1::FastSnapshotRestoreState::{Enabled, Enabling, Optimizing, Unspecified};
    vec![match name {
        "snapshot-id" => one.snapshot_id.as_str().into(),
        "availability-zone" => one.availability_zone.as_str().into(),
        _ => match one.state() {
            Enabled => "enabled".into(),
            Optimizing => "optimizing".into(),
            Enabling | Unspecified => "enabling".into(),
        },
    }]
}

/// Only operators know hosts.
fn check_may_name_hosts(caller: &Caller, hosts: &[String]) -> ApiResult<()> {
    match hosts.is_empty() || caller.is_operator {
        true => Ok(()),
        false => Err(ApiError::unauthorized("only operator accounts may name hosts; name availability zones")),
    }
}

/// What accounts see that may not know hosts: all of a zone together.
fn by_zone(of_hosts: Vec<v1::FastSnapshotRestore>) -> Vec<v1::FastSnapshotRestore> {
    use v1::FastSnapshotRestoreState::{Enabled, Enabling, Optimizing};
    let mut zones: BTreeMap<(String, String), Vec<v1::FastSnapshotRestore>> = BTreeMap::new();
    for one in of_hosts {
        zones.entry((one.snapshot_id.clone(), one.availability_zone.clone())).or_default().push(one);
    }
    let zone = |((snapshot_id, availability_zone), of_hosts): ((String, String), Vec<v1::FastSnapshotRestore>)| {
        let hosts = u32::try_from(of_hosts.len()).unwrap_or(u32::MAX);
        let state = match () {
            () if of_hosts.iter().all(|one| one.state() == Enabled) => Enabled,
            () if of_hosts.iter().all(|one| one.state() == Enabling) => Enabling,
            () => Optimizing,
        };
        let waits = of_hosts.iter().any(|one| !one.reason.is_empty());
        v1::FastSnapshotRestore {
            snapshot_id,
            availability_zone,
            state: state.into(),
            progress: of_hosts.iter().map(|one| one.progress).sum::<u32>().checked_div(hosts).unwrap_or(0),
            // The host's own words may name what is its operator's alone.
            reason: if waits { "a host cannot fetch it now; it is tried again".to_owned() } else { String::new() },
            enabling_time: of_hosts.iter().map(|one| one.enabling_time.clone()).min().unwrap_or_default(),
            hosts,
            enabled_hosts: of_hosts.iter().map(|one| one.enabled_hosts).sum(),
            ..Default::default()
        }
    };
    zones.into_iter().map(zone).collect()
}

impl Api {
    fn fast_restores(&self, tables: &Tables, caller: &Caller, ids: &[String]) -> Vec<v1::FastSnapshotRestore> {
        let account = caller.account_id.as_str();
        let mut found = Vec::new();
        for (id, entry) in &tables.snapshots {
            let Some(spec) = entry.spec.as_ref().filter(|spec| spec.account_id == account && !spec.deleted) else {
                continue;
            };
            if !ids.is_empty() && !ids.contains(id) {
                continue;
            }
            for host in tables.hosts.keys() {
                if let Some(wish) = wish(tables, spec, host) {
                    found.push(self.fast_restore(tables, id, host, wish));
                }
            }
        }
        found.sort_by(|a, b| (&a.snapshot_id, &a.host_id).cmp(&(&b.snapshot_id, &b.host_id)));
        if caller.is_operator { found } else { by_zone(found) }
    }

    fn fast_restore(&self, tables: &Tables, id: &str, host: &str, wish: &rec::FastRestore) -> v1::FastSnapshotRestore {
        let said = Some(()).filter(|()| self.core.live.connected(host)).and_then(|()| self.core.fills.get(host, id));
        let (state, progress) = match &said {
            None => (v1::FastSnapshotRestoreState::Enabling, 0),
            Some(said) if said.present_chunks >= said.total_chunks && said.error.is_empty() => {
                (v1::FastSnapshotRestoreState::Enabled, 100)
            }
            Some(said) => {
                let percent = u128::from(said.present_chunks) * 100 / u128::from(said.total_chunks.max(1));
                (v1::FastSnapshotRestoreState::Optimizing, u32::try_from(percent.min(100)).unwrap_or(100))
            }
        };
        let spec = tables.host(host).map(|(spec, _)| spec);
        v1::FastSnapshotRestore {
            snapshot_id: id.to_owned(),
            host_id: host.to_owned(),
            host_name: spec.map(|spec| spec.name.clone()).unwrap_or_default(),
            availability_zone: zone_of(tables, host).to_owned(),
            state: state.into(),
            progress,
            reason: said.map(|said| said.error).unwrap_or_default(),
            enabling_time: clock::rfc3339(wish.enabled_ms),
            hosts: 1,
            enabled_hosts: u32::from(state == v1::FastSnapshotRestoreState::Enabled),
        }
    }

    /// Wishes for each zone and host that is named.
    fn wishes(&self, tables: &Tables, zones: &[String], hosts: &[String]) -> ApiResult<Vec<rec::FastRestore>> {
        let enabled_ms = clock::now_ms();
        let mut wishes = Vec::new();
        for zone in zones {
            let availability_zone = crate::storage::zone(tables, zone)?;
            wishes.push(rec::FastRestore { availability_zone, host_id: String::new(), enabled_ms });
        }
        for name in hosts {
            let host_id = host::find(tables, name)?.host_id.clone();
            wishes.push(rec::FastRestore { availability_zone: String::new(), host_id, enabled_ms });
        }
        Ok(wishes)
    }

    async fn change_fast_restores(
        &self,
        account: &str,
        ids: &[String],
        change: impl Fn(&Tables, &mut Vec<rec::FastRestore>) -> ApiResult<()>,
    ) -> ApiResult<()> {
        let hosts = self
            .core
            .update(|tables| {
                let mut txn = Txn::new();
                for id in ids {
                    // Only what is complete can be had.
                    snapshot::find_completed(tables, account, id)?;
                    let (spec, _) = snapshot::find(tables, account, id)?;
                    let mut new = (*spec.value).clone();
                    change(tables, &mut new.fast_restores)?;
                    let key = keys::snapshot_spec(account, id);
                    txn = txn.compare_mod_revision(&key, spec.revision).put(&key, encode(&new));
                }
                Ok((Some(txn), tables.hosts.keys().cloned().collect::<Vec<String>>()))
            })
            .await?;
        hosts.iter().for_each(|host| self.core.live.kick(host));
        Ok(())
    }

    pub(crate) async fn do_enable_fast_restores(
        &self,
        caller: &Caller,
        request: v1::EnableFastSnapshotRestoresRequest,
    ) -> ApiResult<v1::EnableFastSnapshotRestoresResponse> {
        let account = caller.account_id.as_str();
        check_may_name_hosts(caller, &request.hosts)?;
        let ids = check::ids("snapshot_ids", &request.snapshot_ids)?;
        if request.availability_zones.is_empty() && request.hosts.is_empty() {
            return Err(ApiError::missing("availability_zones or hosts"));
        }
        self.change_fast_restores(account, &ids, |tables, known| {
            let others = tables.snapshots.iter().filter(|(id, entry)| {
                let with = |spec: &rec::SnapshotSpec| {
                    spec.account_id == account && !spec.deleted && !spec.fast_restores.is_empty()
                };
                !ids.contains(id) && entry.spec.as_deref().is_some_and(with)
            });
            if others.count() + ids.len() > MAX_SNAPSHOTS {
                let message = format!("fast restore is for at most {MAX_SNAPSHOTS} snapshots of an account");
                return Err(ApiError::exhausted("FastSnapshotRestoreLimitExceeded", message));
            }
            for wish in self.wishes(tables, &request.availability_zones, &request.hosts)? {
                let same = |other: &rec::FastRestore| {
                    (&other.availability_zone, &other.host_id) == (&wish.availability_zone, &wish.host_id)
                };
                if !known.iter().any(same) {
                    known.push(wish);
                }
            }
            Ok(())
        })
        .await?;
        let tables = self.core.tables();
        Ok(v1::EnableFastSnapshotRestoresResponse { fast_snapshot_restores: self.fast_restores(&tables, caller, &ids) })
    }

    pub(crate) async fn do_disable_fast_restores(
        &self,
        caller: &Caller,
        request: v1::DisableFastSnapshotRestoresRequest,
    ) -> ApiResult<()> {
        check_may_name_hosts(caller, &request.hosts)?;
        let ids = check::ids("snapshot_ids", &request.snapshot_ids)?;
        let everywhere = request.availability_zones.is_empty() && request.hosts.is_empty();
        self.change_fast_restores(&caller.account_id, &ids, |tables, known| {
            let hosts = request.hosts.iter().map(|name| Ok(host::find(tables, name)?.host_id.clone()));
            let hosts = hosts.collect::<ApiResult<Vec<String>>>()?;
            let zones = &request.availability_zones;
            known.retain(|wish| {
                let named = zones.contains(&wish.availability_zone) || hosts.contains(&wish.host_id);
                !everywhere && !named
            });
            Ok(())
        })
        .await
    }

    pub(crate) fn do_list_fast_restores(
        &self,
        caller: &Caller,
        mut request: v1::ListFastSnapshotRestoresRequest,
    ) -> ApiResult<v1::ListFastSnapshotRestoresResponse> {
        let account = caller.account_id.as_str();
        let page = request.page.take();
        let listing = Listing::new(&self.core, "ListFastSnapshotRestores", account, &request, page.as_ref())?
            .ids("snapshot_ids", &request.snapshot_ids, snapshot::check_id)?
            .filters(&request.filters, &FILTERS)?;
        let tables = self.core.tables();
        listing.all_known(|id| snapshot::find(&tables, account, id).is_ok(), snapshot::not_found)?;
        let all = self.fast_restores(&tables, caller, &[]).into_iter().map(|one| (place_of(&one), one));
        let wanted = all.filter(|(key, one)| listing.is_ahead(key) && listing.names(&one.snapshot_id));
        let wanted: Vec<_> = wanted.filter(|(_, one)| listing.matches(|name| filter_values(one, name))).collect();
        let (fast_snapshot_restores, page) = listing.keyed_page(&wanted);
        Ok(v1::ListFastSnapshotRestoresResponse { fast_snapshot_restores, page })
    }
}
