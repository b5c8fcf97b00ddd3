//! The built program's uploads, which break off and go on.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::indexing_slicing, clippy::panic, missing_docs)]

mod support;

use std::os::unix::fs::FileExt;
use std::path::PathBuf;
use std::time::Duration;

use hearth_proto::v1::{Image, ImageState, Progress};
use support::Bed;
use tonic::{Code, Status};
use tonic_types::{ErrorDetails, StatusExt};

const MIB: u64 = 1 << 20;

/// Eight MiB of content, with a hole behind the first half.
fn disk(bed: &Bed) -> PathBuf {
    let path = bed.path("disk.raw");
    let file = std::fs::File::create(&path).unwrap();
    file.write_all_at(&[1; 4 << 20], 0).unwrap();
    file.write_all_at(&[2; 4 << 20], 6 * MIB).unwrap();
    path
}

#[tokio::test]
async fn an_upload_that_breaks_off_goes_on_by_itself() {
    let bed = Bed::new().await;
    let path = disk(&bed);
    // Never at the end of a piece, and once before anything has come.
    bed.state().upload_breaks.extend([3 * MIB + 1000, 1, 2 * MIB]);
    let said = bed.run(&["image", "import", path.to_str().unwrap(), "-o", "id"]).await;
    assert_eq!((said.code, said.out.as_str()), (0, "ami-00000000000000007\n"), "{said:?}");
    assert!(said.err.contains("reconnecting, for 10 min"), "{}", said.err);
    assert!(said.err.contains("restarting") && said.err.contains("resuming at 35 %"), "{}", said.err);
    let state = bed.state();
    assert!(state.upload == std::fs::read(&path).unwrap());
    assert_eq!(state.upload_headers.len(), 4);
    assert!(state.upload_headers.iter().all(|header| *header == state.upload_headers[0]));
    assert!(state.upload_bytes <= 8 * MIB + 3 * MIB / 2, "{} bytes sent", state.upload_bytes);
}

#[tokio::test]
async fn patience_has_an_end_that_says_how_to_go_on() {
    let bed = Bed::new().await;
    let path = disk(&bed);
    bed.state().upload_breaks.extend(std::iter::once(3 * MIB).chain(std::iter::repeat_n(0, 100)));
    let said = bed.run(&["image", "import", path.to_str().unwrap(), "--reconnect-for", "1s"]).await;
    assert_eq!(said.code, 5, "{said:?}");
    assert!(said.err.contains("gave up after") && said.err.contains("run the same command again"), "{}", said.err);
    // The next run sends what is missing.
    let before = bed.state().upload_bytes;
    bed.state().upload_breaks.clear();
    let said = bed.run(&["image", "import", path.to_str().unwrap()]).await;
    assert_eq!(said.code, 0, "{said:?}");
    assert!(said.err.contains("resuming at 3"), "{}", said.err);
    let state = bed.state();
    assert!(state.upload == std::fs::read(&path).unwrap());
    assert!(state.upload_bytes - before <= 5 * MIB + MIB / 2);
}

#[tokio::test]
async fn what_is_no_break_ends_the_command() {
    let bed = Bed::new().await;
    let path = disk(&bed);
    let import = ["image", "import", path.to_str().unwrap()];
    // Nobody has answered yet: that is told at once.
    bed.state().failure = Some(Status::unavailable("starting"));
    let said = bed.run(&import).await;
    assert_eq!(said.code, 1, "{said:?}");
    assert!(!said.err.contains("reconnecting"), "{}", said.err);
    let refusal = ErrorDetails::with_error_info("InvalidAMIName.Duplicate", "hearth.v1", []);
    bed.state().failure = Some(Status::with_error_details(Code::AlreadyExists, "taken", refusal));
    assert_eq!(bed.run(&import).await.code, 4);
    let said = bed.run(&["image", "import", "/dev/null"]).await;
    assert_eq!(said.code, 2);
    assert!(said.err.contains("/dev/null is not a file"), "{}", said.err);
}

#[tokio::test]
async fn a_killed_program_is_gone_on_with_by_the_same_command() {
    let bed = Bed::new().await;
    let path = disk(&bed);
    let import = ["image", "import", path.to_str().unwrap(), "--name", "debian"];
    // It breaks off, and does not get any further before the end of the program.
    bed.state().upload_breaks.extend(std::iter::once(3 * MIB).chain(std::iter::repeat_n(0, 1000)));
    let mut first = bed.command(&import).spawn().unwrap();
    while bed.state().upload_bytes < 3 * MIB {
        tokio::time::sleep(Duration::from_millis(5)).await;
    }
    first.kill().await.unwrap();
    bed.state().upload_breaks.clear();
    let (before, headers) = {
        let state = bed.state();
        (state.upload_bytes, state.upload_headers.clone())
    };
    let said = bed.run(&import).await;
    assert_eq!(said.code, 0, "{said:?}");
    assert!(said.err.contains("resuming at ") && !said.err.contains("reconnecting"), "{}", said.err);
    let sent = {
        let state = bed.state();
        assert!(state.upload == std::fs::read(&path).unwrap());
        assert_eq!(state.upload_headers.last().unwrap().client_token, headers[0].client_token);
        state.upload_bytes - before
    };
    assert!(sent <= 5 * MIB + MIB / 2, "{sent} bytes sent again");
    // Another name, other flags or a file of another time make another import.
    bed.state().upload.clear();
    let tokens = async |more: &[&str]| {
        bed.state().upload.clear();
        bed.run(&[&import, more].concat()).await;
        bed.state().upload_headers.last().unwrap().client_token.clone()
    };
    assert_eq!(tokens(&[]).await, headers[0].client_token);
    let mut all = vec![headers[0].client_token.clone(), tokens(&["--tag", "a=b"]).await];
    let file = std::fs::File::options().write(true).open(&path).unwrap();
    file.set_modified(std::time::UNIX_EPOCH + Duration::from_secs(1_000_000_000)).unwrap();
    all.push(tokens(&[]).await);
    all.push(tokens(&["--client-token", "mine"]).await);
    assert_eq!(all[3], "mine");
    all.sort();
    all.dedup();
    assert_eq!(all.len(), 4);
}

#[tokio::test]
async fn a_file_that_was_changed_is_not_mixed_with_what_was_sent_before() {
    let bed = Bed::new().await;
    let path = disk(&bed);
    let import = ["image", "import", path.to_str().unwrap(), "--client-token", "mine", "--reconnect-for", "0s"];
    bed.state().upload_breaks.extend([3 * MIB]);
    assert_eq!(bed.run(&import).await.code, 5);
    let file = std::fs::File::options().write(true).open(&path).unwrap();
    file.write_all_at(b"x", 2 * MIB).unwrap();
    let (before, ends) = {
        let state = bed.state();
        (state.upload_bytes, state.upload_ends)
    };
    let said = bed.run(&import).await;
    assert_eq!(said.code, 4, "{said:?}");
    assert!(said.err.contains("is not the file that image ami-00000000000000007 was begun with"), "{}", said.err);
    assert!(said.err.contains("hearth image deregister ami-00000000000000007"), "{}", said.err);
    assert_eq!(bed.state().upload_bytes, before, "nothing of it was sent");
    // What differs behind that is what the upload is to bring.
    file.write_all_at(&[1], 2 * MIB).unwrap();
    file.write_all_at(b"y", 7 * MIB).unwrap();
    let said = bed.run(&import).await;
    assert_eq!(said.code, 0, "{said:?}");
    assert!(bed.state().upload == std::fs::read(&path).unwrap());
    assert!(bed.state().upload_ends > ends);
}

#[tokio::test]
async fn pending_imports_are_shown_with_how_far_they_are() {
    let bed = Bed::new().await;
    bed.state().images = vec![Image {
        image_id: "ami-00000000000000007".into(),
        name: "debian".into(),
        state: ImageState::Pending.into(),
        progress: Some(Progress { done_bytes: 63, total_bytes: 100, step: "upload interrupted".into() }),
        upload_expires: "2026-12-01T12:00:00Z".into(),
        ..Image::default()
    }];
    let said = bed.run(&["image", "list"]).await;
    assert!(said.out.contains("pending, upload interrupted 63 %"), "{}", said.out);
    let said = bed.run(&["image", "describe", "debian"]).await;
    assert!(said.out.contains("2026-12-01T12:00:00Z") && said.out.contains("upload interrupted"), "{}", said.out);
}
