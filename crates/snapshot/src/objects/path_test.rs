use proptest::prelude::*;

use super::*;

fn name() -> impl Strategy<Value = String> {
    "[a-z0-9-]{1,64}"
}

#[test]
fn names_that_could_leave_their_folder_are_refused() {
    for name in ["", "..", "a/b", "a b", "A", "ä", "a.b", &"x".repeat(65), "a\0"] {
        assert!(matches!(SnapshotKey::new(name), Err(StorageError::Name { .. })), "{name}");
        assert!(matches!(KeyDomainId::new(name), Err(StorageError::Name { .. })), "{name}");
    }
}

proptest! {
    #[test]
    fn names_come_back(domain in name(), id in name(), hash in any::<[u8; 32]>(), epoch in any::<u32>()) {
        let domain = KeyDomainId::new(domain).unwrap();
        let id = SnapshotKey::new(id).unwrap();
        let (hash, epoch) = (ChunkHash(hash), Epoch(epoch));
        let (chunk, page) = (ChunkRef { hash, epoch }, PageRef { hash, epoch });
        prop_assert_eq!(classify(&chunk_path(&domain, &chunk)), ObjectKind::Chunk(domain.clone(), chunk));
        prop_assert_eq!(classify(&page_path(&domain, &page)), ObjectKind::Page(domain, page));
        prop_assert_eq!(classify(&root_path(&id)), ObjectKind::Root(id.clone()));
        prop_assert_eq!(classify(&prefetch_path(&id)), ObjectKind::Prefetch(id.clone()));
        prop_assert_eq!(classify(&snapshot_path(&id)), ObjectKind::Other);
    }

    /// Epochs sort as numbers do.
    #[test]
    fn epochs_sort(a in any::<u32>(), b in any::<u32>()) {
        prop_assert_eq!(a.cmp(&b), Epoch(a).to_string().cmp(&Epoch(b).to_string()));
        prop_assert_eq!(Epoch(a).to_string().parse::<Epoch>().unwrap(), Epoch(a));
    }

    #[test]
    fn foreign_names_are_other(path in "(chunk|page|snap|x)(/[a-zA-Z0-9#.-]{1,20}){0,5}") {
        let kind = classify(&Path::from(path.as_str()));
        let own = matches!(kind, ObjectKind::Other | ObjectKind::Root(_) | ObjectKind::Prefetch(_));
        prop_assert!(own, "no hash is that short: {:?}", kind);
    }
}
