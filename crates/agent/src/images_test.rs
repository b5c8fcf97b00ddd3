use std::sync::atomic::{AtomicUsize, Ordering};

use futures::stream;

use super::*;

const ID: &str = "ami-0123456789abcdef0";

/// Gives a disk in pieces of 1000 bytes (zeros as such) and breaks off where it is told to.
struct Source {
    disk: Vec<u8>,
    break_at: Mutex<Vec<u64>>,
    fetches: AtomicUsize,
}

#[async_trait]
impl ImageSource for Source {
    async fn fetch(
        &self,
        _: &ImageId,
        offset: u64,
    ) -> Result<BoxStream<'static, Result<Piece, FetchError>>, FetchError> {
        self.fetches.fetch_add(1, Ordering::SeqCst);
        let end = self.break_at.lock().pop().unwrap_or(self.disk.len() as u64);
        let mut pieces = Vec::new();
        let mut at = offset;
        while at < end {
            let next = (at + 1000).min(end);
            let data = &self.disk[at as usize..next as usize];
            let content = match data.iter().all(|b| *b == 0) {
                true => Content::Zeros(next - at),
                false => Content::Data(Bytes::copy_from_slice(data)),
            };
            pieces.push(Ok(Piece { offset: at, content }));
            at = next;
        }
        if end < self.disk.len() as u64 {
            pieces.push(Err(FetchError::Unreachable("cut".into())));
        }
        Ok(stream::iter(pieces).boxed())
    }
}

fn disk() -> Vec<u8> {
    let mut disk: Vec<u8> = (0..40_000u32).map(|i| (i / 7) as u8).collect();
    disk[8_000..30_000].fill(0);
    disk
}

fn set_up(folder: &Path, disk: Vec<u8>, break_at: Vec<u64>) -> (Arc<Source>, Images, Wanted) {
    let sha256 = hex::encode(Sha256::digest(&disk));
    let wanted = Wanted { id: ID.parse().unwrap(), sha256, bytes: disk.len() as u64 };
    let source = Arc::new(Source { disk, break_at: Mutex::new(break_at), fetches: AtomicUsize::new(0) });
    let images = Images::new(Layout::new(folder, folder), Some(folder.join("local")), source.clone());
    (source, images, wanted)
}

#[tokio::test]
async fn a_broken_fetch_goes_on_where_it_stopped() {
    let folder = tempfile::tempdir().unwrap();
    let (source, images, wanted) = set_up(folder.path(), disk(), vec![20_500, 3_333]);
    let seen = Mutex::new(Vec::new());
    let progress = |done, _| seen.lock().push(done);
    for _ in 0..2 {
        let error = images.ensure(&wanted, &progress).await.unwrap_err();
        assert!(error.is_transient(), "{error}");
    }
    let path = images.ensure(&wanted, &progress).await.unwrap();
    assert_eq!(std::fs::read(path).unwrap(), disk());
    assert!(seen.lock().is_sorted(), "nothing was fetched twice: {seen:?}");
    images.ensure(&wanted, &progress).await.unwrap();
    assert_eq!(source.fetches.load(Ordering::SeqCst), 3);
}

#[tokio::test]
async fn many_instances_wait_for_one_fetch() {
    let folder = tempfile::tempdir().unwrap();
    let (source, images, wanted) = set_up(folder.path(), disk(), vec![]);
    let all = futures::future::join_all((0..20).map(|_| images.ensure(&wanted, &|_, _| ()))).await;
    assert!(all.iter().all(Result::is_ok));
    assert_eq!(source.fetches.load(Ordering::SeqCst), 1);
    assert!(images.fetching.lock().is_empty());
}

#[tokio::test]
async fn another_content_than_promised_is_thrown_away() {
    let folder = tempfile::tempdir().unwrap();
    let (_, images, mut wanted) = set_up(folder.path(), disk(), vec![]);
    wanted.sha256 = "00".repeat(32);
    let error = images.ensure(&wanted, &|_, _| ()).await.unwrap_err();
    assert!(error.to_string().contains("SHA-256"), "{error}");
    assert_eq!(std::fs::read_dir(folder.path().join("images").join(ID)).unwrap().count(), 0);
    wanted.bytes -= 1;
    assert!(matches!(images.ensure(&wanted, &|_, _| ()).await, Err(ImageError::Damaged { .. })));
}

#[tokio::test]
async fn images_of_a_control_plane_on_this_host_are_used_in_place() {
    let folder = tempfile::tempdir().unwrap();
    let (source, images, wanted) = set_up(folder.path(), disk(), vec![]);
    let local = folder.path().join("local").join(format!("{ID}.raw"));
    std::fs::create_dir(local.parent().unwrap()).unwrap();
    std::fs::write(&local, disk()).unwrap();
    assert_eq!(images.ensure(&wanted, &|_, _| ()).await.unwrap(), local);
    std::fs::write(&local, b"half").unwrap();
    assert_ne!(images.ensure(&wanted, &|_, _| ()).await.unwrap(), local);
    assert_eq!(source.fetches.load(Ordering::SeqCst), 1);
}

#[tokio::test]
async fn unused_images_are_deleted() {
    let folder = tempfile::tempdir().unwrap();
    let (_, images, wanted) = set_up(folder.path(), disk(), vec![]);
    let path = images.ensure(&wanted, &|_, _| ()).await.unwrap();
    images.prune(std::slice::from_ref(&wanted.id), Duration::ZERO).unwrap();
    images.prune(&[], Duration::from_secs(60)).unwrap();
    assert!(path.exists());
    images.prune(&[], Duration::ZERO).unwrap();
    assert!(!path.exists());
}
