//! Each rule by itself, and what people read when nothing is found.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::indexing_slicing, clippy::panic)]

use std::collections::BTreeSet;
use std::sync::Arc;

use hearth_scheduler::{
    Config, Exclusion, GroupStrategy, HostSpec, HostState, NoCapacity, Overcommit, PlacementGroup, Request,
    Reservation, ReserveError, Resource, ResourceVector, Scheduler, SpreadLevel, Strategy,
};

type Cloud = Scheduler<String, u32>;

fn size(vcpus: u32, memory_mib: u64) -> ResourceVector {
    ResourceVector { vcpus, memory_mib, ..ResourceVector::default() }
}

fn host(id: &str, vcpus: u32, memory_mib: u64) -> HostSpec<String> {
    HostSpec::new(id.to_owned(), "az-a", size(vcpus, memory_mib))
}

fn cloud(hosts: impl IntoIterator<Item = HostSpec<String>>) -> Cloud {
    let mut cloud = Cloud::new(Config::default());
    for spec in hosts {
        cloud.upsert_host(spec);
    }
    cloud
}

/// Hosts h-0, h-1, ... of 8 vCPUs and 16 GiB.
fn same(count: usize) -> Vec<HostSpec<String>> {
    (0..count).map(|number| host(&format!("h-{number}"), 8, 16384)).collect()
}

fn in_racks(count: usize, rack_size: usize) -> Vec<HostSpec<String>> {
    let mut hosts = same(count);
    for (number, spec) in hosts.iter_mut().enumerate() {
        spec.rack = Some(format!("rack-{}", number / rack_size).into());
    }
    hosts
}

fn small() -> Request<String> {
    Request::new(size(1, 1024))
}

fn in_group(name: &str, strategy: GroupStrategy) -> Request<String> {
    Request { placement_group: Some(PlacementGroup { name: name.into(), strategy }), ..small() }
}

fn texts(names: &[&str]) -> Vec<Arc<str>> {
    names.iter().map(|name| Arc::from(*name)).collect()
}

fn place(cloud: &mut Cloud, allocation: u32, request: &Request<String>) -> String {
    cloud.place(allocation, request).unwrap().host
}

fn refusal(cloud: &mut Cloud, request: &Request<String>) -> NoCapacity {
    cloud.place(u32::MAX, request).unwrap_err()
}

#[test]
fn pack_fills_the_fullest_host_that_has_room() {
    let mut cloud = cloud(same(3));
    cloud.reserve(&"h-1".into(), 100, &Reservation { resources: size(2, 4096), ..Default::default() }).unwrap();
    cloud.reserve(&"h-2".into(), 101, &Reservation { resources: size(4, 12288), ..Default::default() }).unwrap();
    assert_eq!(place(&mut cloud, 1, &Request::new(size(1, 4096))), "h-2");
    assert_eq!(place(&mut cloud, 2, &Request::new(size(1, 4096))), "h-1");
    assert_eq!(place(&mut cloud, 3, &Request::new(size(8, 16384))), "h-0");
}

#[test]
fn pack_opens_no_empty_host_while_a_larger_one_in_use_has_room() {
    let mut cloud = cloud([host("small", 2, 2048), host("large", 64, 262_144)]);
    cloud.reserve(&"large".into(), 100, &Reservation { resources: size(1, 1024), ..Default::default() }).unwrap();
    assert_eq!(place(&mut cloud, 1, &Request::new(size(2, 2048))), "large");
}

#[test]
fn spread_takes_each_host_before_any_twice() {
    let mut cloud = cloud(same(4));
    let request = Request { strategy: Strategy::Spread, ..small() };
    let used: BTreeSet<String> = (0..4).map(|number| place(&mut cloud, number, &request)).collect();
    assert_eq!(used.len(), 4);
}

#[test]
fn the_same_allocation_is_placed_once() {
    let mut cloud = cloud(same(2));
    let first = cloud.place(1, &small()).unwrap();
    let again = cloud.place(1, &Request { exclude_hosts: vec![first.host.clone()], ..small() }).unwrap();
    assert!(again.existing && !first.existing);
    assert_eq!(again.host, first.host);
    assert_eq!(cloud.host(&first.host).unwrap().allocations, 1);
    assert!(cloud.release(&1));
    assert!(!cloud.release(&1));
    assert_eq!(cloud.host(&first.host).unwrap().free, size(8, 16384));
}

#[test]
fn overcommit_scales_what_may_be_promised() {
    let overcommit = Overcommit { vcpus_permille: 4000, memory_permille: 900, ..Overcommit::default() };
    let mut cloud = cloud([HostSpec { overcommit, ..host("h-0", 2, 10_000) }]);
    assert_eq!(cloud.host(&"h-0".into()).unwrap().allocatable, size(8, 9000));
    assert!(cloud.place(1, &Request::new(size(8, 9000))).is_ok());
    assert!(cloud.place(2, &Request::new(size(1, 0))).is_err());
}

#[test]
fn every_dimension_must_fit() {
    let whole = ResourceVector {
        vcpus: 4,
        memory_mib: 4096,
        ecu_milli: 8000,
        instance_store_bytes: 100 << 30,
        ebs_mbps: 1000,
        network_mbps: 2000,
    };
    for resource in Resource::ALL {
        let mut short = whole;
        match resource {
            Resource::Vcpus => short.vcpus -= 1,
            Resource::Memory => short.memory_mib -= 1,
            Resource::Ecu => short.ecu_milli -= 1,
            Resource::InstanceStore => short.instance_store_bytes -= 1,
            Resource::EbsBandwidth => short.ebs_mbps -= 1,
            Resource::NetworkBandwidth => short.network_mbps -= 1,
        }
        let mut cloud = cloud([HostSpec::new("h-0".to_owned(), "az-a", short)]);
        let problem = refusal(&mut cloud, &Request::new(whole));
        assert_eq!(problem.shortfalls.iter().map(|short| short.resource).collect::<Vec<_>>(), [resource]);
        assert!(problem.to_string().contains(&format!("{resource} is short")), "{problem}");
        assert!(cloud.place(1, &Request::new(short)).is_ok());
    }
}

#[test]
fn draining_and_down_hosts_get_nothing_and_keep_what_they_have() {
    let mut cloud = cloud(same(2));
    let kept = place(&mut cloud, 1, &small());
    for (state, exclusion) in [(HostState::Draining, Exclusion::Draining), (HostState::Down, Exclusion::Down)] {
        for name in ["h-0", "h-1"] {
            assert!(cloud.set_host_state(&name.into(), state));
        }
        let problem = refusal(&mut cloud, &small());
        assert_eq!((problem.excluded, problem.eligible), (vec![(exclusion, 2)], 0));
        assert!(cloud.place(2, &Request { host: Some(kept.clone()), ..small() }).is_err());
        assert_eq!(cloud.host(&kept).unwrap().allocations, 1);
    }
    assert!(cloud.set_host_state(&kept, HostState::Active));
    assert_eq!(place(&mut cloud, 2, &small()), kept);
    assert!(!cloud.set_host_state(&"h-9".into(), HostState::Active));
}

#[test]
fn zone_host_labels_and_exclusions_bind() {
    let mut hosts = same(4);
    hosts[1].zone = "az-b".into();
    hosts[2].labels.insert("arch".into(), "arm64".into());
    hosts[3].labels.insert("disk".into(), "nvme".into());
    let mut cloud = cloud(hosts);
    let label = |name: &str, value: &str| Request { labels: vec![(name.into(), value.into())], ..small() };
    assert_eq!(place(&mut cloud, 1, &Request { zone: Some("az-b".into()), ..small() }), "h-1");
    assert_eq!(place(&mut cloud, 2, &label("arch", "arm64")), "h-2");
    assert_eq!(place(&mut cloud, 3, &label("disk", "nvme")), "h-3");
    assert_eq!(place(&mut cloud, 4, &Request { host: Some("h-0".into()), ..small() }), "h-0");
    let all_but_h3 = vec!["h-0".into(), "h-1".into(), "h-2".into()];
    assert_eq!(place(&mut cloud, 5, &Request { exclude_hosts: all_but_h3, ..small() }), "h-3");

    let exclusions = |problem: NoCapacity| problem.excluded;
    assert_eq!(exclusions(refusal(&mut cloud, &label("arch", "riscv"))), [(Exclusion::Labels, 4)]);
    assert_eq!(
        exclusions(refusal(&mut cloud, &Request { zone: Some("az-z".into()), ..small() })),
        [(Exclusion::OtherZone, 4)]
    );
    assert_eq!(
        exclusions(refusal(&mut cloud, &Request { host: Some("h-9".into()), ..small() })),
        [(Exclusion::OtherHost, 4)]
    );
    let contradiction = Request { zone: Some("az-b".into()), ..label("arch", "arm64") };
    assert_eq!(exclusions(refusal(&mut cloud, &contradiction)), [(Exclusion::OtherZone, 3), (Exclusion::Labels, 1)]);
}

#[test]
fn spread_group_takes_a_host_once() {
    let mut cloud = cloud(same(3));
    let request = in_group("web", GroupStrategy::Spread { level: SpreadLevel::Host, max_per_zone: None });
    let used: BTreeSet<String> = (0..3).map(|number| place(&mut cloud, number, &request)).collect();
    assert_eq!(used.len(), 3);
    let problem = refusal(&mut cloud, &request);
    assert_eq!(problem.excluded, [(Exclusion::PlacementGroup, 3)]);
    cloud.release(&1);
    assert!(cloud.place(4, &request).is_ok());
}

#[test]
fn spread_group_by_rack_and_zone_limit() {
    let mut cloud = cloud(in_racks(6, 2));
    let by_rack = in_group("web", GroupStrategy::Spread { level: SpreadLevel::Rack, max_per_zone: Some(2) });
    let first = place(&mut cloud, 1, &by_rack);
    let second = place(&mut cloud, 2, &by_rack);
    let rack = |name: &str| cloud.host(&name.to_owned()).unwrap().spec.rack.clone();
    assert_ne!(rack(&first), rack(&second));
    // A third rack is free, but the zone has its two.
    assert_eq!(refusal(&mut cloud, &by_rack).excluded, [(Exclusion::PlacementGroup, 6)]);
}

#[test]
fn partitions_never_share_a_rack_and_fill_evenly() {
    let mut cloud = cloud(in_racks(6, 2));
    let request = in_group("db", GroupStrategy::Partition { count: 3, number: None });
    let placements: Vec<_> = (0..9).map(|number| cloud.place(number, &request).unwrap()).collect();
    let mut racks: Vec<BTreeSet<Arc<str>>> = vec![BTreeSet::new(); 4];
    let mut counts = [0; 4];
    for placement in &placements {
        let partition = placement.partition.unwrap() as usize;
        counts[partition] += 1;
        racks[partition].insert(cloud.host(&placement.host).unwrap().spec.rack.clone().unwrap());
    }
    assert_eq!(counts, [0, 3, 3, 3]);
    assert!(racks[1].is_disjoint(&racks[2]) && racks[2].is_disjoint(&racks[3]) && racks[1].is_disjoint(&racks[3]));
    let second = in_group("db", GroupStrategy::Partition { count: 3, number: Some(2) });
    assert_eq!(cloud.place(20, &second).unwrap().partition, Some(2));
    assert_eq!(cloud.place(20, &second).unwrap().partition, Some(2), "also when asked again");
    let none = in_group("db", GroupStrategy::Partition { count: 3, number: Some(4) });
    assert_eq!(refusal(&mut cloud, &none).excluded, [(Exclusion::PlacementGroup, 6)]);
}

#[test]
fn cluster_stays_in_the_rack_of_its_first_member() {
    let mut cloud = cloud(in_racks(6, 2));
    let request = in_group("hpc", GroupStrategy::Cluster);
    let rack = |cloud: &Cloud, name: &String| cloud.host(name).unwrap().spec.rack.clone().unwrap();
    let first = place(&mut cloud, 0, &request);
    let first_rack = rack(&cloud, &first);
    for number in 1..16 {
        let next = place(&mut cloud, number, &request);
        assert_eq!(rack(&cloud, &next), first_rack);
    }
    let problem = refusal(&mut cloud, &request);
    assert_eq!((problem.excluded, problem.eligible), (vec![(Exclusion::PlacementGroup, 4)], 2));
}

#[test]
fn cluster_batch_starts_where_all_of_it_fits() {
    let mut hosts = in_racks(6, 2);
    for number in [2, 3] {
        hosts[number].capacity = size(10, 20_480);
    }
    let mut cloud = cloud(hosts);
    // Each rack but the second holds 16, the second 20.
    let request = in_group("hpc", GroupStrategy::Cluster);
    let names: Vec<u32> = (0..20).collect();
    let placements = cloud.place_many(&names, 20, &request).unwrap();
    assert!(placements.iter().all(|placement| placement.host == "h-2" || placement.host == "h-3"));

    // 17 do not fit into any rack that is left: as many as one takes, if that is enough.
    let next: Vec<u32> = (100..117).collect();
    let other = in_group("other", GroupStrategy::Cluster);
    let problem = cloud.place_many(&next, 17, &other).unwrap_err();
    assert_eq!((problem.placeable, problem.wanted), (16, 17));
    assert_eq!(cloud.place_many(&next, 1, &other).unwrap().len(), 16);
}

#[test]
fn affinity_anti_affinity_and_avoidance() {
    let mut cloud = cloud(same(3));
    let cache = Request { groups: texts(&["cache"]), anti_affinity: texts(&["cache"]), ..small() };
    let near = Request { affinity: texts(&["cache"]), ..small() };
    let far = Request { anti_affinity: texts(&["cache"]), ..small() };
    let rather_far = Request { avoid_groups: texts(&["cache"]), ..small() };
    assert_eq!(refusal(&mut cloud, &near).excluded, [(Exclusion::Affinity, 3)]);
    let first = place(&mut cloud, 1, &cache);
    assert_eq!(place(&mut cloud, 2, &near), first);
    assert_ne!(place(&mut cloud, 3, &far), first);
    assert_ne!(place(&mut cloud, 4, &rather_far), first);
    let (second, third) = (place(&mut cloud, 5, &cache), place(&mut cloud, 6, &cache));
    assert_eq!(BTreeSet::from([first, second, third]).len(), 3);
    assert_eq!(refusal(&mut cloud, &far).excluded, [(Exclusion::AntiAffinity, 3)]);
    assert!(cloud.place(7, &rather_far).is_ok(), "a wish does not forbid");
    // The first member of a group that wants to be together may go anywhere, the next must follow.
    let pair = Request { groups: texts(&["pair"]), affinity: texts(&["pair"]), strategy: Strategy::Spread, ..small() };
    let first = place(&mut cloud, 8, &pair);
    assert_eq!(place(&mut cloud, 9, &pair), first);
}

#[test]
fn a_host_with_the_image_is_preferred_but_not_required() {
    let mut cloud = cloud(same(3));
    let request = Request { prefer_image: Some("ami-1".into()), ..small() };
    assert!(cloud.set_host_image(&"h-2".into(), "ami-1", true));
    cloud.reserve(&"h-1".into(), 100, &Reservation { resources: size(4, 8192), ..Default::default() }).unwrap();
    assert_eq!(place(&mut cloud, 1, &request), "h-2", "although h-1 is the better fit");
    cloud.set_host_image(&"h-2".into(), "ami-1", false);
    cloud.release(&1);
    assert_eq!(place(&mut cloud, 2, &request), "h-1");
}

#[test]
fn batches_are_all_or_nothing_below_the_minimum() {
    let mut cloud = cloud(same(2));
    let names: Vec<u32> = (0..20).collect();
    let problem = cloud.place_many(&names, 17, &small()).unwrap_err();
    assert_eq!((problem.placeable, problem.wanted), (16, 17));
    assert!(problem.to_string().contains("room for 16 of 17 instances: vCPU is short"), "{problem}");
    assert!(cloud.hosts().all(|host| host.allocations == 0 && host.free == host.allocatable));
    assert_eq!(cloud.place_many(&names, 16, &small()).unwrap().len(), 16);
    // Asked again: the same answer, nothing more taken.
    let again = cloud.place_many(&names, 16, &small()).unwrap();
    assert!(again.len() == 16 && again.iter().all(|placement| placement.existing));
    assert!(cloud.place_many(&[], 0, &small()).unwrap().is_empty());
}

#[test]
fn a_failed_batch_takes_back_only_what_it_placed_itself() {
    let mut cloud = cloud(same(1));
    cloud.place(3, &small()).unwrap();
    assert!(cloud.place_many(&[1, 2, 3, 4, 5, 6, 7, 8, 9], 9, &small()).is_err());
    assert_eq!(cloud.allocations_on(&"h-0".into()), [3]);
}

#[test]
fn relocation_leaves_the_host_and_its_own_group_does_not_hinder_it() {
    let mut cloud = cloud(same(2));
    let request = in_group("web", GroupStrategy::Spread { level: SpreadLevel::Host, max_per_zone: Some(1) });
    let first = place(&mut cloud, 1, &request);
    cloud.set_host_state(&first, HostState::Draining);
    let moved = cloud.relocate(&1, &request).unwrap();
    assert_ne!(moved.host, first);
    assert_eq!(cloud.host(&first).unwrap().allocations, 0);
    let problem = cloud.relocate(&1, &request).unwrap_err();
    assert_eq!(problem.excluded, [(Exclusion::Draining, 1), (Exclusion::ExcludedHost, 1)]);
    let (host, reservation) = cloud.allocation(&1).unwrap();
    assert_eq!(*host, moved.host, "without capacity it stays");
    assert_eq!(reservation.placement_group, Some(("web".into(), None)));
}

#[test]
fn removed_hosts_return_their_allocations() {
    let mut cloud = cloud(same(1));
    for number in [5, 3, 9] {
        place(&mut cloud, number, &small());
    }
    assert_eq!(cloud.remove_host(&"h-0".into()), [5, 3, 9]);
    assert!(cloud.host(&"h-0".into()).is_none() && cloud.allocation(&5).is_none());
    assert!(cloud.remove_host(&"h-0".into()).is_empty());
    let unknown = cloud.reserve(&"h-0".into(), 1, &Reservation::default());
    assert_eq!(unknown, Err(ReserveError::UnknownHost("h-0".into())));
    // The slot is used again, without anything of the old host.
    cloud.upsert_host(host("h-7", 8, 16384));
    assert_eq!(place(&mut cloud, 5, &Request::new(size(8, 16384))), "h-7");
}

#[test]
fn a_host_that_shrinks_takes_nothing_until_it_is_within_its_means() {
    let mut cloud = cloud(same(1));
    place(&mut cloud, 1, &Request::new(size(2, 12_288)));
    place(&mut cloud, 2, &Request::new(size(2, 2048)));
    cloud.upsert_host(host("h-0", 8, 8192));
    let view = cloud.host(&"h-0".into()).unwrap();
    assert_eq!((view.allocated, view.free), (size(4, 14_336), size(4, 0)));
    assert!(cloud.place(3, &Request::new(size(1, 1))).is_err());
    cloud.release(&1);
    assert_eq!(cloud.host(&"h-0".into()).unwrap().free, size(6, 6144));
}

#[test]
fn refusals_say_what_is_short_and_who_was_out() {
    let mut cloud = cloud([host("h-0", 8, 8192), host("h-1", 8, 8192), host("h-2", 8, 65_536), host("h-3", 8, 65_536)]);
    cloud.reserve(&"h-0".into(), 100, &Reservation { resources: size(1, 2048), ..Default::default() }).unwrap();
    cloud.reserve(&"h-1".into(), 101, &Reservation { resources: size(1, 4096), ..Default::default() }).unwrap();
    cloud.set_host_state(&"h-2".into(), HostState::Draining);
    cloud.set_host_state(&"h-3".into(), HostState::Down);
    let problem = refusal(&mut cloud, &Request::new(size(2, 8192)));
    assert_eq!(problem.nearest_host.as_deref(), Some("h-0"));
    assert_eq!(
        problem.to_string(),
        "no capacity: memory is short: needs 8192 MiB, the best host has 6144 MiB free; \
         2 of 4 hosts excluded: 1 down, 1 draining"
    );
    let problem = refusal(&mut cloud, &Request::new(size(16, 16_384)));
    assert_eq!(
        problem.to_string(),
        "no capacity: memory is short: needs 16384 MiB, the largest host has 6144 MiB free; \
         vCPU too: needs 16 vCPU, it has 7 vCPU free; no host is large enough even when empty; \
         2 of 4 hosts excluded: 1 down, 1 draining"
    );
}

#[test]
fn refusals_without_any_host_to_name() {
    let problem = refusal(&mut cloud([]), &small());
    assert_eq!(problem.to_string(), "no capacity: there are no hosts");
    let mut one = cloud([HostSpec { state: HostState::Down, ..host("h-0", 8, 8192) }]);
    assert_eq!(refusal(&mut one, &small()).to_string(), "no capacity: the only host may not take it: 1 down");
    let mut two = cloud(same(2));
    two.set_host_state(&"h-0".into(), HostState::Draining);
    let elsewhere = Request { zone: Some("az-b".into()), ..small() };
    assert_eq!(
        refusal(&mut two, &elsewhere).to_string(),
        "no capacity: none of 2 hosts may take it: 2 in another availability zone"
    );
}

#[test]
fn amounts_read_well() {
    let text = |resource: Resource, amount| resource.display(amount).to_string();
    assert_eq!(text(Resource::Ecu, 1500), "1.5 ECU");
    assert_eq!(text(Resource::Ecu, 2000), "2 ECU");
    assert_eq!(text(Resource::Ecu, 2005), "2.005 ECU");
    assert_eq!(text(Resource::InstanceStore, 5 << 30), "5 GiB");
    assert_eq!(text(Resource::InstanceStore, (5 << 30) + (1 << 29)), "5.5 GiB");
    assert_eq!(text(Resource::InstanceStore, 12), "12 bytes");
    assert_eq!(text(Resource::EbsBandwidth, 100), "100 Mbit/s");
}
