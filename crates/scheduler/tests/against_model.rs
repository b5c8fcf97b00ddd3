//! Random lives of a small cloud, each decision compared with an exact linear scan.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::indexing_slicing, clippy::panic)]

mod model;

use std::sync::Arc;

use hearth_scheduler::{
    Config, GroupStrategy, HostSpec, HostState, NoCapacity, Overcommit, PlacementGroup, Request, Reservation,
    ResourceVector, Scheduler, SpreadLevel, Strategy as Choice,
};
use model::Model;
use proptest::prelude::*;

type Cloud = Scheduler<u32, u32>;

const HOSTS: u32 = 12;
const ALLOCATIONS: u32 = 60;

#[derive(Clone, Debug)]
enum Step {
    Host(Box<HostSpec<u32>>),
    State(u32, HostState),
    Image(u32, usize, bool),
    RemoveHost(u32),
    Place(u32, Box<Request<u32>>),
    PlaceMany(Vec<u32>, usize, Box<Request<u32>>),
    Relocate(u32, Box<Request<u32>>),
    Reserve(u32, u32, Reservation),
    Move(u32, u32),
    Release(u32),
}

fn name(prefix: &str, number: usize) -> Arc<str> {
    format!("{prefix}{number}").into()
}

fn resources() -> impl Strategy<Value = ResourceVector> {
    let minor = || prop_oneof![3 => Just(0u64), 1 => 0u64..20];
    (0u32..6, prop_oneof![Just(0u64), 1u64..9000, (1u64..20).prop_map(|n| n * 512)], minor(), minor(), minor(), minor())
        .prop_map(|(vcpus, memory_mib, ecu, store, ebs_mbps, network_mbps)| ResourceVector {
            vcpus,
            memory_mib,
            ecu_milli: ecu * 500,
            instance_store_bytes: store << 30,
            ebs_mbps,
            network_mbps,
        })
}

fn hosts() -> impl Strategy<Value = HostSpec<u32>> {
    let capacity = (0u32..40, 0u64..40_000, 0u64..40, 0u64..40, 0u64..60, 0u64..60);
    let overcommit = (prop_oneof![Just(1000u32), Just(4000), Just(900)], prop_oneof![Just(1000u32), Just(1500)]);
    let images = prop::collection::btree_set((0usize..3).prop_map(|n| name("ami-", n)), 0..3);
    let labels = prop::collection::btree_map(
        prop_oneof![Just(Arc::from("arch")), Just(Arc::from("disk"))],
        (0usize..2).prop_map(|n| name("v", n)),
        0..3,
    );
    let place = (0usize..3, prop::option::of(0usize..2));
    (0..HOSTS, place, capacity, overcommit, labels, states(), images).prop_map(
        |(
            id,
            (zone, rack),
            (vcpus, memory_mib, ecu, store, ebs_mbps, network_mbps),
            (cpu, memory),
            labels,
            state,
            images,
        )| {
            HostSpec {
                id,
                zone: name("az-", zone),
                rack: rack.map(|rack| name("rack-", rack)),
                capacity: ResourceVector {
                    vcpus,
                    memory_mib,
                    ecu_milli: ecu * 500,
                    instance_store_bytes: store << 30,
                    ebs_mbps,
                    network_mbps,
                },
                overcommit: Overcommit { vcpus_permille: cpu, memory_permille: memory, ..Overcommit::default() },
                labels,
                state,
                images,
            }
        },
    )
}

fn states() -> impl Strategy<Value = HostState> {
    prop_oneof![6 => Just(HostState::Active), 1 => Just(HostState::Draining), 1 => Just(HostState::Down)]
}

fn group_names(most: usize) -> impl Strategy<Value = Vec<Arc<str>>> {
    prop_oneof![2 => Just(Vec::new()), 1 => prop::collection::vec((0usize..4).prop_map(|n| name("g", n)), 0..most)]
}

fn placement_groups() -> impl Strategy<Value = Option<PlacementGroup>> {
    // Three kinds with names of their own: one group never has two strategies.
    let level = prop_oneof![Just(SpreadLevel::Host), Just(SpreadLevel::Rack)];
    let spread = (0usize..2, level, prop::option::of(0u32..4)).prop_map(|(number, level, max_per_zone)| {
        PlacementGroup { name: name("spread-", number), strategy: GroupStrategy::Spread { level, max_per_zone } }
    });
    let partition =
        (0usize..2, 0u32..5, prop::option::of(0u32..6)).prop_map(|(number, count, partition)| PlacementGroup {
            name: name("partition-", number),
            strategy: GroupStrategy::Partition { count, number: partition },
        });
    let cluster = (0usize..2)
        .prop_map(|number| PlacementGroup { name: name("cluster-", number), strategy: GroupStrategy::Cluster });
    prop_oneof![3 => Just(None), 3 => prop_oneof![spread, partition, cluster].prop_map(Some)]
}

fn requests() -> impl Strategy<Value = Request<u32>> {
    let rare = |most: u32| prop_oneof![5 => Just(None), 1 => (0..most).prop_map(Some)];
    let choice = prop_oneof![Just(Choice::Pack), Just(Choice::Spread)];
    let label = prop_oneof![Just("arch"), Just("disk")];
    (
        (resources(), choice, rare(4), rare(HOSTS + 1)),
        (prop_oneof![3 => Just(vec![]), 1 => prop::collection::vec(0..HOSTS, 0..3)], rare(3), label),
        (placement_groups(), group_names(3), group_names(2), group_names(3), group_names(2)),
        rare(4),
    )
        .prop_map(|(basic, hosts, groups, image)| Request {
            resources: basic.0,
            strategy: basic.1,
            zone: basic.2.map(|zone| name("az-", zone as usize)),
            host: basic.3,
            exclude_hosts: hosts.0,
            labels: hosts.1.map(|value| (Arc::from(hosts.2), name("v", value as usize))).into_iter().collect(),
            placement_group: groups.0,
            groups: groups.1,
            affinity: groups.2,
            anti_affinity: groups.3,
            avoid_groups: groups.4,
            prefer_image: image.map(|image| name("ami-", image as usize)),
        })
}

fn reservations() -> impl Strategy<Value = Reservation> {
    (resources(), prop::option::of((0usize..2, prop::option::of(1u32..5))), group_names(3)).prop_map(
        |(resources, placement, groups)| Reservation {
            resources,
            placement_group: placement.map(|(number, partition)| (name("partition-", number), partition)),
            groups,
        },
    )
}

fn steps() -> impl Strategy<Value = Step> {
    prop_oneof![
        6 => hosts().prop_map(|host| Step::Host(Box::new(host))),
        2 => (0..HOSTS, states()).prop_map(|(host, state)| Step::State(host, state)),
        1 => (0..HOSTS, 0usize..3, any::<bool>()).prop_map(|(host, image, held)| Step::Image(host, image, held)),
        1 => (0..HOSTS).prop_map(Step::RemoveHost),
        30 => (0..ALLOCATIONS, requests()).prop_map(|(a, request)| Step::Place(a, Box::new(request))),
        3 => (prop::collection::vec(0..ALLOCATIONS, 0..8), 0usize..8, requests())
            .prop_map(|(names, min, request)| Step::PlaceMany(names, min, Box::new(request))),
        3 => (0..ALLOCATIONS, requests()).prop_map(|(a, request)| Step::Relocate(a, Box::new(request))),
        4 => (0..HOSTS, 0..ALLOCATIONS, reservations()).prop_map(|(host, a, r)| Step::Reserve(host, a, r)),
        2 => (0..ALLOCATIONS, 0..HOSTS).prop_map(|(a, host)| Step::Move(a, host)),
        8 => (0..ALLOCATIONS).prop_map(Step::Release),
    ]
}

fn check_refusal(model: &Model, problem: &NoCapacity) {
    assert_eq!(problem.hosts, model.hosts.len());
    assert_eq!(problem.eligible + problem.excluded.iter().map(|(_, count)| count).sum::<usize>(), problem.hosts);
    assert_eq!(problem.eligible > 0, problem.nearest_host.is_some());
    assert!(problem.to_string().starts_with("no capacity: "));
    if let Some(host) = &problem.nearest_host {
        let host: u32 = host.parse().unwrap();
        assert!(!problem.shortfalls.is_empty(), "a host without shortfall was not chosen: {problem:?}");
        for short in &problem.shortfalls {
            assert_eq!(short.free, model.free(host).get(short.resource));
            assert!(short.needed > short.free);
        }
    }
}

/// The scheduler's accounts are the model's.
fn compare(cloud: &Cloud, model: &Model) {
    assert_eq!(cloud.hosts().count(), model.hosts.len());
    for (id, spec) in &model.hosts {
        let view = cloud.host(id).unwrap();
        assert_eq!(view.spec, spec);
        assert_eq!(view.allocatable, model.allocatable(*id));
        assert_eq!(view.allocated, model.allocated(*id), "host {id}");
        assert_eq!(view.free, model.free(*id));
        assert_eq!(view.allocations as usize, model.on_host(*id).count());
    }
    for number in 0..ALLOCATIONS {
        let ours = cloud.allocation(&number);
        let theirs = model.allocations.get(&number);
        assert_eq!(ours.as_ref().map(|(host, _)| **host), theirs.map(|a| a.host));
        assert_eq!(ours.map(|(_, reservation)| reservation), theirs.map(|a| a.reservation.clone()));
    }
}

fn apply(cloud: &mut Cloud, model: &mut Model, step: Step) {
    match step {
        Step::Host(spec) => {
            cloud.upsert_host((*spec).clone());
            model.hosts.insert(spec.id, *spec);
        }
        Step::State(host, state) => {
            assert_eq!(cloud.set_host_state(&host, state), model.hosts.contains_key(&host));
            if let Some(spec) = model.hosts.get_mut(&host) {
                spec.state = state;
            }
        }
        Step::Image(host, image, held) => {
            let image = name("ami-", image);
            assert_eq!(cloud.set_host_image(&host, &image, held), model.hosts.contains_key(&host));
            if let Some(spec) = model.hosts.get_mut(&host) {
                if held {
                    spec.images.insert(image)
                } else {
                    spec.images.remove(&image)
                };
            }
        }
        Step::RemoveHost(host) => {
            let mut orphans = cloud.remove_host(&host);
            orphans.sort_unstable();
            let expected: Vec<u32> =
                model.allocations.iter().filter(|(_, a)| a.host == host).map(|(number, _)| *number).collect();
            assert_eq!(orphans, expected);
            model.allocations.retain(|_, a| a.host != host);
            model.hosts.remove(&host);
        }
        Step::Place(allocation, request) => {
            if let Some(present) = model.allocations.get(&allocation) {
                let again = cloud.place(allocation, &request).unwrap();
                assert!(again.existing && again.host == present.host);
                return;
            }
            let choices = model.choices(&request);
            match cloud.place(allocation, &request) {
                Ok(placement) => {
                    let chosen = (placement.host, placement.partition);
                    assert!(choices.contains(&chosen), "{chosen:?} is not among {choices:?}");
                    model.record(allocation, &request, &placement);
                    let (total, taken) = (model.allocatable(placement.host), model.allocated(placement.host));
                    for resource in hearth_scheduler::Resource::ALL {
                        let fits = taken.get(resource) <= total.get(resource) || request.resources.get(resource) == 0;
                        assert!(fits, "{resource} of host {} is over its capacity", placement.host);
                    }
                }
                Err(problem) => {
                    assert!(choices.is_empty(), "{problem}, but {choices:?} can");
                    check_refusal(model, &problem);
                }
            }
        }
        Step::PlaceMany(names, min, request) => match cloud.place_many(&names, min, &request) {
            Ok(placements) => {
                assert!(placements.len() >= min.min(names.len()));
                for (allocation, placement) in names.iter().zip(&placements) {
                    if !placement.existing {
                        model.record(*allocation, &request, placement);
                    }
                }
                if let Some(next) = names.get(placements.len()) {
                    let cluster =
                        request.placement_group.as_ref().is_some_and(|g| g.strategy == GroupStrategy::Cluster);
                    let more = !model.choices(&request).is_empty();
                    assert!(cluster || !more, "stopped although {next} had room");
                }
            }
            Err(problem) => assert!(problem.placeable < problem.wanted),
        },
        Step::Relocate(allocation, request) => {
            let mut without = model.clone();
            let old = without.allocations.remove(&allocation);
            let mut elsewhere = (*request).clone();
            elsewhere.exclude_hosts.extend(old.map(|old| old.host));
            let choices = without.choices(&elsewhere);
            match cloud.relocate(&allocation, &request) {
                Ok(placement) => {
                    assert!(choices.contains(&(placement.host, placement.partition)));
                    model.record(allocation, &request, &placement);
                }
                Err(_) => assert!(choices.is_empty()),
            }
        }
        Step::Reserve(host, allocation, reservation) => {
            assert_eq!(cloud.reserve(&host, allocation, &reservation).is_ok(), model.hosts.contains_key(&host));
            if model.hosts.contains_key(&host) {
                model.allocations.insert(allocation, model::Allocation { host, reservation });
            }
        }
        Step::Move(allocation, host) => {
            let able = model.hosts.contains_key(&host) && model.allocations.contains_key(&allocation);
            assert_eq!(cloud.move_allocation(&allocation, &host).is_ok(), able);
            if able {
                model.allocations.get_mut(&allocation).unwrap().host = host;
            }
        }
        Step::Release(allocation) => {
            assert_eq!(cloud.release(&allocation), model.allocations.remove(&allocation).is_some());
        }
    }
}

fn rebuilt(cloud: &Cloud, model: &Model) -> Cloud {
    let mut fresh = Cloud::new(Config { seed: 99, ..Config::default() });
    for spec in model.hosts.values() {
        fresh.upsert_host(spec.clone());
    }
    for number in 0..ALLOCATIONS {
        if let Some((host, reservation)) = cloud.allocation(&number) {
            fresh.reserve(host, number, &reservation).unwrap();
        }
    }
    fresh
}

proptest! {
    #[test]
    fn every_decision_is_the_exact_one(
        first in prop::collection::vec(hosts(), 1..10),
        steps in prop::collection::vec(steps(), 1..120),
        seed in any::<u64>(),
    ) {
        let mut cloud = Cloud::new(Config { seed, ..Config::default() });
        let mut model = Model::default();
        for host in first {
            apply(&mut cloud, &mut model, Step::Host(Box::new(host)));
        }
        for step in steps {
            apply(&mut cloud, &mut model, step);
            compare(&cloud, &model);
        }
        // A scheduler built anew from what this one knows has the same accounts and decides the same way.
        let mut fresh = rebuilt(&cloud, &model);
        compare(&fresh, &model);
        let request = Request::new(ResourceVector { vcpus: 1, memory_mib: 512, ..ResourceVector::default() });
        apply(&mut fresh, &mut model, Step::Place(ALLOCATIONS + 1, Box::new(request)));
        // Everything released: everything free.
        for number in 0..ALLOCATIONS {
            cloud.release(&number);
        }
        prop_assert!(cloud.hosts().all(|view| view.free == view.allocatable && view.allocations == 0));
    }

    #[test]
    fn same_seed_same_decisions(
        specs in prop::collection::vec(hosts(), 1..10),
        requests in prop::collection::vec(requests(), 1..40),
        seed in any::<u64>(),
    ) {
        let run = || {
            let mut cloud = Cloud::new(Config { seed, ..Config::default() });
            for spec in &specs {
                cloud.upsert_host(spec.clone());
            }
            (0u32..).zip(&requests).map(|(number, request)| cloud.place(number, request)).collect::<Vec<_>>()
        };
        prop_assert_eq!(run(), run());
    }
}
