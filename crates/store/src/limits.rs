//! Limits that hold in every backend, and the key syntax.
//!
//! They are those of the weakest backend (etcd's server defaults: 128 operations per transaction,
//! 1.5 MiB per request), so that a control plane developed on SQLite runs unchanged on etcd.

use std::collections::BTreeSet;
use std::time::Duration;

use crate::error::{Error, Result};
use crate::model::{Compare, Op, RangeRequest, Txn};

/// Most operations, and most compares, in one transaction.
pub const MAX_TXN_OPS: usize = 128;
/// Largest value in bytes (256 KiB).
pub const MAX_VALUE_BYTES: usize = 256 * 1024;
/// Largest transaction in bytes, keys and values together (1.5 MiB).
pub const MAX_REQUEST_BYTES: usize = 1536 * 1024;
/// Most keys in one page of a range.
pub const MAX_PAGE_KEYS: usize = 1000;
/// A page ends early, with `more` set, once its keys and values pass this many bytes (4 MiB).
pub const MAX_PAGE_BYTES: usize = 4 * 1024 * 1024;
/// Longest key in bytes.
pub const MAX_KEY_BYTES: usize = 1024;
/// Shortest TTL of a lease.
pub const MIN_LEASE_TTL: Duration = Duration::from_secs(1);
/// Longest TTL of a lease.
pub const MAX_LEASE_TTL: Duration = Duration::from_secs(24 * 3600);

/// Checks a key: `/segment[/segment…]`, at most [`MAX_KEY_BYTES`] bytes of UTF-8, no empty segment,
/// no control character.
///
/// # Errors
/// [`Error::InvalidKey`].
pub fn check_key(key: &str) -> Result<()> {
    let reason = match check_path(key) {
        Err(reason) => reason,
        Ok(()) if key.ends_with('/') => "must not end with '/'",
        Ok(()) => return Ok(()),
    };
    Err(Error::InvalidKey { key: shorten(key), reason })
}

/// Checks a prefix or range bound: like a key, but any part of one, the last segment may be
/// empty. `/` covers the whole store.
///
/// # Errors
/// [`Error::InvalidPrefix`].
pub fn check_prefix(prefix: &str) -> Result<()> {
    check_path(prefix).map_err(|reason| Error::InvalidPrefix { prefix: shorten(prefix), reason })
}

/// Checks the TTL of a lease against [`MIN_LEASE_TTL`] and [`MAX_LEASE_TTL`].
///
/// # Errors
/// [`Error::LeaseTtl`].
pub fn check_lease_ttl(ttl: Duration) -> Result<()> {
    if (MIN_LEASE_TTL..=MAX_LEASE_TTL).contains(&ttl) {
        return Ok(());
    }
    Err(Error::LeaseTtl { ttl, min: MIN_LEASE_TTL, max: MAX_LEASE_TTL })
}

/// Checks a range request's bounds and page size.
///
/// # Errors
/// [`Error::InvalidPrefix`], [`Error::InvalidKey`], [`Error::PageTooLarge`], [`Error::InvalidRevision`].
pub fn check_range(request: &RangeRequest) -> Result<()> {
    check_prefix(&request.start)?;
    if request.limit > MAX_PAGE_KEYS {
        return Err(Error::PageTooLarge { requested: request.limit, limit: MAX_PAGE_KEYS });
    }
    if let Some(after) = &request.after {
        check_key(after)?;
    }
    match request.at {
        Some(at) if at < 0 => Err(Error::InvalidRevision { requested: at }),
        _ => Ok(()),
    }
}

/// Checks everything about a transaction that does not depend on the store's content. As in etcd a
/// key may be put only once, and not both put and deleted; overlapping deletes are fine.
///
/// # Errors
/// [`Error::TooManyOps`], [`Error::TooManyCompares`], [`Error::InvalidKey`], [`Error::InvalidPrefix`],
/// [`Error::ValueTooLarge`], [`Error::RequestTooLarge`], [`Error::DuplicateKey`].
pub fn check_txn(txn: &Txn) -> Result<()> {
    if txn.compares.len() > MAX_TXN_OPS {
        return Err(Error::TooManyCompares { count: txn.compares.len(), limit: MAX_TXN_OPS });
    }
    if txn.ops.len() > MAX_TXN_OPS {
        return Err(Error::TooManyOps { count: txn.ops.len(), limit: MAX_TXN_OPS });
    }
    for compare in &txn.compares {
        check_key(compare.key())?;
        if let Compare::Value { key, equals } = compare {
            check_value(key, equals.len())?;
        }
    }
    let mut puts: BTreeSet<&str> = BTreeSet::new();
    for op in &txn.ops {
        match op {
            Op::Put { key, value, .. } => {
                check_key(key)?;
                check_value(key, value.len())?;
                if !puts.insert(key.as_str()) {
                    return Err(Error::DuplicateKey { key: key.clone() });
                }
            }
            Op::Delete { key } => check_key(key)?,
            Op::DeletePrefix { prefix } => check_prefix(prefix)?,
        }
    }
    for op in &txn.ops {
        let hit = match op {
            Op::Put { .. } => None,
            Op::Delete { key } => puts.get(key.as_str()),
            Op::DeletePrefix { prefix } => puts.range(prefix.as_str()..).next().filter(|key| key.starts_with(prefix)),
        };
        if let Some(key) = hit {
            return Err(Error::DuplicateKey { key: (*key).to_owned() });
        }
    }
    let size = txn.size();
    if size > MAX_REQUEST_BYTES {
        return Err(Error::RequestTooLarge { size, limit: MAX_REQUEST_BYTES });
    }
    Ok(())
}

fn check_value(key: &str, size: usize) -> Result<()> {
    if size > MAX_VALUE_BYTES {
        return Err(Error::ValueTooLarge { key: key.to_owned(), size, limit: MAX_VALUE_BYTES });
    }
    Ok(())
}

/// The rules that keys and prefixes share.
fn check_path(path: &str) -> Result<(), &'static str> {
    if path.is_empty() {
        Err("must not be empty")
    } else if path.len() > MAX_KEY_BYTES {
        Err("is longer than 1024 bytes")
    } else if !path.starts_with('/') {
        Err("must start with '/'")
    } else if path.contains("//") {
        Err("has an empty segment")
    } else if path.chars().any(char::is_control) {
        Err("has a control character")
    } else {
        Ok(())
    }
}

/// Keeps error texts readable when a key is absurdly long.
fn shorten(key: &str) -> String {
    const SHOWN: usize = 80;
    if key.chars().count() <= SHOWN {
        return key.to_owned();
    }
    key.chars().take(SHOWN).chain(std::iter::once('…')).collect()
}

/// The least string above every string that starts with `prefix`; `None` when there is none.
///
/// UTF-8 sorts by code point, so the last code point that can grow is raised by one (stepping over
/// the surrogate gap) and what follows it is dropped.
#[must_use]
pub fn prefix_end(prefix: &str) -> Option<String> {
    let mut head = prefix.to_owned();
    while let Some(last) = head.pop() {
        let next = match last {
            '\u{D7FF}' => Some('\u{E000}'),
            _ => char::from_u32(u32::from(last) + 1),
        };
        if let Some(next) = next {
            head.push(next);
            return Some(head);
        }
    }
    None
}

#[cfg(test)]
#[path = "limits_test.rs"]
mod tests;
