//! How much of the storage system one account may have.
//! Source: <https://docs.aws.amazon.com/general/latest/gr/ebs-service.html>

use hearth_proto::record::v1 as rec;
use hearth_store::{Bytes, Op, Revision, Txn};
use hearth_types::volume::GIB;

use crate::api_error::{ApiError, ApiResult};
use crate::config::ControlConfig;
use crate::core::encode;
use crate::keys;
use crate::tables::Tables;

/// Nearer to a limit than this (or a tenth of it), an account's calls are let in one at a time.
const NEAR: u64 = 1000;

/// What a call adds to what the account has.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) struct Wanted {
    pub volumes: u64,
    pub volume_gib: u64,
    pub snapshots: u64,
    pub images: u64,
}

impl Wanted {
    /// One volume.
    pub fn volume(size_bytes: u64) -> Self {
        Self { volumes: 1, volume_gib: size_bytes.div_ceil(GIB), ..Self::default() }
    }

    pub fn snapshots(count: usize) -> Self {
        Self { snapshots: count as u64, ..Self::default() }
    }

    fn times(self, count: u64) -> Self {
        Self {
            volumes: self.volumes.saturating_mul(count),
            volume_gib: self.volume_gib.saturating_mul(count),
            snapshots: self.snapshots.saturating_mul(count),
            images: self.images.saturating_mul(count),
        }
    }
}

impl std::iter::Sum for Wanted {
    fn sum<I: Iterator<Item = Self>>(all: I) -> Self {
        all.fold(Self::default(), |sum, one| Self {
            volumes: sum.volumes.saturating_add(one.volumes),
            volume_gib: sum.volume_gib.saturating_add(one.volume_gib),
            snapshots: sum.snapshots.saturating_add(one.snapshots),
            images: sum.images.saturating_add(one.images),
        })
    }
}

/// Makes sure that what was counted still holds when the transaction is done.
#[derive(Clone, Debug, Default)]
pub(crate) struct Guard(Option<(String, Revision, Bytes)>);

impl Guard {
    /// Writes the account's record again, which lets one call at a time in.
    pub fn apply(&self, txn: Txn) -> Txn {
        let Some((key, revision, record)) = &self.0 else { return txn };
        let has_it = txn.ops.iter().any(|op| matches!(op, Op::Put { key: other, .. } if other == key));
        if has_it { txn } else { txn.compare_mod_revision(key, *revision).put(key, record.clone()) }
    }
}

/// A limit, and what counts towards it.
struct Quota {
    code: &'static str,
    what: &'static str,
    limit: u64,
    wanted: u64,
    used: fn(&Tables, &str) -> u64,
}

fn volumes_of<'a>(tables: &'a Tables, account: &'a str) -> impl Iterator<Item = &'a rec::VolumeSpec> {
    tables.volumes.values().map(|spec| &*spec.value).filter(move |spec| spec.account_id == account)
}

fn quotas(config: &ControlConfig, wanted: &Wanted) -> [Quota; 4] {
    [
        Quota {
            code: "VolumeLimitExceeded",
            what: "volumes",
            limit: config.max_volumes_per_account.into(),
            wanted: wanted.volumes,
            used: |tables, account| volumes_of(tables, account).count() as u64,
        },
        Quota {
            code: "VolumeLimitExceeded",
            what: "GiB of volumes",
            limit: config.max_volume_gib_per_account,
            wanted: wanted.volume_gib,
            used: |tables, account| {
                let sizes = volumes_of(tables, account).filter_map(|spec| spec.volume.as_ref());
                sizes.map(|volume| volume.size_bytes.div_ceil(GIB)).fold(0, u64::saturating_add)
            },
        },
        Quota {
            code: "SnapshotLimitExceeded",
            what: "snapshots",
            limit: config.max_snapshots_per_account.into(),
            wanted: wanted.snapshots,
            used: |tables, account| {
                let specs = tables.snapshots.values().filter_map(|entry| entry.spec.as_ref());
                specs.filter(|spec| spec.account_id == account && !spec.deleted).count() as u64
            },
        },
        Quota {
            code: "ResourceLimitExceeded",
            what: "images",
            limit: config.max_images_per_account.into(),
            wanted: wanted.images,
            used: |tables, account| {
                let specs = tables.images.values().filter_map(|entry| entry.spec.as_ref());
                specs.filter(|spec| spec.account_id == account && !spec.deregistered).count() as u64
            },
        },
    ]
}

/// Refuses what would be more than the account may have.
pub(crate) fn check(config: &ControlConfig, tables: &Tables, account: &str, wanted: &Wanted) -> ApiResult<Guard> {
    let mut is_near = false;
    // 0 = no limit.
    for quota in quotas(config, wanted).into_iter().filter(|quota| quota.limit > 0 && quota.wanted > 0) {
        let Quota { code, what, limit, wanted, used } = quota;
        let used = used(tables, account);
        let then = used.saturating_add(wanted);
        if then > limit {
            let message = format!("the account has {used} {what} of at most {limit}, {wanted} more were asked for");
            return Err(ApiError::exhausted(code, message).with("limit", limit).with("resource", what));
        }
        is_near |= then.saturating_add(NEAR.max(limit / 10)) > limit;
    }
    let record = tables.accounts.get(account).filter(|_| is_near);
    Ok(Guard(record.map(|record| (keys::account(account), record.revision, encode(&*record.value)))))
}

/// How many times `one` the account may have, `most` at most; the error when not even `least` times.
pub(crate) fn fitting(
    config: &ControlConfig,
    tables: &Tables,
    account: &str,
    one: Wanted,
    (least, most): (usize, usize),
) -> ApiResult<(usize, Guard)> {
    let mut guard = check(config, tables, account, &one.times(least as u64))?;
    let mut count = least;
    // Few steps: a call makes some dozens at most.
    while count < most {
        match check(config, tables, account, &one.times(count as u64 + 1)) {
            Ok(more) => guard = more,
            Err(_) => break,
        }
        count += 1;
    }
    Ok((count, guard))
}
