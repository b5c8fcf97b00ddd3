use super::*;

const TTL: Duration = Duration::from_secs(10);

fn seconds(n: u64) -> Duration {
    Duration::from_secs(n)
}

#[test]
fn leases_expire_in_the_order_of_their_deadlines() {
    let (leases, t0) = (Leases::default(), Instant::now());
    leases.add(LeaseId(1), seconds(30), t0);
    leases.add(LeaseId(2), seconds(10), t0);
    leases.add(LeaseId(3), seconds(20), t0);
    assert_eq!(leases.next_deadline(), Some(t0 + seconds(10)));
    assert_eq!(leases.take_expired(t0 + seconds(9), 10), []);
    assert_eq!(leases.take_expired(t0 + seconds(20), 1), [LeaseId(2)]);
    assert_eq!(leases.take_expired(t0 + seconds(20), 10), [LeaseId(3)]);
    assert_eq!(leases.take_expired(t0 + seconds(20), 10), []);
    assert_eq!(leases.next_deadline(), Some(t0 + seconds(30)));
}

#[test]
fn keep_alive_restores_the_full_ttl() {
    let (leases, t0) = (Leases::default(), Instant::now());
    leases.add(LeaseId(1), TTL, t0);
    assert_eq!(leases.times(LeaseId(1), t0 + seconds(4)), Ok((TTL, seconds(6))));
    assert_eq!(leases.keep_alive(LeaseId(1), t0 + seconds(9)), Ok(TTL));
    assert_eq!(leases.times(LeaseId(1), t0 + seconds(9)), Ok((TTL, TTL)));
    assert_eq!(leases.take_expired(t0 + seconds(18), 10), []);
    assert_eq!(leases.take_expired(t0 + seconds(19), 10), [LeaseId(1)]);
}

#[test]
fn an_expiring_lease_is_dead_to_its_holder() {
    let (leases, t0) = (Leases::default(), Instant::now());
    let id = LeaseId(1);
    leases.add(id, TTL, t0);
    assert_eq!(leases.take_expired(t0 + TTL, 10), [id]);
    assert_eq!(leases.keep_alive(id, t0 + TTL), Err(Error::LeaseNotFound { id }));
    assert_eq!(leases.times(id, t0 + TTL), Err(Error::LeaseNotFound { id }));
    // Its deletion failed: it is tried again, but the lease does not come back to life.
    leases.put_back(&[id], t0 + seconds(11));
    assert_eq!(leases.keep_alive(id, t0 + TTL), Err(Error::LeaseNotFound { id }));
    assert_eq!(leases.take_expired(t0 + seconds(10), 10), []);
    assert_eq!(leases.take_expired(t0 + seconds(11), 10), [id]);
    leases.remove(id);
    leases.put_back(&[id], t0);
    assert_eq!(leases.next_deadline(), None);
}

#[test]
fn a_removed_lease_leaves_no_deadline() {
    let (leases, t0) = (Leases::default(), Instant::now());
    leases.add(LeaseId(1), TTL, t0);
    leases.keep_alive(LeaseId(1), t0 + seconds(1)).unwrap();
    leases.remove(LeaseId(1));
    leases.remove(LeaseId(1));
    assert_eq!(leases.next_deadline(), None);
    assert_eq!(leases.keep_alive(LeaseId(1), t0), Err(Error::LeaseNotFound { id: LeaseId(1) }));
}
