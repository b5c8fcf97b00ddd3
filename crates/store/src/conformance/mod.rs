//! The tests that every backend must pass.
//!
//! A backend's test module calls [`conformance_tests!`](crate::conformance_tests) with an expression
//! that makes an empty store (an `Arc<dyn Store>`); each case becomes one test. [`model`] compares
//! a backend with a reference model under random histories.
//!
//! Cases assume that nobody else writes to the store, but not that its revision starts at 0.

// This is test code, also where it is compiled for another crate's tests.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::indexing_slicing, clippy::panic, clippy::unreachable)]

pub mod concurrency;
pub mod election;
pub mod kv;
pub mod lease;
pub mod model;
pub mod range;
pub mod txn;
pub mod watch;

use crate::{Event, EventKind, Revision, Store, Txn, TxnOutcome, WatchBatch, WatchStream};

/// Makes one test of every conformance case. `$store` is evaluated in an async block per case and
/// must give an `Arc<dyn Store>` of a new, empty store.
#[macro_export]
macro_rules! conformance_tests {
    ($store:expr) => {
        $crate::conformance_tests! { @cases $store;
            kv: a_new_key_counts_from_one, an_overwrite_keeps_the_creation, a_deleted_key_starts_anew,
                values_may_be_empty_and_as_large_as_the_limit, keys_are_checked;
            txn: compares_decide_in_order, an_absent_key_has_revision_zero, a_conflict_changes_nothing,
                an_empty_transaction_makes_no_revision, deleting_nothing_makes_no_revision,
                all_operations_share_one_revision, duplicate_puts_are_refused, limits_are_typed_errors,
                delete_prefix_takes_exactly_the_prefix;
            range: keys_come_in_byte_order, pages_cover_everything_once, pages_hold_together_while_keys_change,
                old_revisions_can_be_read, compacted_and_future_revisions_are_refused, bounds_are_half_open,
                large_pages_end_early, compaction_leaves_present_keys_alone;
            watch: it_delivers_changes_in_order, it_starts_in_the_past, zero_means_from_now_on,
                it_waits_for_a_future_revision, it_sees_only_its_prefix, one_revision_is_one_batch,
                it_tells_the_state_before, compacted_history_is_refused, a_slow_watcher_loses_nothing,
                an_old_revision_is_replayed_with_the_values_of_its_time, dropping_a_watch_is_harmless;
            lease: revoking_deletes_its_keys_in_one_revision, an_expired_lease_takes_its_keys,
                keep_alive_keeps_it, a_put_without_lease_detaches_the_key, a_put_moves_the_key_to_another_lease,
                unknown_leases_are_refused, ttls_are_checked, ids_are_not_reused;
            election: a_term_is_the_create_revision, a_resigned_leader_is_followed,
                a_restarted_candidate_deposes_its_earlier_life, an_overtaken_leader_cannot_write,
                a_lost_term_is_followed_by_a_new_one_unless_another_led,
                hold_ends_when_the_lease_is_gone, candidates_take_turns;
            concurrency: increments_are_never_lost, an_observer_sees_every_revision_in_order,
                reads_never_go_back, transfers_keep_the_sum,
                every_outcome_is_true_at_its_revision;
        }
    };
    (@cases $store:expr; $($group:ident: $($case:ident),+;)+) => { $($(
        #[tokio::test(flavor = "multi_thread", worker_threads = 2)]
        async fn $case() {
            $crate::conformance::$group::$case($store).await;
        }
    )+)+ };
}

/// Commits a transaction that must not conflict, and returns its revision.
async fn commit(store: &dyn Store, txn: Txn) -> Revision {
    match store.txn(txn).await.unwrap() {
        TxnOutcome::Committed { revision } => revision,
        conflict => panic!("unexpected {conflict:?}"),
    }
}

/// Puts one key and returns the revision.
async fn put(store: &dyn Store, key: &str, value: &str) -> Revision {
    commit(store, Txn::new().put(key, value.to_owned())).await
}

/// The next batch of a watch that must not end.
async fn next(watch: &mut WatchStream) -> WatchBatch {
    watch.next().await.expect("the watch ended").unwrap()
}

/// `key=value` or `-key`, to compare events at a glance.
fn brief(event: &Event) -> String {
    match &event.kind {
        EventKind::Put(kv) => format!("{}={}", kv.key, String::from_utf8_lossy(&kv.value)),
        EventKind::Delete { key } => format!("-{key}"),
    }
}

/// All events of a batch, in brief.
fn briefs(batch: &WatchBatch) -> Vec<String> {
    assert!(batch.events.iter().all(|event| event.revision == batch.revision), "{batch:?}");
    batch.events.iter().map(brief).collect()
}
