use super::*;
use proptest::prelude::*;

fn ebs(text: &str) -> Ebs {
    match parse_mapping(text).unwrap().content {
        Content::Ebs(ebs) => ebs,
        other => panic!("{other:?}"),
    }
}

#[test]
fn a_mapping_is_one_of_three_kinds() {
    let all = "device=/dev/sdf,size=10G,type=gp3,iops=3000,throughput=250,snapshot=snap-1,delete-on-termination=true,encrypted=false";
    let wanted = Ebs {
        size: Some(10 << 30),
        volume_type: Some(VolumeType::Gp3),
        iops: Some(3000),
        throughput: Some(250),
        snapshot: Some("snap-1".to_owned()),
        delete_on_termination: Some(true),
        encrypted: Some(false),
    };
    assert_eq!(parse_mapping(all), Ok(Mapping { device: "/dev/sdf".to_owned(), content: Content::Ebs(wanted) }));
    assert_eq!(ebs("delete-on-termination=false,device=/dev/sda1").delete_on_termination, Some(false));
    assert_eq!(ebs("device=/dev/sdf,iops=0,size=1TiB"), Ebs { size: Some(1 << 40), iops: Some(0), ..Ebs::default() });
    let store = parse_mapping("device=/dev/sdb,virtual=ephemeral0").unwrap();
    assert_eq!(store.content, Content::Virtual("ephemeral0".to_owned()));
    assert_eq!(parse_mapping("device=/dev/sdb,none").unwrap().content, Content::None);
}

#[test]
fn a_mistake_is_told_with_the_key() {
    for (text, told) in [
        ("", "nothing between"),
        ("/dev/sdf,size=10G", "device=/dev/sdf"),
        ("size=10G", "device is missing"),
        ("device=/dev/sdf", "say what is there"),
        ("device=sdf,size=10G", "no device name"),
        ("device=/dev/sdf,size=10", "write it as 10G"),
        ("device=/dev/sdf,size=0.5G", "size: "),
        ("device=/dev/sdf,size=", "the value of size is missing"),
        ("device=/dev/sdf,type=gp4", "gp4"),
        ("device=/dev/sdf,size=1G,iops=-1", "iops: '-1'"),
        ("device=/dev/sdf,size=1G,size=1G", "size is said twice"),
        ("device=/dev/sdf,device=/dev/sdg,size=1G", "device is said twice"),
        ("device=/dev/sdf,size=1G,delete-on-termination=yes", "neither true nor false"),
        ("device=/dev/sdf,volume-size=1G", "unknown key 'volume-size'"),
        ("device=/dev/sdf,size=1G,", "nothing between"),
        ("device=/dev/sdf,none,size=1G", "none goes with device only"),
        ("device=/dev/sdf,none,virtual=ephemeral0", "none goes with device only"),
        ("device=/dev/sdf,none=true", "without a value"),
        ("device=/dev/sdf,none,none", "none is said twice"),
        ("device=/dev/sdf,virtual=ephemeral0,size=1G", "virtual goes with device only"),
        ("device=/dev/sdf,virtual=ephemeral24", "ephemeral23"),
        ("device=/dev/sdf,virtual=ephemeral00", "ephemeral23"),
        ("device=/dev/sdf,virtual=ephemeral+1", "ephemeral23"),
    ] {
        let error = parse_mapping(text).unwrap_err();
        assert!(error.contains(told), "{text}: {error}");
    }
}

#[test]
fn a_switch_names_a_device() {
    let switch = |device: &str, on| Ok(DeviceSwitch { device: device.to_owned(), on });
    assert_eq!(parse_device_switch("/dev/sdf=true"), switch("/dev/sdf", true));
    assert_eq!(parse_device_switch("/dev/sda1=false"), switch("/dev/sda1", false));
    for wrong in ["/dev/sdf", "/dev/sdf=yes", "sdf=true", "=true", ""] {
        assert!(parse_device_switch(wrong).is_err(), "{wrong}");
    }
}

/// A mapping in words, its pieces in any order.
fn written(mapping: &Mapping, turn: usize) -> String {
    let mut pieces = vec![format!("device={}", mapping.device)];
    match &mapping.content {
        Content::None => pieces.push("none".to_owned()),
        Content::Virtual(name) => pieces.push(format!("virtual={name}")),
        Content::Ebs(ebs) => {
            pieces.extend(ebs.size.map(|size| format!("size={}G", size >> 30)));
            pieces.extend(ebs.volume_type.map(|kind| format!("type={kind}")));
            pieces.extend(ebs.iops.map(|iops| format!("iops={iops}")));
            pieces.extend(ebs.throughput.map(|mibps| format!("throughput={mibps}")));
            pieces.extend(ebs.snapshot.iter().map(|snapshot| format!("snapshot={snapshot}")));
            pieces.extend(ebs.delete_on_termination.map(|on| format!("delete-on-termination={on}")));
            pieces.extend(ebs.encrypted.map(|on| format!("encrypted={on}")));
        }
    }
    let turn = turn % pieces.len();
    pieces.rotate_left(turn);
    pieces.join(",")
}

fn any_mapping() -> impl Strategy<Value = Mapping> {
    let ebs = (
        prop::option::of(1u64..65_536),
        prop::option::of(prop::sample::select(VolumeType::ALL.to_vec())),
        any::<Option<u32>>(),
        any::<Option<u32>>(),
        prop::option::of("[a-z][a-z0-9=-]{0,20}"),
        any::<Option<bool>>(),
        any::<Option<bool>>(),
    );
    let ebs = ebs.prop_map(|(gib, volume_type, iops, throughput, snapshot, delete_on_termination, encrypted)| Ebs {
        size: gib.map(|gib| gib << 30),
        volume_type,
        iops,
        throughput,
        snapshot,
        delete_on_termination,
        encrypted,
    });
    let content = prop_oneof![
        Just(Content::None),
        (0u8..24).prop_map(|number| Content::Virtual(format!("ephemeral{number}"))),
        ebs.prop_filter("says nothing", |ebs| *ebs != Ebs::default()).prop_map(Content::Ebs),
    ];
    ("/dev/sd[a-z]", content).prop_map(|(device, content)| Mapping { device, content })
}

proptest! {
    #[test]
    fn what_is_written_is_read(mapping in any_mapping(), turn in 0usize..8) {
        prop_assert_eq!(parse_mapping(&written(&mapping, turn)), Ok(mapping));
    }

    #[test]
    fn no_text_breaks_the_parser(text in "\\PC{0,60}", keys in "((device|size|type|none|virtual|iops)=?[/a-z0-9]{0,8},?){0,5}") {
        let _ = (parse_mapping(&text), parse_mapping(&keys), parse_device_switch(&text));
    }

    #[test]
    fn a_piece_said_twice_is_refused(mapping in any_mapping(), which in 0usize..8) {
        let text = written(&mapping, 0);
        let pieces: Vec<&str> = text.split(',').collect();
        let again = pieces[which % pieces.len()];
        let twice = format!("{text},{again}");
        prop_assert!(parse_mapping(&twice).is_err());
    }
}
