//! Uploads and downloads of whole disks: so many at a time, and never all of them one account's.

use std::collections::HashMap;
use std::sync::Arc;

use parking_lot::Mutex;
use tokio::sync::{OwnedSemaphorePermit, Semaphore};

use crate::api_error::{ApiError, ApiResult};

type Counts = Arc<Mutex<HashMap<String, usize>>>;

/// See the module.
pub(crate) struct Transfers {
    pool: Arc<Semaphore>,
    most: usize,
    most_of_account: usize,
    of_accounts: Counts,
}

/// One that goes on, until this is dropped.
pub(crate) struct Transfer {
    _permit: OwnedSemaphorePermit,
    account: String,
    of_accounts: Counts,
}

impl Drop for Transfer {
    fn drop(&mut self) {
        let mut counts = self.of_accounts.lock();
        let left = counts.get(&self.account).map_or(0, |count| count.saturating_sub(1));
        match left {
            0 => counts.remove(&self.account),
            left => counts.insert(self.account.clone(), left),
        };
    }
}

impl Transfers {
    /// `pool` has `most` permits.
    pub fn new(pool: Arc<Semaphore>, most: usize, most_of_account: usize) -> Self {
        Self { pool, most, most_of_account, of_accounts: Counts::default() }
    }

    /// Begins one, unless the account has enough of them or all together are too many.
    pub fn begin(&self, account: &str) -> ApiResult<Transfer> {
        let refuse = |who: &str, limit: usize| {
            let message = format!("{who} {limit} imports and exports going on; try again later");
            ApiError::exhausted("RequestLimitExceeded", message).with("limit", limit)
        };
        let mut counts = self.of_accounts.lock();
        let count = counts.get(account).copied().unwrap_or(0);
        if count >= self.most_of_account {
            return Err(refuse("the account has", self.most_of_account));
        }
        let permit = self.pool.clone().try_acquire_owned().map_err(|_| refuse("there are", self.most))?;
        counts.insert(account.to_owned(), count.saturating_add(1));
        Ok(Transfer { _permit: permit, account: account.to_owned(), of_accounts: self.of_accounts.clone() })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn no_account_takes_every_place() {
        let transfers = Transfers::new(Arc::new(Semaphore::new(3)), 3, 2);
        let first = transfers.begin("a").unwrap();
        let second = transfers.begin("a").unwrap();
        let error = transfers.begin("a").err().unwrap();
        assert_eq!((error.reason(), error.message().contains("the account has 2")), ("RequestLimitExceeded", true));
        let other = transfers.begin("b").unwrap();
        let error = transfers.begin("b").err().unwrap();
        assert!(error.message().contains("there are 3"), "{error}");
        drop(first);
        let again = transfers.begin("b").unwrap();
        drop((second, other, again));
        assert!(transfers.of_accounts.lock().is_empty(), "nothing is kept of who has none");
        assert_eq!(transfers.pool.available_permits(), 3);
    }
}
