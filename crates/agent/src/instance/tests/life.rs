use std::os::unix::fs::FileExt;

use super::world::*;
use crate::launch::VmmEnd;
use hearth_proto::v1::{ObservedState as State, RunState};
use hearth_types::StateReason;

#[tokio::test(start_paused = true)]
async fn an_instance_runs_stops_starts_and_is_terminated() {
    let (world, mut wanted) = (World::new(), Wanted::default());
    let agent = Agent::start(&world);
    let id = id(1);
    let layout = world.layout();
    agent.supervisor.apply(wanted.want(&id, RunState::Running));
    assert_eq!(agent.until(&id, State::Running, 1).await.boot_count, 1);
    assert!(world.table.lock().registered.contains(&id));
    std::fs::OpenOptions::new()
        .write(true)
        .open(agent.root_folder(&id).join("data"))
        .unwrap()
        .write_all_at(b"mine", 500_000)
        .unwrap();
    assert!(layout.ephemeral_disk(&id, 0).exists());

    agent.supervisor.apply(wanted.want(&id, RunState::Stopped));
    agent.until(&id, State::Stopped, 2).await;
    assert!(!world.runs(&id) && !world.table.lock().registered.contains(&id));
    assert!(!layout.ephemeral_disk(&id, 0).exists() && !layout.run(&id).exists());

    agent.supervisor.apply(wanted.want(&id, RunState::Running));
    assert_eq!(agent.until(&id, State::Running, 3).await.boot_count, 2);
    let mut kept = [0u8; 4];
    std::fs::File::open(agent.root_folder(&id).join("data")).unwrap().read_exact_at(&mut kept, 500_000).unwrap();
    assert_eq!(&kept, b"mine", "the root volume outlives a stop");

    agent.supervisor.apply(wanted.want(&id, RunState::Terminated));
    agent.until(&id, State::Gone, 4).await;
    assert!(!layout.instance(&id).exists() && !world.runs(&id));
    agent.supervisor.apply(wanted.want(&id, RunState::Terminated));
    agent.until(&id, State::Gone, 5).await;
}

#[tokio::test(start_paused = true)]
async fn a_power_off_from_inside_is_told_and_not_undone() {
    let (world, mut wanted) = (World::new(), Wanted::default());
    let agent = Agent::start(&world);
    let id = id(1);
    agent.supervisor.apply(wanted.want(&id, RunState::Running));
    agent.until(&id, State::Running, 1).await;
    world.end(&id, VmmEnd::PoweredOff);
    let report = agent.until(&id, State::Stopped, 1).await;
    assert!(report.guest_powered_off);
    assert_eq!(report.reason.unwrap().code, StateReason::INSTANCE_INITIATED_SHUTDOWN);
    tokio::time::sleep(std::time::Duration::from_secs(600)).await;
    assert!(!world.runs(&id));
    // The next agent does not undo it either.
    drop(agent);
    let agent = Agent::start(&world);
    agent.supervisor.apply_host(wanted.all());
    assert!(agent.until(&id, State::Stopped, 1).await.guest_powered_off);
    agent.supervisor.apply(wanted.want(&id, RunState::Stopped));
    assert!(!agent.until(&id, State::Stopped, 2).await.guest_powered_off);
    agent.supervisor.apply(wanted.want(&id, RunState::Running));
    agent.until(&id, State::Running, 3).await;
}

#[tokio::test(start_paused = true)]
async fn a_reboot_is_done_once_and_keeps_the_instance_store() {
    let (world, mut wanted) = (World::new(), Wanted::default());
    let agent = Agent::start(&world);
    let id = id(1);
    agent.supervisor.apply(wanted.want(&id, RunState::Running));
    agent.until(&id, State::Running, 1).await;
    let disk = world.layout().ephemeral_disk(&id, 0);
    std::fs::OpenOptions::new().write(true).open(&disk).unwrap().write_all_at(b"data", 4096).unwrap();
    for ignored in [false, true] {
        world.table.lock().guests_ignore_the_button = ignored;
        let desired = wanted.change(&id, |desired| desired.reboot_generation += 1).unwrap();
        let (generation, reboot) = (desired.generation, desired.reboot_generation);
        agent.supervisor.apply(desired);
        while agent.report(&id).observed_reboot_generation < reboot {
            assert!(matches!(agent.report(&id).state(), State::Running), "a rebooting instance counts as running");
            tokio::time::sleep(std::time::Duration::from_millis(100)).await;
        }
        let report = agent.until(&id, State::Running, generation).await;
        assert_eq!((report.boot_count, world.launches(&id)), (1 + reboot as u32, 1 + reboot as u32));
    }
    assert!(world.table.lock().presses > 5, "pressed again while the guest does not react");
    assert_eq!(&std::fs::read(&disk).unwrap()[4096..4100], b"data");
}

#[tokio::test(start_paused = true)]
async fn stop_waits_for_the_guest_unless_forced() {
    let (world, mut wanted) = (World::new(), Wanted::default());
    world.table.lock().guests_ignore_the_button = true;
    let agent = Agent::start(&world);
    for (number, force, seconds) in [(1, false, 90), (2, true, 0)] {
        let id = id(number);
        agent.supervisor.apply(wanted.want(&id, RunState::Running));
        agent.until(&id, State::Running, 1).await;
        let begun = tokio::time::Instant::now();
        wanted.want(&id, RunState::Stopped);
        agent.supervisor.apply(wanted.change(&id, |desired| desired.force = force).unwrap());
        agent.until(&id, State::Stopped, 3).await;
        let took = begun.elapsed().as_secs();
        assert!((seconds..seconds + 5).contains(&took), "{took} s");
    }
    // A stop that is under way can be hurried up.
    let id = id(1);
    agent.supervisor.apply(wanted.want(&id, RunState::Running));
    agent.until(&id, State::Running, 4).await;
    let begun = tokio::time::Instant::now();
    agent.supervisor.apply(wanted.want(&id, RunState::Stopped));
    agent.until(&id, State::Stopping, 5).await;
    agent.supervisor.apply(wanted.want(&id, RunState::Terminated));
    agent.until(&id, State::Gone, 6).await;
    assert!(begun.elapsed().as_secs() < 15);
}

#[tokio::test(start_paused = true)]
async fn a_guest_that_resets_or_crashes_comes_back_a_vmm_that_dies_five_times_does_not() {
    let (world, mut wanted) = (World::new(), Wanted::default());
    let agent = Agent::start(&world);
    let id = id(1);
    agent.supervisor.apply(wanted.want(&id, RunState::Running));
    agent.until(&id, State::Running, 1).await;
    let mut boots = 1;
    for end in [VmmEnd::Reset, VmmEnd::GuestCrashed, VmmEnd::Died] {
        world.end(&id, end);
        boots += 1;
        while world.launches(&id) < boots || agent.report(&id).boot_count < boots {
            tokio::time::sleep(std::time::Duration::from_millis(100)).await;
        }
        assert_eq!(agent.until(&id, State::Running, 1).await.boot_count, boots);
    }
    while agent.report(&id).state() != State::Failed {
        world.end(&id, VmmEnd::Died);
        tokio::time::sleep(std::time::Duration::from_millis(100)).await;
    }
    assert_eq!(world.launches(&id), boots + 4);
    assert!(agent.report(&id).reason.unwrap().message.contains("does not stay up"));
    // Wanting it again is enough.
    agent.supervisor.apply(wanted.want(&id, RunState::Running));
    agent.until(&id, State::Running, 2).await;
}

#[tokio::test(start_paused = true)]
async fn what_cannot_start_is_reported_with_its_reason() {
    let (world, mut wanted) = (World::new(), Wanted::default());
    let agent = Agent::start(&world);
    type Change = fn(&mut hearth_proto::v1::InstanceSpec);
    let cases: [(Change, &str, &str); 3] = [
        (|spec| spec.resources.as_mut().unwrap().memory_mib = 4096, StateReason::INSUFFICIENT_CAPACITY, "memory"),
        (|spec| spec.root_device_name = "/dev/xvda".into(), StateReason::INTERNAL_ERROR, "root device"),
        (
            |spec| spec.boot.get_or_insert_default().cmdline = "x".repeat(3000),
            StateReason::INVALID_IMAGE,
            "command line",
        ),
    ];
    for (number, (change, code, text)) in (1..).zip(cases) {
        let id = id(number);
        wanted.want(&id, RunState::Running);
        agent.supervisor.apply(wanted.change(&id, |desired| change(desired.spec.as_mut().unwrap())).unwrap());
        let reason = agent.until(&id, State::Failed, 2).await.reason.unwrap();
        assert!(reason.code == code && reason.message.contains(text), "{reason:?}");
        agent.supervisor.apply(wanted.want(&id, RunState::Terminated));
        agent.until(&id, State::Gone, 3).await;
    }
    // The host's own failures are tried again a few times.
    let id = id(9);
    world.table.lock().failing_launches = 4;
    agent.supervisor.apply(wanted.want(&id, RunState::Running));
    agent.until(&id, State::Running, 1).await;
    world.table.lock().failing_launches = 100;
    world.end(&id, VmmEnd::Died);
    let reason = agent.until(&id, State::Failed, 1).await.reason.unwrap();
    assert!(reason.message.contains("told to fail"), "{reason:?}");
}

#[tokio::test(start_paused = true)]
async fn a_root_volume_that_a_guest_has_spoiled_is_not_the_images_fault() {
    let (world, mut wanted) = (World::new(), Wanted::default());
    let agent = Agent::start(&world);
    let id = id(1);
    agent.supervisor.apply(wanted.want(&id, RunState::Running));
    agent.until(&id, State::Running, 1).await;
    agent.supervisor.apply(wanted.want(&id, RunState::Stopped));
    agent.until(&id, State::Stopped, 2).await;
    let root = agent.root_folder(&id);
    let kept = world.layout().state_root().join("kept");
    let copied = std::process::Command::new("cp").arg("-a").args([&root, &kept]).status();
    assert!(copied.unwrap().success());
    agent.wipe_root(&id).await;
    agent.supervisor.apply(wanted.want(&id, RunState::Running));
    let reason = agent.until(&id, State::Failed, 3).await.reason.unwrap();
    assert_eq!(reason.code, StateReason::CLIENT_INTERNAL_ERROR);
    assert!(reason.message.contains("does not boot any more: the root disk has neither"), "{reason:?}");
    // One that is gone is not made anew.
    std::fs::remove_dir_all(&root).unwrap();
    agent.supervisor.apply(wanted.want(&id, RunState::Running));
    let reason = agent.until(&id, State::Failed, 4).await.reason.unwrap();
    assert!(reason.message.contains("the host has lost it") && !root.exists(), "{reason:?}");
    // Restored, it starts again.
    std::fs::rename(&kept, &root).unwrap();
    agent.supervisor.apply(wanted.want(&id, RunState::Running));
    assert_eq!(agent.until(&id, State::Running, 5).await.boot_count, 2);
}

#[tokio::test(start_paused = true)]
async fn an_object_store_that_cannot_be_reached_is_waited_for() {
    let (world, mut wanted) = (World::new(), Wanted::default());
    let link = std::sync::Arc::new(crate::link::Link::default());
    let agent = Agent::start_with(&world, std::sync::Arc::new(crate::storage::RemoteObjects(link)));
    let id = id(1);
    wanted.want(&id, RunState::Running);
    agent.supervisor.apply(wanted.change(&id, |_| ()).unwrap());
    for _ in 0..50 {
        tokio::time::sleep(std::time::Duration::from_secs(10)).await;
        assert_eq!(agent.report(&id).state(), State::Preparing);
    }
    agent.supervisor.apply(wanted.want(&id, RunState::Terminated));
    agent.until(&id, State::Gone, 3).await;
}

#[tokio::test(start_paused = true)]
async fn running_guests_go_on_without_agent_and_are_adopted() {
    let (world, mut wanted) = (World::new(), Wanted::default());
    let agent = Agent::start(&world);
    let ids = [id(1), id(2), id(3)];
    for id in &ids {
        agent.supervisor.apply(wanted.want(id, RunState::Running));
        agent.until(id, State::Running, 1).await;
    }
    drop(agent);
    world.end(&ids[1], VmmEnd::PoweredOff);
    world.end(&ids[2], VmmEnd::Reset);
    let agent = Agent::start(&world);
    // Without a word of the control plane.
    assert_eq!(agent.until(&ids[0], State::Running, 1).await.boot_count, 1);
    assert!(agent.until(&ids[1], State::Stopped, 1).await.guest_powered_off);
    while agent.report(&ids[2]).boot_count < 2 {
        tokio::time::sleep(std::time::Duration::from_millis(100)).await;
    }
    agent.until(&ids[2], State::Running, 1).await;
    assert_eq!(ids.each_ref().map(|id| world.launches(id)), [1, 1, 2]);
    assert!(world.table.lock().registered.contains(&ids[0]), "DHCP and metadata go on");
}

#[tokio::test(start_paused = true)]
async fn a_guest_answers_by_its_lease() {
    let (world, mut wanted) = (World::new(), Wanted::default());
    let agent = Agent::start(&world);
    let id = id(1);
    agent.supervisor.apply(wanted.want(&id, RunState::Running));
    assert!(!agent.until(&id, State::Running, 1).await.guest_responded);
    world.table.lock().lease = true;
    while !agent.report(&id).guest_responded {
        tokio::time::sleep(std::time::Duration::from_millis(100)).await;
    }
}

#[tokio::test(start_paused = true)]
async fn older_wishes_and_unreadable_records_change_nothing() {
    let (world, mut wanted) = (World::new(), Wanted::default());
    let agent = Agent::start(&world);
    let (one, two) = (id(1), id(2));
    let old = wanted.want(&one, RunState::Terminated);
    wanted.0.clear();
    wanted.want(&one, RunState::Running);
    agent.supervisor.apply(wanted.want(&one, RunState::Running));
    agent.until(&one, State::Running, 2).await;
    agent.supervisor.apply(old);
    agent.supervisor.apply(wanted.want(&two, RunState::Running));
    agent.until(&two, State::Running, 1).await;
    assert!(world.runs(&one));
    let root = agent.root_folder(&one);
    drop(agent);
    std::fs::write(world.layout().record(&one), b"{ damaged").unwrap();
    let agent = Agent::start(&world);
    let report = agent.until(&one, State::Failed, 0).await;
    assert!(report.reason.unwrap().message.contains("damaged"));
    assert!(world.runs(&one) && root.exists(), "left for the operator");
    agent.until(&two, State::Running, 1).await;
    agent.supervisor.apply_host(wanted.all());
    let report = agent.until(&one, State::Failed, 2).await;
    assert!(report.reason.unwrap().message.contains("cannot be read"));
    assert_eq!(world.launches(&one), 1);
    agent.supervisor.apply(wanted.want(&one, RunState::Terminated));
    agent.until(&one, State::Gone, 3).await;
    assert!(!world.runs(&one) && !world.layout().instance(&one).exists());
}

#[tokio::test(start_paused = true)]
async fn a_stop_that_has_begun_is_finished_by_the_next_agent_before_a_start() {
    let (world, mut wanted) = (World::new(), Wanted::default());
    world.table.lock().guests_ignore_the_button = true;
    let agent = Agent::start(&world);
    let id = id(1);
    agent.supervisor.apply(wanted.want(&id, RunState::Running));
    agent.until(&id, State::Running, 1).await;
    let disk = world.layout().ephemeral_disk(&id, 0);
    std::fs::OpenOptions::new().write(true).open(&disk).unwrap().write_all_at(b"old", 0).unwrap();
    agent.supervisor.apply(wanted.want(&id, RunState::Stopped));
    agent.until(&id, State::Stopping, 2).await;
    drop(agent);
    let agent = Agent::start(&world);
    agent.supervisor.apply(wanted.want(&id, RunState::Running));
    assert_eq!(agent.until(&id, State::Running, 3).await.boot_count, 2);
    assert_eq!(&std::fs::read(&disk).unwrap()[..3], &[0; 3], "instance store does not outlive a stop");
}
