//! Deadlines of the granted leases, on the monotonic clock.

use std::collections::{BTreeSet, HashMap};
use std::time::{Duration, Instant};

use parking_lot::Mutex;

use crate::error::{Error, Result};
use crate::model::LeaseId;

/// All leases. The table in the database is the truth of which exist; this says how long they live.
#[derive(Debug, Default)]
pub(super) struct Leases {
    table: Mutex<Table>,
}

#[derive(Debug, Default)]
struct Table {
    leases: HashMap<LeaseId, Lease>,
    /// Leases by deadline, without those that are expiring.
    deadlines: BTreeSet<(Instant, LeaseId)>,
}

#[derive(Debug, Clone, Copy)]
struct Lease {
    ttl: Duration,
    deadline: Instant,
    /// The writer is deleting it: it can no longer be kept alive.
    expiring: bool,
}

impl Leases {
    /// Adds a lease that lives for its full TTL from `now`.
    pub(super) fn add(&self, id: LeaseId, ttl: Duration, now: Instant) {
        let mut table = self.table.lock();
        let deadline = now + ttl;
        table.leases.insert(id, Lease { ttl, deadline, expiring: false });
        table.deadlines.insert((deadline, id));
    }

    /// Forgets leases that are deleted.
    pub(super) fn remove(&self, id: LeaseId) {
        let mut table = self.table.lock();
        if let Some(lease) = table.leases.remove(&id) {
            table.deadlines.remove(&(lease.deadline, id));
        }
    }

    /// Restores a lease's full TTL from `now`, and returns it.
    pub(super) fn keep_alive(&self, id: LeaseId, now: Instant) -> Result<Duration> {
        let mut table = self.table.lock();
        let Table { leases, deadlines } = &mut *table;
        let lease = leases.get_mut(&id).filter(|lease| !lease.expiring).ok_or(Error::LeaseNotFound { id })?;
        deadlines.remove(&(lease.deadline, id));
        lease.deadline = now + lease.ttl;
        deadlines.insert((lease.deadline, id));
        Ok(lease.ttl)
    }

    /// A lease's TTL and what is left of it.
    pub(super) fn times(&self, id: LeaseId, now: Instant) -> Result<(Duration, Duration)> {
        let table = self.table.lock();
        let lease = table.leases.get(&id).filter(|lease| !lease.expiring).ok_or(Error::LeaseNotFound { id })?;
        Ok((lease.ttl, lease.deadline.saturating_duration_since(now)))
    }

    /// When the next lease expires.
    pub(super) fn next_deadline(&self) -> Option<Instant> {
        self.table.lock().deadlines.first().map(|(deadline, _)| *deadline)
    }

    /// Marks the leases whose time is up, at most `limit`, and returns them.
    pub(super) fn take_expired(&self, now: Instant, limit: usize) -> Vec<LeaseId> {
        let mut table = self.table.lock();
        let Table { leases, deadlines } = &mut *table;
        let mut expired = Vec::new();
        while let Some((deadline, id)) = deadlines.first().copied() {
            if deadline > now || expired.len() >= limit {
                break;
            }
            deadlines.pop_first();
            if let Some(lease) = leases.get_mut(&id) {
                lease.expiring = true;
                expired.push(id);
            }
        }
        expired
    }

    /// Schedules leases whose deletion failed for another try at `retry`. They stay dead to their holders.
    pub(super) fn put_back(&self, ids: &[LeaseId], retry: Instant) {
        let mut table = self.table.lock();
        let Table { leases, deadlines } = &mut *table;
        for id in ids {
            if let Some(lease) = leases.get_mut(id) {
                lease.deadline = retry;
                deadlines.insert((retry, *id));
            }
        }
    }
}

#[cfg(test)]
#[path = "leases_test.rs"]
mod tests;
