//! Volumes, snapshots, images of them and the object store: the built program against a control plane in this process.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::indexing_slicing, clippy::panic, missing_docs)]

mod support;

use std::os::unix::fs::MetadataExt;

use hearth_proto::v1::export_image_response::Message as Export;
use hearth_proto::v1::{
    AttachmentState, DeleteOnTermination, Image, InstanceState, ModifyVolumeRequest, Progress, SnapshotState,
    StateReason, VolumeModification, VolumeState,
};
use support::storage::{attached, snapshot, snapshot_id, volume, volume_id};
use support::{Bed, instance};
use tonic::{Code, Status};
use tonic_types::{ErrorDetails, StatusExt};

fn refusal(code: Code, reason: &str, message: &str) -> Option<Status> {
    Some(Status::with_error_details(code, message, ErrorDetails::with_error_info(reason, "hearth.v1", [])))
}

fn image(number: u32, name: &str) -> Image {
    Image { image_id: format!("ami-{number:017x}"), name: name.to_owned(), ..Image::default() }
}

#[tokio::test]
async fn a_volume_is_made_as_asked_and_waited_for() {
    let bed = Bed::new().await;
    bed.state().storage.snapshots = vec![snapshot(5, "nightly", SnapshotState::Completed)];
    bed.state()
        .storage
        .volume_watches
        .push_back(vec![volume(0x77, "", VolumeState::Creating), volume(0x77, "", VolumeState::Available)]);
    let line = "volume create --size 20G --snapshot nightly --type io2 --iops 1000 --throughput 0 --name data --tag a=b --wait -o json";
    let said = bed.run(&line.split(' ').collect::<Vec<_>>()).await;
    assert_eq!(said.code, 0, "{said:?}");
    let made: serde_json::Value = serde_json::from_str(&said.out).unwrap();
    assert_eq!((&made[0]["volume_id"], &made[0]["state"]), (&volume_id(0x77).into(), &"available".into()));
    assert!(said.err.contains("creating") && said.err.contains("available"), "{}", said.err);
    let asked = bed.state().storage.volumes_created[0].clone();
    assert_eq!((asked.size_bytes, asked.snapshot_id.as_str()), (20 << 30, snapshot_id(5).as_str()));
    assert_eq!((asked.iops, asked.throughput_mibps, asked.client_token.len()), (Some(1000), Some(0), 32));
    assert_eq!((asked.volume_type.as_str(), asked.tags.len()), ("io2", 2));
    for wrong in ["volume create", "volume create --size 10", "volume create --size 10G --type gp4", "volume modify x"]
    {
        assert_eq!(bed.run(&wrong.split(' ').collect::<Vec<_>>()).await.code, 2, "{wrong}");
    }
    bed.state().failure = refusal(Code::FailedPrecondition, "DryRunOperation", "would have succeeded");
    let said = bed.run(&["volume", "create", "--size", "1G", "--dry-run"]).await;
    assert!(said.code == 0 && said.out.contains("it would have worked"), "{said:?}");
}

#[tokio::test]
async fn volumes_and_snapshots_are_named_by_id_beginning_or_name() {
    let bed = Bed::new().await;
    let state = |bed: &Bed| {
        let mut state = bed.state();
        state.storage.volumes = vec![
            volume(1, "data", VolumeState::Available),
            volume(2, "twin", VolumeState::Available),
            volume(3, "twin", VolumeState::InUse),
            volume(4, "again", VolumeState::Deleting),
            volume(5, "again", VolumeState::Available),
        ];
        state.storage.snapshots = vec![snapshot(1, "nightly", SnapshotState::Completed)];
    };
    state(&bed);
    let show = async |noun: &str, what: &str| bed.run(&[noun, "describe", what, "-o", "id"]).await;
    assert_eq!(show("volume", "data").await.out, volume_id(1) + "\n");
    assert_eq!(show("volume", "again").await.out, volume_id(5) + "\n");
    assert_eq!(show("snapshot", "nightly").await.out, snapshot_id(1) + "\n");
    assert_eq!(show("volume", "vol-0000").await.code, 4);
    let twin = show("volume", "twin").await;
    assert!(twin.code == 4 && twin.err.contains("(in-use, twin)"), "{twin:?}");
    let nobody = show("snapshot", "nobody").await;
    assert!(nobody.code == 3 && nobody.err.contains("hearth snapshot list"), "{nobody:?}");
    let table = bed.run(&["volume", "list"]).await.out;
    assert!(table.starts_with("VOLUME") && table.lines().count() == 6, "{table}");
}

#[tokio::test]
async fn attaching_waits_for_the_guest_and_tells_where_the_disk_is() {
    let bed = Bed::new().await;
    let id = volume_id(1);
    bed.state().instances = vec![instance(1, "web", InstanceState::Running)];
    bed.state().storage.volumes = vec![attached(1, "data", AttachmentState::Attached)];
    bed.state().storage.volume_watches.extend([
        vec![attached(1, "data", AttachmentState::Attaching)],
        vec![attached(1, "data", AttachmentState::Attached)],
    ]);
    let said = bed.run(&["volume", "attach", "data", "web", "--device", "/dev/sdf", "--wait"]).await;
    assert_eq!(said.code, 0, "{said:?}");
    assert!(said.out.contains("attached") && said.err.contains("in-use, attaching"), "{said:?}");
    assert!(said.err.contains("/dev/disk/by-id/virtio-vol00000000000000001"), "{}", said.err);
    let asked = bed.state().storage.attached[0].clone();
    assert_eq!((asked.volume_id, asked.device.as_str(), asked.delete_on_termination), (id, "/dev/sdf", false));
    let wrong = bed.run(&["volume", "attach", "data", "web", "--device", "sdf"]).await;
    assert!(wrong.code == 2 && wrong.err.contains("/dev/sd[f-p]"), "{wrong:?}");
}

#[tokio::test]
async fn a_guest_that_holds_on_is_a_conflict_with_a_way_on() {
    let bed = Bed::new().await;
    let id = volume_id(1);
    bed.state()
        .storage
        .volume_watches
        .push_back(vec![attached(1, "", AttachmentState::Detaching), attached(1, "", AttachmentState::Busy)]);
    let said = bed.run(&["volume", "detach", &id, "--wait"]).await;
    assert_eq!(said.code, 4, "{said:?}");
    for word in ["is busy", "unmount", "--force"] {
        assert!(said.err.contains(word), "{word}: {}", said.err);
    }
    bed.state().storage.volume_watches.push_back(vec![volume(1, "", VolumeState::Available)]);
    let said = bed.run(&["volume", "detach", &id, "--force", "--wait"]).await;
    assert!(said.code == 0 && said.out.contains("detached"), "{said:?}");
    let asked: Vec<bool> = bed.state().storage.detached.iter().map(|request| request.force).collect();
    assert_eq!(asked, [false, true]);
}

#[tokio::test]
async fn deleting_waits_until_the_volumes_are_gone() {
    let bed = Bed::new().await;
    let (one, two) = (volume_id(1), volume_id(2));
    bed.state().storage.volumes =
        vec![volume(1, "data", VolumeState::Available), volume(2, "", VolumeState::Available)];
    // Both are gone when the stream has ended: the next one says so.
    bed.state().storage.volume_watches.push_back(vec![volume(1, "data", VolumeState::Deleting)]);
    let said = bed.run(&["volume", "delete", "data", &two, "--wait", "--timeout", "1min"]).await;
    assert_eq!(said.code, 0, "{said:?}");
    assert_eq!(said.out, format!("{one} is deleted\n{two} is deleted\n"));
    assert_eq!(bed.state().storage.deleted, [one, two]);
}

#[tokio::test]
async fn only_what_is_named_is_modified() {
    let bed = Bed::new().await;
    let id = volume_id(1);
    let change = |state: &str, progress| {
        let (volume_id, modification_state) = (volume_id(1), state.to_owned());
        let target_size_bytes = 20 << 30;
        let change =
            VolumeModification { volume_id, modification_state, target_size_bytes, progress, ..Default::default() };
        hearth_proto::v1::Volume { modification: Some(change), ..volume(1, "data", VolumeState::InUse) }
    };
    bed.state().storage.volumes = vec![change("completed", 100)];
    bed.state().storage.volume_watches.push_back(vec![change("modifying", 0), change("completed", 100)]);
    let said = bed.run(&["volume", "modify", "data", "--size", "20GiB", "--wait"]).await;
    assert!(said.code == 0 && said.out.contains("completed") && said.out.contains("100 %"), "{said:?}");
    let wanted = ModifyVolumeRequest { volume_id: id, size_bytes: Some(20 << 30), ..Default::default() };
    assert_eq!(bed.state().storage.modified, [wanted]);
    let listed = bed.run(&["volume", "modifications", "data"]).await;
    assert!(listed.code == 0 && listed.out.contains("0 B to 20 GiB"), "{listed:?}");
}

#[tokio::test]
async fn snapshots_are_waited_for_until_complete_or_in_error() {
    let bed = Bed::new().await;
    bed.state().storage.volumes = vec![volume(1, "data", VolumeState::InUse)];
    let mut half = snapshot(0x77, "", SnapshotState::Pending);
    half.progress = 50;
    let done = snapshot(0x77, "", SnapshotState::Completed);
    bed.state().storage.snapshot_watches.extend([vec![half], vec![done]]);
    let said = bed.run(&["snapshot", "create", "data", "--name", "nightly", "--wait", "-o", "json"]).await;
    assert_eq!(said.code, 0, "{said:?}");
    let made: serde_json::Value = serde_json::from_str(&said.out).unwrap();
    assert_eq!((&made[0]["state"], &made[0]["name"]), (&"completed".into(), &"nightly".into()));
    assert!(said.err.contains("pending") && said.err.contains("completed, 0 B added"), "{}", said.err);

    let mut failed = snapshot(0x79, "", SnapshotState::Error);
    failed.state_reason = Some(StateReason { code: "Server.InternalError".into(), message: "the host is gone".into() });
    let other = snapshot(0x78, "", SnapshotState::Completed);
    bed.state().storage.snapshot_watches.push_back(vec![other, failed]);
    let id = "i-0123456789abcdef0";
    let said = bed.run(&["snapshot", "create-all", id, "--exclude-root", "--exclude", "data", "--wait"]).await;
    assert_eq!(said.code, 1, "{said:?}");
    assert!(said.err.contains("the host is gone (Server.InternalError)"), "{}", said.err);
    let asked = bed.state().storage.sets[0].clone();
    assert!(asked.exclude_boot_volume && asked.exclude_data_volume_ids == [volume_id(1)]);
}

#[tokio::test]
async fn deleting_a_snapshot_in_use_says_what_to_do() {
    let bed = Bed::new().await;
    let (one, two) = (snapshot_id(1), snapshot_id(2));
    let said = bed.run(&["snapshot", "delete", &one, &two, "-o", "id"]).await;
    assert_eq!((said.code, said.out), (0, format!("{one}\n{two}\n")));
    bed.state().failure = refusal(Code::FailedPrecondition, "InvalidSnapshot.InUse", "in use by ami-1");
    let said = bed.run(&["snapshot", "create", &volume_id(1)]).await;
    assert!(said.code == 4 && said.err.contains("--delete-snapshots"), "{said:?}");
}

#[tokio::test]
async fn a_launch_carries_its_block_devices() {
    let bed = Bed::new().await;
    bed.state().images = vec![Image { root_device_name: "/dev/xvda".into(), ..image(0xabc, "debian-12") }];
    bed.state().storage.snapshots = vec![snapshot(5, "nightly", SnapshotState::Completed)];
    let run = async |more: &[&str]| bed.run(&[&["instance", "run", "debian-12", "-o", "id"], more].concat()).await;
    let said = run(&[
        "--root-size",
        "20G",
        "--block-device",
        "device=/dev/sdf,size=10G,type=gp3,iops=4000,delete-on-termination=true",
        "-b",
        "device=/dev/sdg,snapshot=nightly",
        "-b",
        "device=/dev/sdb,virtual=ephemeral0",
        "-b",
        "device=/dev/sdc,none",
    ])
    .await;
    assert_eq!(said.code, 0, "{said:?}");
    let asked = bed.state().launched[0].block_device_mappings.clone();
    let devices: Vec<&str> = asked.iter().map(|mapping| mapping.device_name.as_str()).collect();
    assert_eq!(devices, ["/dev/xvda", "/dev/sdf", "/dev/sdg", "/dev/sdb", "/dev/sdc"]);
    let ebs = |at: usize| asked[at].ebs.clone().unwrap();
    assert_eq!((ebs(0).volume_size_bytes, ebs(0).delete_on_termination), (20 << 30, None));
    assert_eq!(
        (ebs(1).volume_size_bytes, ebs(1).iops, ebs(1).delete_on_termination),
        (10 << 30, Some(4000), Some(true))
    );
    assert_eq!((ebs(1).volume_type.as_str(), ebs(2).snapshot_id), ("gp3", snapshot_id(5)));
    assert_eq!((asked[3].virtual_name.as_str(), asked[4].no_device), ("ephemeral0", true));

    let both = run(&["--root-size", "20G", "-b", "device=/dev/xvda,size=30G"]).await;
    assert!(both.code == 2 && both.err.contains("both say the size of /dev/xvda"), "{both:?}");
    let twice = run(&["-b", "device=/dev/sdf,size=30G", "-b", "device=/dev/sdf,none"]).await;
    assert!(twice.code == 2 && twice.err.contains("named twice"), "{twice:?}");
    assert_eq!(run(&["-b", "device=/dev/sdf,snapshot=nobody"]).await.code, 3);
    assert_eq!(run(&["-b", "device=/dev/sdf,sise=1G"]).await.code, 2);
    assert_eq!(bed.state().launched.len(), 1);
    bed.state().instances = vec![instance(1, "web", InstanceState::Running)];
    let modify = [
        "instance",
        "modify",
        "web",
        "--delete-on-termination",
        "/dev/sdf=true",
        "--delete-on-termination",
        "/dev/sdg=false",
    ];
    assert_eq!(bed.run(&modify).await.code, 0);
    let switch = |device: &str, on| DeleteOnTermination { device_name: device.into(), delete_on_termination: on };
    assert_eq!(bed.state().modified[0].delete_on_termination, [switch("/dev/sdf", true), switch("/dev/sdg", false)]);
}

#[tokio::test]
async fn images_are_registered_made_and_deregistered() {
    let bed = Bed::new().await;
    bed.state().storage.snapshots = vec![snapshot(5, "web-root", SnapshotState::Completed)];
    let line = "image register web-root --name web -b device=/dev/sda1,size=50G -b device=/dev/sdb,virtual=ephemeral0 --extra-cmdline quiet -o id";
    let said = bed.run(&line.split(' ').collect::<Vec<_>>()).await;
    assert_eq!((said.code, said.out.as_str()), (0, "ami-00000000000000008\n"), "{}", said.err);
    let asked = bed.state().registered[0].clone();
    let root = asked.block_device_mappings[0].ebs.clone().unwrap();
    assert_eq!((root.snapshot_id, root.volume_size_bytes), (snapshot_id(5), 50 << 30));
    assert_eq!((asked.root_device_name.as_str(), asked.block_device_mappings.len()), ("/dev/sda1", 2));
    assert_eq!(asked.boot.unwrap().extra_cmdline, "quiet");

    let line = "image register --location debian.manifest.json --name store -b device=/dev/sdb,none -o id";
    assert_eq!(bed.run(&line.split(' ').collect::<Vec<_>>()).await.code, 0);
    let asked = bed.state().registered[1].clone();
    assert_eq!((asked.image_location.as_str(), asked.root_device_name.as_str()), ("debian.manifest.json", ""));
    assert!(asked.block_device_mappings.len() == 1 && asked.block_device_mappings[0].no_device);
    for wrong in ["image register --name x", "image register snap --location y --name x"] {
        assert_eq!(bed.run(&wrong.split(' ').collect::<Vec<_>>()).await.code, 2, "{wrong}");
    }

    bed.state().instances = vec![instance(1, "web", InstanceState::Running)];
    let line = "image create web --name web-2 --no-reboot --snapshot-tag made-of=web --wait -o json";
    let said = bed.run(&line.split(' ').collect::<Vec<_>>()).await;
    let made: serde_json::Value = serde_json::from_str(&said.out).unwrap();
    assert_eq!((said.code, &made[0]["state"]), (0, &"available".into()), "{}", said.err);
    assert!(bed.state().images_created[0].no_reboot);
    assert_eq!(bed.state().images_created[0].snapshot_tags[0].key, "made-of");

    let said = bed.run(&["image", "deregister", "ami-00000000000000009", "--delete-snapshots"]).await;
    assert_eq!((said.code, said.out.as_str()), (0, "ami-00000000000000009 is deregistered\n"));
    assert!(bed.state().deregistered[0].delete_associated_snapshots);
}

#[tokio::test]
async fn bundles_are_made_shown_and_called_off() {
    let bed = Bed::new().await;
    bed.state().instances = vec![instance(1, "web", InstanceState::Running)];
    let id = "bun-00000000000000001";
    let line = "bundle create --instance web nightly --prefix backup --wait -o json";
    let said = bed.run(&line.split(' ').collect::<Vec<_>>()).await;
    let made: serde_json::Value = serde_json::from_str(&said.out).unwrap();
    assert_eq!((said.code, &made[0]["state"]), (0, &"complete".into()), "{}", said.err);
    let asked = bed.state().bundles_created[0].clone();
    assert_eq!((asked.name.as_str(), asked.prefix.as_str(), asked.image_id.as_str()), ("nightly", "backup", ""));
    assert_eq!(asked.instance_id, instance(1, "web", InstanceState::Running).instance_id);
    assert!(bed.run(&["bundle", "list"]).await.out.contains(id));
    assert!(bed.run(&["bundle", "describe", id]).await.out.contains("complete"));
    assert_eq!(bed.run(&["bundle", "describe", "bun-00000000000000002"]).await.code, 3);
    assert_eq!(bed.run(&["bundle", "delete", "a.manifest.json"]).await.code, 0);
    assert_eq!(bed.run(&["image", "delete-stored", "ami-1.bin", "--yes"]).await.code, 0);
    assert_eq!(bed.state().objects_deleted, ["a.manifest.json", "ami-1.bin"]);
    assert_eq!(bed.run(&["bundle", "cancel", id]).await.code, 0);
    assert_eq!(bed.state().bundles_cancelled, [id]);
    for wrong in ["bundle create x", "bundle create x --image a --instance b", "bundle cancel"] {
        assert_eq!(bed.run(&wrong.split(' ').collect::<Vec<_>>()).await.code, 2, "{wrong}");
    }
}

#[tokio::test]
async fn images_are_stored_and_restored_and_root_volumes_replaced() {
    let bed = Bed::new().await;
    let id = "ami-00000000000000007";
    let said = bed.run(&["image", "store", id, "--prefix", "backup", "--wait", "-o", "json"]).await;
    let task: serde_json::Value = serde_json::from_str(&said.out).unwrap();
    assert_eq!((said.code, &task[0]["state"]), (0, &"completed".into()), "{}", said.err);
    let key = format!("archive/1/backup/{id}.bin");
    assert!(bed.run(&["image", "store-tasks"]).await.out.contains(&key));
    let line = ["image", "restore", &key, "--name", "again", "--tag", "a=b", "--wait", "-o", "json"];
    let said = bed.run(&line).await;
    let made: serde_json::Value = serde_json::from_str(&said.out).unwrap();
    assert_eq!((said.code, &made[0]["state"]), (0, &"available".into()), "{}", said.err);
    let asked = bed.state().restored[0].clone();
    assert_eq!((asked.object_key, asked.name.as_str(), asked.tags.len()), (key.clone(), "again", 1));
    let said = bed.run(&["image", "restore-tasks"]).await;
    assert!(said.out.contains(&key) && said.out.contains("in-progress (40 %)"), "{said:?}");

    bed.state().instances = vec![instance(1, "web", InstanceState::Running)];
    bed.state().storage.snapshots = vec![snapshot(5, "nightly", SnapshotState::Completed)];
    let line = "instance replace-root web --snapshot nightly --delete-replaced --wait -o json";
    let said = bed.run(&line.split(' ').collect::<Vec<_>>()).await;
    let task: serde_json::Value = serde_json::from_str(&said.out).unwrap();
    assert_eq!((said.code, &task[0]["state"]), (0, &"succeeded".into()), "{}", said.err);
    let asked = bed.state().replaced[0].clone();
    assert_eq!((asked.snapshot_id, asked.delete_replaced_root_volume), (snapshot_id(5), true));
    assert!(bed.run(&["instance", "replace-root-tasks"]).await.out.contains("succeeded"));
    let both = "instance replace-root web --snapshot a --image b";
    assert_eq!(bed.run(&both.split(' ').collect::<Vec<_>>()).await.code, 2);
}

#[tokio::test]
async fn an_export_is_a_sparse_file_or_nothing() {
    let bed = Bed::new().await;
    let (file, id) = (bed.path("disk.qcow2"), "ami-00000000000000abc");
    let path = file.to_str().unwrap();
    let progress = Progress { done_bytes: 1, total_bytes: 2, step: "exporting".into() };
    let size = (64 << 20) + 8;
    let whole = vec![
        Export::Progress(progress),
        Export::FileBytes(size),
        Export::Data(b"begin".to_vec().into()),
        Export::Zeros(32 << 20),
        Export::Data(b"end".to_vec().into()),
        Export::Zeros(32 << 20),
    ];
    bed.state().export = whole.clone();
    let said = bed.run(&["image", "export", id, path]).await;
    assert_eq!(said.code, 0, "{said:?}");
    assert!(said.out.contains("64 MiB of ami-00000000000000abc as qcow2"), "{}", said.out);
    let content = std::fs::read(&file).unwrap();
    assert!(content.len() as u64 == size && content.starts_with(b"begin") && &content[(32 << 20) + 5..][..3] == b"end");
    let metadata = std::fs::metadata(&file).unwrap();
    assert!(metadata.blocks() * 512 < 1 << 20, "{} blocks", metadata.blocks());
    assert_eq!(bed.state().exported[0].format, "qcow2");

    // What is there already is only replaced when that is asked for.
    let said = bed.run(&["image", "export", id, path]).await;
    assert!(said.code == 2 && said.err.contains("--overwrite"), "{said:?}");
    let too_short = whole[..4].to_vec();
    let mut too_long = whole.clone();
    too_long.push(Export::Zeros(1));
    for broken in [too_short, too_long, whole[2..].to_vec(), Vec::new()] {
        bed.state().export = broken;
        let said = bed.run(&["image", "export", id, path, "--format", "raw", "--overwrite"]).await;
        assert_eq!(said.code, 1, "{said:?}");
    }
    assert_eq!(std::fs::read(&file).unwrap(), content, "a broken export leaves the old file");
    let left = std::fs::read_dir(bed.home.path()).unwrap().map(|entry| entry.unwrap().file_name());
    assert!(left.into_iter().all(|name| !name.to_string_lossy().starts_with(".hearth-export")));
    bed.state().export = vec![Export::FileBytes(3), Export::Data(b"new".to_vec().into())];
    assert_eq!(bed.run(&["image", "export", id, path, "--overwrite"]).await.code, 0);
    assert_eq!(std::fs::read(&file).unwrap(), b"new");
}

#[tokio::test]
async fn operators_look_after_the_object_store() {
    let bed = Bed::new().await;
    let said = bed.run(&["storage", "df"]).await;
    assert!(said.code == 0 && said.out.contains("chunks     5        1 MiB"), "{said:?}");
    assert!(said.out.contains("file:///var/lib/hearth/store"), "{}", said.out);
    let usage: serde_json::Value = serde_json::from_str(&bed.run(&["storage", "df", "-o", "json"]).await.out).unwrap();
    assert_eq!(usage["chunk_objects"], 5);
    assert_eq!(bed.run(&["storage", "gc"]).await.out, "3 objects (3 MiB) deleted, 7 kept\n");
    assert!(bed.run(&["storage", "verify"]).await.out.ends_with("all is well\n"));
    bed.state().storage.findings = vec!["chunks/ab: missing (needed by snap-1)".to_owned()];
    let said = bed.run(&["storage", "verify", &snapshot_id(1)]).await;
    assert_eq!(said.code, 1, "{said:?}");
    assert!(said.out.starts_with("chunks/ab: missing") && said.err.contains("1 object"), "{said:?}");
    assert_eq!(bed.state().storage.verified, [snapshot_id(1)]);
}

#[tokio::test]
async fn fast_restore_is_followed_until_every_host_has_everything() {
    let bed = Bed::new().await;
    bed.state().storage.snapshots = vec![snapshot(5, "golden", SnapshotState::Completed)];
    bed.state().storage.fast_restore_percents = [0, 40].into();
    let said = bed.run(&["snapshot", "fast-restore", "enable", "golden", "--host", "a", "--host", "b", "--wait"]).await;
    assert_eq!(said.code, 0, "{said:?}");
    assert!(said.err.contains("optimizing") && said.err.contains("enabled"), "{}", said.err);
    assert_eq!(said.out.matches("enabled").count(), 2, "{}", said.out);
    let asked = bed.state().storage.fast_restores[0].clone();
    assert_eq!((asked.snapshot_ids, asked.hosts), (vec![snapshot_id(5)], vec!["a".to_owned(), "b".to_owned()]));
    let said = bed.run(&["snapshot", "fast-restore", "ls", "golden", "-o", "json"]).await;
    let listed: serde_json::Value = serde_json::from_str(&said.out).unwrap();
    assert_eq!((&listed[1]["host_name"], &listed[1]["progress"]), (&"b".into(), &100.into()));
    let said = bed.run(&["snapshot", "fast-restore", "disable", "golden"]).await;
    assert_eq!((said.code, bed.state().storage.fast_restores.len()), (0, 0), "{said:?}");
}

#[tokio::test]
async fn a_copy_is_encrypted_when_that_is_asked_for() {
    let bed = Bed::new().await;
    bed.state().storage.snapshots = vec![snapshot(5, "golden", SnapshotState::Completed)];
    assert_eq!(bed.run(&["snapshot", "copy", "golden"]).await.code, 0);
    assert_eq!(bed.run(&["snapshot", "copy", "golden", "--encrypted"]).await.code, 0);
    let asked: Vec<bool> = bed.state().storage.copies.iter().map(|copy| copy.encrypted).collect();
    assert_eq!(asked, [false, true]);
}

#[tokio::test]
async fn lists_of_what_has_no_tags_take_filters() {
    let bed = Bed::new().await;
    let lists =
        ["bundle list", "image store-tasks", "image restore-tasks", "volume modifications", "snapshot fast-restore ls"];
    for list in lists {
        bed.state().filters.clear();
        let line: Vec<&str> = list.split(' ').chain(["--filter", "state=a,b*"]).collect();
        let said = bed.run(&line).await;
        assert_eq!(said.code, 0, "{list}: {said:?}");
        let asked = bed.state().filters.clone();
        let [one] = &asked[..] else { panic!("{list}: {asked:?}") };
        assert_eq!((one.name.as_str(), one.values.as_slice()), ("state", &["a".to_owned(), "b*".to_owned()][..]));
    }
}
