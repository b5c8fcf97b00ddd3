//! Uploads that break off, whatever breaks them, and how they end.

use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use hearth_proto::v1;
use hearth_snapshot::{PIECE_BYTES, PrefixDigest};
use hearth_store::sqlite::SqliteStore;
use rand::rngs::StdRng;
use rand::{Rng, RngExt, SeedableRng};
use tokio::sync::mpsc;
use tokio_stream::wrappers::ReceiverStream;
use tonic::{Code, Status, Streaming};
use v1::import_image_request::Message;

use crate::cloud::{Cloud, User, config, header, reason};
use crate::crash::Mortal;
use crate::disks::until;
use crate::images::exported;

/// A raw disk of pieces with content and without, the last one cut.
fn disk(seed: u64) -> Vec<u8> {
    let mut random = StdRng::seed_from_u64(seed);
    let mut disk = vec![0u8; 12 * PIECE_BYTES as usize + 4096];
    for (number, piece) in disk.chunks_mut(PIECE_BYTES as usize).enumerate() {
        if number % 3 != 2 {
            random.fill_bytes(piece);
        }
    }
    disk[510] = 0x55;
    disk[511] = 0xaa;
    disk
}

fn resumable(name: &str, disk: &[u8]) -> v1::ImportImageHeader {
    v1::ImportImageHeader { client_token: format!("{name}-once"), resumable: true, ..header(name, disk.len() as u64) }
}

fn digest_of(content: &[u8]) -> PrefixDigest {
    let pieces = content.chunks(PIECE_BYTES as usize).enumerate();
    pieces.fold(PrefixDigest::default(), |digest, (number, piece)| digest.with(number as u64 * PIECE_BYTES, piece))
}

/// A client's turn at an upload.
struct Turn {
    messages: mpsc::Sender<v1::ImportImageRequest>,
    answers: Streaming<v1::ImportImageResponse>,
    position: v1::UploadPosition,
}

/// How a call began.
enum Begun {
    Turn(Box<Turn>),
    Image(Box<v1::Image>),
}

async fn begin(user: &mut User, header: &v1::ImportImageHeader) -> Result<Begun, Status> {
    let (messages, stream) = mpsc::channel(4);
    messages.send(v1::ImportImageRequest { message: Some(Message::Header(header.clone())) }).await.unwrap();
    let mut answers = user.images.import_image(ReceiverStream::new(stream)).await?.into_inner();
    let first = answers.message().await?.expect("an answer");
    Ok(match (first.upload, first.image) {
        (Some(position), None) => Begun::Turn(Box::new(Turn { messages, answers, position })),
        (None, Some(image)) => Begun::Image(Box::new(image)),
        other => panic!("{other:?}"),
    })
}

async fn turn(user: &mut User, header: &v1::ImportImageHeader) -> Turn {
    match begin(user, header).await.unwrap() {
        Begun::Turn(turn) => *turn,
        Begun::Image(image) => panic!("{image:?}"),
    }
}

impl Turn {
    async fn say(&self, message: Option<Message>) -> bool {
        self.messages.send(v1::ImportImageRequest { message }).await.is_ok()
    }

    /// Sends what is missing up to `end`, in messages of `step` bytes; answers how many bytes went as bytes.
    async fn send(&self, disk: &[u8], end: usize, step: usize) -> usize {
        let begin = self.position.offset as usize;
        let mut sent = 0;
        for part in disk[begin..end.max(begin)].chunks(step) {
            let is_zero = part.iter().all(|byte| *byte == 0);
            let message = match is_zero {
                true => Message::Zeros(part.len() as u64),
                false => Message::Chunk(part.to_vec().into()),
            };
            if !self.say(Some(message)).await {
                break;
            }
            sent += if is_zero { 0 } else { part.len() };
        }
        sent
    }

    /// Says that nothing more comes, and hears how it ends.
    async fn end(self) -> Result<v1::Image, Status> {
        drop(self.messages);
        heard(self.answers).await
    }
}

async fn heard(mut answers: Streaming<v1::ImportImageResponse>) -> Result<v1::Image, Status> {
    let mut image = None;
    while let Some(answer) = answers.message().await? {
        image = answer.image.or(image);
    }
    Ok(image.expect("the last message carries the image"))
}

async fn listed(user: &mut User) -> Vec<v1::Image> {
    user.images.list_images(v1::ListImagesRequest::default()).await.unwrap().into_inner().images
}

async fn chunks(user: &mut User) -> u64 {
    user.storage.get_storage_usage(v1::GetStorageUsageRequest {}).await.unwrap().into_inner().chunk_objects
}

async fn deregister(user: &mut User, id: &str) {
    let request = v1::DeregisterImageRequest { image_id: id.into(), delete_associated_snapshots: true };
    user.images.deregister_image(request).await.unwrap();
}

/// Files of uploads.
pub fn spooled(state: &Path) -> usize {
    std::fs::read_dir(state.join("spool")).unwrap().count()
}

async fn assert_complete(user: &mut User, state: &Path, image: &v1::Image, disk: &[u8]) {
    assert_eq!(image.state(), v1::ImageState::Available, "{image:?}");
    assert!(exported(user, &image.image_id).await == disk, "the image is not what was uploaded");
    assert_eq!(listed(user).await.len(), 1);
    let snapshots = user.snapshots.list_snapshots(v1::ListSnapshotsRequest::default()).await.unwrap().into_inner();
    assert_eq!(snapshots.snapshots.len(), 1, "{snapshots:#?}");
    until("the spool is empty", || async { (spooled(state) == 0).then_some(()) }).await;
    assert_eq!(user.findings().await, Vec::<String>::new());
}

#[tokio::test(flavor = "multi_thread")]
async fn an_upload_that_breaks_off_anywhere_goes_on_where_it_was() {
    let dir = tempfile::tempdir().unwrap();
    let mut cloud = Cloud::start(dir.path()).await;
    let mut user = cloud.user().await;
    let disk = disk(1);
    let header = resumable("debian", &disk);
    let mut random = StdRng::seed_from_u64(2);
    let (mut sent, mut breaks, mut at) = (0, 0, 0);
    let image = loop {
        let turn = turn(&mut user, &header).await;
        let offset = turn.position.offset as usize;
        assert!(
            (offset as u64).is_multiple_of(PIECE_BYTES) && offset >= at,
            "what was there is there: {offset} of {at}"
        );
        assert_eq!(turn.position.digest, digest_of(&disk[..offset]).as_bytes());
        let end = (offset + random.random_range(0..900_000)).min(disk.len());
        let step = random.random_range(1000..600_000);
        sent += turn.send(&disk, end, step).await;
        if end == disk.len() {
            break turn.end().await.unwrap();
        }
        breaks += 1;
        match breaks % 3 {
            // In mid-sentence: what was under way may be lost.
            0 => drop(turn),
            // Heard out: everything has come, but for a part of a piece.
            kind => {
                let error = turn.end().await.unwrap_err();
                assert_eq!((error.code(), reason(&error).as_str()), (Code::Aborted, "UploadAborted"));
                at = end / PIECE_BYTES as usize * PIECE_BYTES as usize;
                if kind == 2 {
                    cloud.stop().await.unwrap();
                    cloud = Cloud::start(dir.path()).await;
                    user = cloud.user().await;
                }
            }
        }
    };
    assert!(breaks >= 8, "only {breaks} breaks");
    let content = disk.chunks(PIECE_BYTES as usize).filter(|piece| piece.iter().any(|byte| *byte != 0)).count();
    let most = (content + 2 * breaks) * PIECE_BYTES as usize;
    assert!(sent <= most, "{sent} bytes sent in {breaks} breaks");
    assert_complete(&mut user, dir.path(), &image, &disk).await;
    // Asked again: it is there.
    assert!(
        matches!(begin(&mut user, &header).await.unwrap(), Begun::Image(again) if again.image_id == image.image_id)
    );
    // Nothing of it stands in the way of another one.
    deregister(&mut user, &image.image_id).await;
    assert_eq!(turn(&mut user, &header).await.position.offset, 0);
}

#[tokio::test(flavor = "multi_thread")]
async fn an_import_goes_on_after_every_death() {
    let mut died = 0;
    for step in 0..8i64 {
        for last_counts in [false, true] {
            died += u32::from(one_death(step, last_counts).await);
        }
    }
    // Name and token, two positions, the whole upload, the image: five transactions. Who is quick sees the image although the
    // last one was not answered.
    assert!(died >= 9, "too few of these moments came, {died} did");
}

/// Three turns, of which the last brings the end.
async fn turns(
    user: &mut User,
    header: &v1::ImportImageHeader,
    disk: &[u8],
    sent: &mut usize,
) -> Result<v1::Image, Status> {
    loop {
        let turn = match begin(user, header).await? {
            Begun::Turn(turn) => turn,
            Begun::Image(image) => return Ok(*image),
        };
        assert_eq!(turn.position.digest, digest_of(&disk[..turn.position.offset as usize]).as_bytes());
        let end = (turn.position.offset as usize + disk.len() / 2 - 5).min(disk.len());
        *sent += turn.send(disk, end, 300_000).await;
        match turn.end().await {
            Err(error) if reason(&error) == "UploadAborted" => {}
            outcome => return outcome,
        }
    }
}

async fn one_death(after: i64, last_counts: bool) -> bool {
    let dir = tempfile::tempdir().unwrap();
    let store = Arc::new(SqliteStore::open_temporary().unwrap());
    Cloud::start_on(config(dir.path()), store.clone()).await.unwrap().stop().await.unwrap();
    let disk = disk(3);
    let header = resumable("debian", &disk);
    let mut sent = 0;
    // Starting takes two transactions itself, or three.
    let mortal = Mortal::new(store.clone(), 2 + after, last_counts);
    let mut died = true;
    if let Ok(cloud) = Cloud::start_on(config(dir.path()), mortal.clone()).await {
        let mut user = cloud.user().await;
        died = turns(&mut user, &header, &disk, &mut sent).await.is_err();
        cloud.stop().await.ok();
    }
    mortal.die();
    let cloud = Cloud::start_on(config(dir.path()), store).await.unwrap();
    let mut user = cloud.user().await;
    let image = turns(&mut user, &header, &disk, &mut sent).await.unwrap();
    assert!(sent <= disk.len() * 2, "{sent} bytes sent");
    assert_complete(&mut user, dir.path(), &image, &disk).await;
    died
}

#[tokio::test(flavor = "multi_thread")]
async fn what_hinders_a_conversion_is_waited_out_and_its_client_is_not_needed() {
    let dir = tempfile::tempdir().unwrap();
    let cloud = Cloud::start(dir.path()).await;
    let mut user = cloud.user().await;
    let disk = disk(4);
    let header = resumable("debian", &disk);
    // No chunk can be stored where there is a file.
    let hindrance = dir.path().join("objects/chunk");
    std::fs::write(&hindrance, "").unwrap();
    let first = turn(&mut user, &header).await;
    let id = first.position.image_id.clone();
    first.send(&disk, disk.len(), 1 << 20).await;
    let seen =
        until("it is hindered", || {
            let mut user = user.clone();
            async move {
                listed(&mut user).await.into_iter().find(|image| progress(image).starts_with("waiting to convert"))
            }
        })
        .await;
    assert_eq!(
        (seen.image_id.as_str(), seen.state(), seen.upload_expires.as_str()),
        (id.as_str(), v1::ImageState::Pending, "")
    );
    // The control plane goes down in the middle of it, and up again.
    cloud.stop().await.unwrap();
    assert_eq!(first.end().await.unwrap_err().code(), Code::Unavailable);
    let cloud = Cloud::start(dir.path()).await;
    let mut user = cloud.user().await;
    let again = turn(&mut user, &header).await;
    assert_eq!((again.position.offset, &again.position.image_id), (disk.len() as u64, &id));
    assert_eq!(again.position.digest, digest_of(&disk).as_bytes());
    assert_eq!(listed(&mut user).await[0].state(), v1::ImageState::Pending);
    std::fs::remove_file(&hindrance).unwrap();
    let image = again.end().await.unwrap();
    assert_eq!(image.image_id, id);
    assert_complete(&mut user, dir.path(), &image, &disk).await;
}

fn progress(image: &v1::Image) -> String {
    image.progress.as_ref().map(|progress| progress.step.clone()).unwrap_or_default()
}

#[tokio::test(flavor = "multi_thread")]
async fn of_two_clients_the_newer_one_goes_on() {
    let dir = tempfile::tempdir().unwrap();
    let cloud = Cloud::start(dir.path()).await;
    let mut user = cloud.user().await;
    let disk = disk(5);
    let header = resumable("debian", &disk);
    let older = turn(&mut user, &header).await;
    older.send(&disk, 5 * PIECE_BYTES as usize, 100_000).await;
    // Another connection, as a client has after a break that the server has not noticed.
    let mut other = cloud.user().await;
    let newer = turn(&mut other, &header).await;
    assert_eq!(newer.position.digest, digest_of(&disk[..newer.position.offset as usize]).as_bytes());
    older.say(Some(Message::Chunk(vec![9; 100].into()))).await;
    let error = heard(older.answers).await.unwrap_err();
    assert_eq!((error.code(), reason(&error).as_str()), (Code::FailedPrecondition, "UploadTakenOver"));
    newer.send(&disk, disk.len(), 1 << 20).await;
    let image = newer.end().await.unwrap();
    assert_complete(&mut user, dir.path(), &image, &disk).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn an_upload_is_seen_waits_outside_the_limit_and_is_given_up_when_asked() {
    let dir = tempfile::tempdir().unwrap();
    let mut one_at_a_time = config(dir.path());
    one_at_a_time.max_concurrent_imports = 1;
    let cloud = Cloud::start_with(one_at_a_time).await;
    let mut user = cloud.user().await;
    let disk = disk(6);
    let header = resumable("debian", &disk);
    let first = turn(&mut user, &header).await;
    let id = first.position.image_id.clone();
    first.send(&disk, 4 * PIECE_BYTES as usize, 1 << 20).await;
    let seen = until("it is seen", || {
        let mut user = user.clone();
        async move {
            let image = listed(&mut user).await.remove(0);
            (image.progress.as_ref()?.done_bytes == 4 * PIECE_BYTES).then_some(image)
        }
    })
    .await;
    assert_eq!((progress(&seen).as_str(), seen.upload_expires.as_str()), ("uploading", ""));
    let refused = begin(&mut user, &resumable("other", &disk)).await.err().expect("no place is free");
    assert_eq!(reason(&refused), "RequestLimitExceeded");
    drop(first);
    let waiting = until("it waits for its client", || {
        let mut user = user.clone();
        async move { listed(&mut user).await.into_iter().find(|image| !image.upload_expires.is_empty()) }
    })
    .await;
    let shown = waiting.progress.clone().unwrap();
    assert_eq!((shown.step.as_str(), shown.total_bytes), ("upload interrupted", disk.len() as u64));
    assert_eq!((waiting.state(), spooled(dir.path())), (v1::ImageState::Pending, 1));
    // It takes no place, holds its name, and holds no garbage.
    let other = user.import("other").await;
    deregister(&mut user, &other.image_id).await;
    user.storage.collect_garbage(v1::CollectGarbageRequest {}).await.unwrap();
    assert_eq!(chunks(&mut user).await, 0, "an open upload does not hold up the garbage collector");
    let taken = user.import_bytes(crate::cloud::header("debian", 10), vec![vec![1; 10]]).await.unwrap_err();
    assert_eq!(reason(&taken), "InvalidAMIName.Duplicate");
    assert!(taken.message().contains(&id) && taken.message().contains("deregister"), "{}", taken.message());
    let mismatch = v1::ImportImageHeader { description: "other".into(), ..header.clone() };
    let mismatch = begin(&mut user, &mismatch).await.err().expect("other parameters");
    assert_eq!(reason(&mismatch), "IdempotentParameterMismatch");
    // Given up while nobody is there, and while somebody is.
    deregister(&mut user, &id).await;
    assert_eq!((listed(&mut user).await.len(), spooled(dir.path())), (0, 0));
    let second = turn(&mut user, &header).await;
    assert_eq!(second.position.offset, 0);
    second.send(&disk, 3 * PIECE_BYTES as usize, 1 << 20).await;
    deregister(&mut user, &second.position.image_id).await;
    let error = heard(second.answers).await.unwrap_err();
    assert_eq!((error.code(), reason(&error).as_str()), (Code::NotFound, "InvalidAMIID.NotFound"));
    // And while it is converted.
    let hindrance = dir.path().join("objects/chunk");
    std::fs::remove_dir_all(&hindrance).ok();
    std::fs::write(&hindrance, "").unwrap();
    let third = turn(&mut user, &header).await;
    third.send(&disk, disk.len(), 1 << 20).await;
    until("it is converted", || {
        let mut user = user.clone();
        async move { listed(&mut user).await.iter().any(|image| progress(image).contains("convert")).then_some(()) }
    })
    .await;
    deregister(&mut user, &third.position.image_id).await;
    let error = third.end().await.unwrap_err();
    assert_eq!(reason(&error), "InvalidAMIID.NotFound");
    assert_eq!((listed(&mut user).await.len(), spooled(dir.path())), (0, 0));
    std::fs::remove_file(&hindrance).unwrap();
    let last = turn(&mut user, &header).await;
    last.send(&disk, disk.len(), 1 << 20).await;
    let image = last.end().await.unwrap();
    assert_complete(&mut user, dir.path(), &image, &disk).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn an_upload_that_nobody_goes_on_with_is_taken_back() {
    let dir = tempfile::tempdir().unwrap();
    let mut impatient = config(dir.path());
    impatient.upload_ttl = Duration::from_millis(300);
    let cloud = Cloud::start_with(impatient).await;
    let mut user = cloud.user().await;
    let disk = disk(7);
    let header = resumable("debian", &disk);
    let first = turn(&mut user, &header).await;
    first.send(&disk, 3 * PIECE_BYTES as usize, 1 << 20).await;
    // Whoever is there may take his time.
    for _ in 0..10 {
        tokio::time::sleep(Duration::from_millis(100)).await;
        first.say(None).await;
    }
    assert_eq!(listed(&mut user).await.len(), 1);
    drop(first);
    until("it is taken back", || {
        let mut user = user.clone();
        async move { listed(&mut user).await.is_empty().then_some(()) }
    })
    .await;
    until("its spool file goes", || async { (spooled(dir.path()) == 0).then_some(()) }).await;
    let again = turn(&mut user, &header).await;
    assert_eq!(again.position.offset, 0);
    again.send(&disk, disk.len(), 1 << 20).await;
    let image = again.end().await.unwrap();
    assert_complete(&mut user, dir.path(), &image, &disk).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn what_the_disk_has_lost_is_sent_again() {
    let dir = tempfile::tempdir().unwrap();
    let disk = disk(8);
    let header = resumable("debian", &disk);
    let break_off = async |cloud: Cloud, user: &mut User| {
        let turn = turn(user, &header).await;
        turn.send(&disk, 4 * PIECE_BYTES as usize, 1 << 20).await;
        let path = dir.path().join(format!("spool/{}.upload", turn.position.image_id));
        turn.end().await.unwrap_err();
        cloud.stop().await.unwrap();
        path
    };
    let cloud = Cloud::start(dir.path()).await;
    let mut user = cloud.user().await;
    let path = break_off(cloud, &mut user).await;
    // More than was noted, as after a power cut: none of that counts.
    let file = std::fs::OpenOptions::new().append(true).open(&path).unwrap();
    std::io::Write::write_all(&mut &file, &[7; 3 << 20]).unwrap();
    let cloud = Cloud::start(dir.path()).await;
    let mut user = cloud.user().await;
    assert_eq!(turn(&mut user, &header).await.position.offset, 4 * PIECE_BYTES);
    let path = break_off(cloud, &mut user).await;
    // Less than was noted: nothing counts.
    std::fs::OpenOptions::new().write(true).open(&path).unwrap().set_len(1000).unwrap();
    let cloud = Cloud::start(dir.path()).await;
    let mut user = cloud.user().await;
    assert_eq!(turn(&mut user, &header).await.position.offset, 0);
    let path = break_off(cloud, &mut user).await;
    std::fs::remove_file(path).unwrap();
    let cloud = Cloud::start(dir.path()).await;
    let mut user = cloud.user().await;
    let last = turn(&mut user, &header).await;
    assert_eq!((last.position.offset, last.position.digest.to_vec()), (0, vec![0; 32]));
    last.send(&disk, disk.len(), 1 << 20).await;
    let image = last.end().await.unwrap();
    assert_complete(&mut user, dir.path(), &image, &disk).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_resumable_upload_needs_a_token_and_a_bad_file_is_told_again() {
    let dir = tempfile::tempdir().unwrap();
    let cloud = Cloud::start(dir.path()).await;
    let mut user = cloud.user().await;
    let garbage = b"QFI\xfb and then nothing of use".to_vec();
    let header = v1::ImportImageHeader { format: "qcow2".into(), ..resumable("debian", &garbage) };
    let nameless = v1::ImportImageHeader { client_token: String::new(), ..header.clone() };
    assert_eq!(begin(&mut user, &nameless).await.err().unwrap().code(), Code::InvalidArgument);
    let first = turn(&mut user, &header).await;
    first.send(&garbage, garbage.len(), 7).await;
    let failed = first.end().await.unwrap();
    assert_eq!(failed.state(), v1::ImageState::Failed);
    assert!(
        matches!(begin(&mut user, &header).await.unwrap(), Begun::Image(again) if again.image_id == failed.image_id)
    );
    let snapshots = user.snapshots.list_snapshots(v1::ListSnapshotsRequest::default()).await.unwrap().into_inner();
    assert!(snapshots.snapshots.is_empty());
    deregister(&mut user, &failed.image_id).await;
    assert_eq!(turn(&mut user, &header).await.position.offset, 0, "the name and the token are free");
}
