use proptest::prelude::*;

use super::*;

fn ebs(device: &str, snapshot: &str, gib: u64) -> v1::BlockDeviceMapping {
    v1::BlockDeviceMapping {
        device_name: device.into(),
        ebs: Some(v1::EbsBlockDevice {
            snapshot_id: snapshot.into(),
            volume_size_bytes: gib << 30,
            ..Default::default()
        }),
        ..Default::default()
    }
}

fn ephemeral(device: &str, name: &str) -> v1::BlockDeviceMapping {
    v1::BlockDeviceMapping { device_name: device.into(), virtual_name: name.into(), ..Default::default() }
}

#[test]
fn a_launch_overrides_device_by_device() {
    let mut root = ebs("/dev/sda1", "snap-a", 4);
    root.ebs.as_mut().unwrap().delete_on_termination = Some(false);
    let image = [root, ebs("/dev/sdf", "snap-b", 8), ephemeral("/dev/sdb", "ephemeral0")];
    let mut larger = ebs("/dev/sda1", "", 20);
    larger.ebs.as_mut().unwrap().volume_type = "gp2".into();
    let gone = v1::BlockDeviceMapping { device_name: "/dev/sdb".into(), no_device: true, ..Default::default() };
    let launch = [larger, ebs("/dev/sdf", "snap-c", 0), gone, ebs("/dev/sdg", "", 1)];
    check(&launch).unwrap();
    let merged = merge(&image, &launch);
    let of = |device: &str| merged.iter().find(|mapping| mapping.device_name == device).and_then(|m| m.ebs.clone());
    let root = of("/dev/sda1").unwrap();
    assert_eq!(
        (root.snapshot_id.as_str(), root.volume_size_bytes >> 30, root.volume_type.as_str()),
        ("snap-a", 20, "gp2")
    );
    assert_eq!(root.delete_on_termination, Some(false));
    let other = of("/dev/sdf").unwrap();
    assert_eq!((other.snapshot_id.as_str(), other.volume_size_bytes), ("snap-c", 0));
    assert!(of("/dev/sdg").is_some());
    assert!(merged.iter().all(|mapping| mapping.device_name != "/dev/sdb"));
}

#[test]
fn senseless_mappings_are_refused_by_name() {
    let both = v1::BlockDeviceMapping { virtual_name: "ephemeral0".into(), ..ebs("/dev/sdf", "", 1) };
    let none = v1::BlockDeviceMapping { device_name: "/dev/sdf".into(), ..Default::default() };
    let cases = [
        (vec![both], "exactly one"),
        (vec![none], "exactly one"),
        (vec![ebs("/dev/sdf", "", 1), ebs("/dev/sdf", "", 1)], "named twice"),
        (vec![ebs("sdf", "", 1)], "no device name"),
        (vec![ephemeral("/dev/sdb", "ephemeral24")], "ephemeral0"),
        (vec![ephemeral("/dev/sdb", "ephemeral01")], "ephemeral0"),
    ];
    for (mappings, words) in cases {
        let error = check(&mappings).unwrap_err().to_string();
        assert!(error.contains(words), "{error}");
    }
}

fn any_mapping() -> impl Strategy<Value = v1::BlockDeviceMapping> {
    let device = prop::sample::select(vec!["/dev/sda1", "/dev/sdb", "/dev/sdf", "/dev/sdg"]);
    let ebs = (
        0..40u64,
        prop::sample::select(vec!["", "gp3", "gp2", "io2"]),
        prop::option::of(3000..9000u32),
        any::<Option<bool>>(),
    )
        .prop_map(|(gib, kind, iops, delete_on_termination)| v1::EbsBlockDevice {
            volume_size_bytes: gib << 30,
            volume_type: kind.into(),
            iops,
            delete_on_termination,
            ..Default::default()
        });
    (device, prop_oneof![ebs.prop_map(Some), Just(None)], 0..26u32).prop_map(|(device, ebs, number)| {
        let blank = v1::BlockDeviceMapping { device_name: device.into(), ..Default::default() };
        match ebs {
            Some(ebs) => v1::BlockDeviceMapping { ebs: Some(ebs), ..blank },
            None if number > 20 => v1::BlockDeviceMapping { no_device: true, ..blank },
            None => v1::BlockDeviceMapping { virtual_name: format!("ephemeral{number}"), ..blank },
        }
    })
}

/// A list that passes the check.
fn any_list() -> impl Strategy<Value = Vec<v1::BlockDeviceMapping>> {
    prop::collection::vec(any_mapping(), 0..5).prop_map(|mut list| {
        list.sort_by(|a, b| a.device_name.cmp(&b.device_name));
        list.dedup_by(|a, b| a.device_name == b.device_name);
        list
    })
}

proptest! {
    #[test]
    fn merging_keeps_each_device_once_and_the_launch_has_the_last_word(image in any_list(), launch in any_list()) {
        check(&launch).unwrap();
        let merged = merge(&image, &launch);
        check(&merged).unwrap();
        prop_assert!(merged.iter().all(|mapping| !mapping.no_device));
        let of = |list: &[v1::BlockDeviceMapping], device: &str| list.iter().find(|m| m.device_name == device).cloned();
        for device in ["/dev/sda1", "/dev/sdb", "/dev/sdf", "/dev/sdg"] {
            let (below, above, now) = (of(&image, device), of(&launch, device), of(&merged, device));
            match (below, above) {
                (below, None) => prop_assert_eq!(now, below.filter(|below| !below.no_device)),
                (_, Some(above)) if above.no_device => prop_assert_eq!(now, None),
                (Some(v1::BlockDeviceMapping { ebs: Some(below), .. }), Some(v1::BlockDeviceMapping { ebs: Some(above), .. })) => {
                    let now = now.unwrap().ebs.unwrap();
                    let size = if above.volume_size_bytes == 0 { below.volume_size_bytes } else { above.volume_size_bytes };
                    prop_assert_eq!(now.volume_size_bytes, size);
                    prop_assert_eq!(now.delete_on_termination, above.delete_on_termination.or(below.delete_on_termination));
                    let same_kind = above.volume_type.is_empty() || above.volume_type == below.volume_type;
                    prop_assert_eq!(now.iops, above.iops.or(below.iops.filter(|_| same_kind)));
                }
                (_, above) => prop_assert_eq!(now, above),
            }
        }
        // Nothing on top changes nothing more.
        prop_assert_eq!(merge(&merged, &[]), merged);
    }

    #[test]
    fn plans_begin_with_the_root_and_hold_each_disk_once(merged in any_list(), disks in 0..24usize) {
        let merged = merge(&merged, &[]);
        let planned = plan(&Tables::default(), "account", Root::Ebs("/dev/sda1"), &merged, disks);
        let Ok(planned) = planned else { return Ok(()) };
        prop_assert_eq!(planned.volumes[0].device_name.as_str(), "/dev/sda1");
        let names: Vec<_> = planned.volumes.iter().skip(1).map(|volume| volume.device_name.clone()).collect();
        prop_assert!(names.is_sorted());
        prop_assert_eq!(planned.volumes.len(), merged.iter().filter(|mapping| mapping.ebs.is_some()).count());
        let mut numbers: Vec<_> = planned.ephemeral.iter().map(|(_, number)| *number).collect();
        numbers.sort_unstable();
        prop_assert!(numbers.windows(2).all(|pair| pair[0] < pair[1]) && numbers.iter().all(|number| *number < disks));
        for volume in &planned.volumes {
            let mapped = merged.iter().find(|mapping| mapping.device_name == volume.device_name).unwrap();
            let ebs = mapped.ebs.as_ref().unwrap();
            prop_assert_eq!(volume.shape.size_bytes, ebs.volume_size_bytes);
            let is_root = volume.device_name == "/dev/sda1";
            prop_assert_eq!(volume.delete_on_termination, ebs.delete_on_termination.unwrap_or(is_root));
        }
    }
}

#[test]
fn what_cannot_be_planned_is_refused_by_device() {
    let tables = Tables::default();
    let root = ebs("/dev/sda1", "", 1);
    for (mappings, words) in [
        (vec![], "no volume"),
        (vec![ephemeral("/dev/sda1", "ephemeral0")], "no volume"),
        (vec![root.clone(), ephemeral("/dev/sdb", "ephemeral0"), ephemeral("/dev/sdc", "ephemeral0")], "mapped twice"),
        (vec![root.clone(), ebs("/dev/sdf", "", 0)], "size_bytes"),
        (vec![root, ebs("/dev/sdf", "snap-0123456789abcdef0", 1)], "does not exist"),
    ] {
        let error = plan(&tables, "account", Root::Ebs("/dev/sda1"), &mappings, 4).err().unwrap().to_string();
        assert!(error.contains(words), "{error}");
    }
}
