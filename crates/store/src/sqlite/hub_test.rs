use super::*;
use crate::model::EventKind;

fn commit(revision: Revision, key: &str) -> Commit {
    let kind = EventKind::Delete { key: key.to_owned() };
    Commit::new(revision, vec![Event { revision, kind, prev: None }])
}

/// Revisions that the ring has from `next` on; `None` when it has forgotten.
fn recent(hub: &Hub, next: Revision) -> Option<Vec<Revision>> {
    match hub.recent(next) {
        Recent::Commits(commits) => Some(commits.iter().map(|commit| commit.revision).collect()),
        Recent::Forgotten => None,
    }
}

#[test]
fn an_empty_ring_has_only_the_future() {
    let hub = Hub::new(7, 10, usize::MAX);
    assert_eq!(recent(&hub, 7), None);
    assert_eq!(recent(&hub, 8), Some(vec![]));
}

#[test]
fn the_ring_keeps_the_newest_commits() {
    let hub = Hub::new(0, 3, usize::MAX);
    hub.publish((1..=5).map(|revision| commit(revision, "/a")).collect());
    assert_eq!(*hub.head().borrow(), 5);
    assert_eq!(recent(&hub, 2), None);
    assert_eq!(recent(&hub, 3), Some(vec![3, 4, 5]));
    assert_eq!(recent(&hub, 5), Some(vec![5]));
    assert_eq!(recent(&hub, 6), Some(vec![]));
    hub.publish(vec![commit(6, "/a")]);
    assert_eq!(recent(&hub, 3), None);
    assert_eq!(recent(&hub, 4), Some(vec![4, 5, 6]));
}

#[test]
fn the_ring_is_bounded_in_bytes() {
    let weight = commit(1, "/a").bytes;
    let hub = Hub::new(0, 100, weight * 2);
    hub.publish((1..=5).map(|revision| commit(revision, "/a")).collect());
    assert_eq!(recent(&hub, 4), Some(vec![4, 5]));
    assert_eq!(recent(&hub, 3), None);
    // One that is larger than the ring empties it, and is read from the log.
    hub.publish(vec![commit(6, &format!("/{}", "x".repeat(weight * 3)))]);
    assert_eq!(recent(&hub, 6), None);
    assert_eq!(recent(&hub, 7), Some(vec![]));
    hub.publish(vec![commit(7, "/a")]);
    assert_eq!(recent(&hub, 7), Some(vec![7]));
}

#[test]
fn a_watcher_takes_a_bounded_number() {
    let hub = Hub::new(0, 1000, usize::MAX);
    hub.publish((1..=1000).map(|revision| commit(revision, "/a")).collect());
    assert_eq!(recent(&hub, 1).unwrap().len(), TAKE);
    assert!(commit(1, "/a/b").seen_under("/b").is_none());
    assert!(commit(1, "/a/b").seen_under("/a/").is_some());
}
