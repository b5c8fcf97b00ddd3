use proptest::prelude::*;

use super::*;

const VOLUME: &str = "vol-0123456789abcdef0";

fn host_volume(id: &str, generation: u64) -> v1::HostVolume {
    v1::HostVolume { volume_id: id.into(), attach_generation: generation, size_bytes: 1 << 30, ..Default::default() }
}

fn volume(id: &str) -> rec::VolumeSpec {
    rec::VolumeSpec { volume_id: id.into(), volume: Some(host_volume(id, 0)), ..Default::default() }
}

fn instance(volumes: Vec<v1::AttachedVolume>) -> rec::InstanceSpec {
    rec::InstanceSpec {
        instance_id: "i-1".into(),
        host_id: "h-1".into(),
        run: v1::RunState::Running.into(),
        run_generation: 1,
        generation: 1,
        spec: Some(v1::InstanceSpec { volumes, ..Default::default() }),
        ..Default::default()
    }
}

fn slot(id: &str, generation: u64, detach: v1::DetachWish) -> v1::AttachedVolume {
    v1::AttachedVolume {
        device_name: id.into(),
        volume: Some(host_volume(id, generation)),
        detach: detach.into(),
        detach_attempt: 0,
    }
}

fn report(id: &str, generation: u64, state: Seen) -> v1::AttachedVolumeReport {
    v1::AttachedVolumeReport {
        volume_id: id.into(),
        attach_generation: generation,
        state: state.into(),
        ..Default::default()
    }
}

fn any_wish() -> impl Strategy<Value = v1::DetachWish> {
    prop_oneof![Just(v1::DetachWish::Unspecified), Just(v1::DetachWish::Ask), Just(v1::DetachWish::Force)]
}

fn any_seen() -> impl Strategy<Value = Seen> {
    prop_oneof![
        Just(Seen::Unspecified),
        Just(Seen::Attaching),
        Just(Seen::Attached),
        Just(Seen::Detaching),
        Just(Seen::Busy),
        Just(Seen::Detached),
        Just(Seen::Failed),
    ]
}

#[test]
fn states_follow_from_wishes_in_the_order_of_their_weight() {
    let mut spec = volume(VOLUME);
    assert_eq!(state_of(&spec), VolumeState::Available);
    spec.instance_id = "i-1".into();
    assert_eq!(state_of(&spec), VolumeState::InUse);
    spec.error = "lost".into();
    assert_eq!(state_of(&spec), VolumeState::Error);
    spec.deleting = true;
    assert_eq!(state_of(&spec), VolumeState::Deleting);
}

#[test]
fn a_release_outlives_the_attachment_that_began_it() {
    let spec = rec::VolumeSpec {
        releasing: true,
        release_epoch: 3,
        generation: 5,
        host_id: "h-1".into(),
        ..want_attached(&volume(VOLUME), "i-1", "/dev/sdf", true, 1)
    };
    let off = detached(&spec);
    assert!(off.releasing && off.instance_id.is_empty() && !off.delete_on_termination);
    assert_eq!((off.release_epoch, off.generation, off.host_id.as_str()), (3, 5, "h-1"));
    let ended = instance_ended(&spec);
    assert!(ended.deleting, "DeleteOnTermination holds for one that is on its way, too");
    assert_eq!(ended.generation, 6, "the host has to hear of it");
    let lost = lost(&spec, "was removed");
    assert!(!lost.releasing && lost.error.contains("h-1"));
}

proptest! {
    #[test]
    fn placing_counts_up_in_both_records(generation in 0..u64::MAX, others in 0..4usize) {
        let others: Vec<_> = (0..others).map(|n| slot(&format!("vol-{n}"), 1, v1::DetachWish::Unspecified)).collect();
        let before = others.len();
        let mut with = instance(others);
        let mut spec = want_attached(&volume(VOLUME), "i-1", "/dev/sdf", false, 7);
        spec.volume = Some(host_volume(VOLUME, generation));
        place(&mut spec, &mut with);
        let placed = super::slot(&with, VOLUME).unwrap();
        prop_assert_eq!(placed.volume.as_ref(), spec.volume.as_ref());
        prop_assert_eq!(spec.volume.as_ref().unwrap().attach_generation, generation + 1);
        prop_assert_eq!((spec.host_id.as_str(), spec.releasing), ("h-1", false));
        prop_assert_eq!(with.generation, 2);
        // Placing twice leaves one place.
        place(&mut spec, &mut with);
        prop_assert_eq!(with.spec.unwrap().volumes.len(), before + 1);
    }

    #[test]
    fn only_what_is_to_go_and_is_off_leaves(
        slots in prop::collection::vec((any_wish(), 1..4u64), 0..6),
        reports in prop::collection::vec((0..6usize, 1..4u64, any_seen()), 0..12),
        stopped: bool,
    ) {
        let name = |number: usize| format!("vol-{number}");
        let volumes = slots.iter().enumerate().map(|(n, (wish, generation))| slot(&name(n), *generation, *wish)).collect();
        let with = instance(volumes);
        let reports: Vec<_> = reports.iter().map(|(n, generation, seen)| report(&name(*n), *generation, *seen)).collect();
        let expected: Vec<String> = slots
            .iter()
            .enumerate()
            .filter(|(n, (wish, generation))| {
                let off = reports.iter().any(|seen| {
                    seen.volume_id == name(*n) && seen.attach_generation == *generation && seen.state() == Seen::Detached
                });
                *wish != v1::DetachWish::Unspecified && (stopped || off)
            })
            .map(|(n, _)| name(n))
            .collect();
        match take_detached(&with, &reports, stopped) {
            None => prop_assert!(expected.is_empty()),
            Some((new, gone)) => {
                prop_assert_eq!(&gone, &expected);
                prop_assert_eq!(new.generation, with.generation + 1);
                let left = new.spec.unwrap().volumes;
                prop_assert_eq!(left.len() + gone.len(), slots.len());
                prop_assert!(left.iter().all(|slot| !gone.iter().any(|id| id == id_of(slot))));
            }
        }
    }

    #[test]
    fn reports_of_other_attachments_say_nothing(seen in any_seen(), wish in any_wish(), there in 1..5u64, told in 1..5u64) {
        let with = instance(vec![slot(VOLUME, there, wish)]);
        let status = |volumes| rec::InstanceStatus { reached_generation: 1, volumes, ..Default::default() };
        let of_none = attachment_state(&with, Some(&status(vec![])), VOLUME);
        let shown = attachment_state(&with, Some(&status(vec![report(VOLUME, told, seen)])), VOLUME);
        if told != there {
            prop_assert_eq!(shown, of_none);
        }
        let expected = match (wish, seen) {
            _ if told != there => of_none,
            (v1::DetachWish::Unspecified, Seen::Attached) => AttachmentState::Attached,
            (v1::DetachWish::Unspecified, _) => AttachmentState::Attaching,
            (_, Seen::Busy) => AttachmentState::Busy,
            _ => AttachmentState::Detaching,
        };
        prop_assert_eq!(shown, expected);
    }

    #[test]
    fn an_instance_with_content_stays_where_it_is(generations in prop::collection::vec(0..4u64, 0..4)) {
        let volumes = generations.iter().map(|n| slot("vol-a", *n, v1::DetachWish::Unspecified)).collect();
        prop_assert_eq!(are_untouched(&instance(volumes)), generations.iter().all(|generation| *generation <= 1));
    }
}
