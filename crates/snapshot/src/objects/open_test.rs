use super::*;

#[test]
fn a_local_store_syncs_what_it_writes() {
    let folder = tempfile::tempdir().unwrap();
    let url = format!("file://{}/made/by/opening", folder.path().display());
    let store = open_store(&url, &StoreOptions::default()).unwrap();
    // Off by default in the library underneath.
    assert!(format!("{store:?}").contains("fsync: true"), "{store:?}");
    assert_eq!(local_path(&url).unwrap(), folder.path().join("made/by/opening"));
    assert!(local_path(&url).unwrap().is_dir());
    assert_eq!(local_path("s3://bucket/prefix"), None);
}

#[test]
fn secrets_are_not_printed() {
    let options = StoreOptions {
        s3: S3Options {
            access_key_id: Some("id".into()),
            secret_access_key: Some("hush".into()),
            session_token: Some("hush".into()),
            ..S3Options::default()
        },
        retry_timeout: None,
    };
    assert!(!format!("{options:?}").contains("hush"));
    let store = open_store("s3://bucket/prefix", &options).unwrap();
    assert!(!format!("{store:?} {store}").contains("hush"), "{store:?}");
}
