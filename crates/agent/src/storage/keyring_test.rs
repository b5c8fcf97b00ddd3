use super::*;

fn volume(id: &str, key: &[u8], secret: &[u8]) -> v1::HostVolume {
    v1::HostVolume {
        volume_id: id.to_owned(),
        encrypted: true,
        data_key: key.to_vec().into(),
        base: Some(v1::BaseSnapshot {
            key_domain: Some(v1::KeyDomain {
                name: "account-1".to_owned(),
                secret: secret.to_vec().into(),
                encrypt_on_hosts: true,
            }),
            ..Default::default()
        }),
        ..Default::default()
    }
}

fn desired(volume: v1::HostVolume) -> v1::DesiredInstance {
    let attached = v1::AttachedVolume { volume: Some(volume), ..Default::default() };
    let spec = v1::InstanceSpec { volumes: vec![attached], ..Default::default() };
    v1::DesiredInstance { spec: Some(spec), ..Default::default() }
}

fn layout(folder: &tempfile::TempDir) -> Layout {
    Layout::new(&folder.path().join("state"), folder.path())
}

fn key() -> Vec<u8> {
    (0..64).collect()
}

#[test]
fn keys_are_taken_out_and_found_by_the_next_agent() {
    let folder = tempfile::tempdir().unwrap();
    let keyring = Keyring::open(&layout(&folder));
    let wanted = volume("vol-1", &key(), &[7; 32]);
    assert_eq!(keyring.volume(&wanted).unwrap_err(), KeyError::Missing("volume vol-1".to_owned()));
    let mut instance = desired(wanted.clone());
    keyring.take_instance(&mut instance);
    let stripped = instance.spec.unwrap().volumes.remove(0).volume.unwrap();
    assert!(stripped.data_key.is_empty(), "what goes on is without keys");
    assert!(stripped.base.as_ref().unwrap().key_domain.as_ref().unwrap().secret.is_empty());
    for keyring in [&keyring, &Keyring::open(&layout(&folder))] {
        assert_eq!(keyring.volume(&stripped).unwrap().unwrap().material().as_slice(), key());
        assert_eq!(keyring.domain("account-1").unwrap().id().as_str(), "account-1");
    }
    // What comes without a key, for whatever reason, takes none away.
    keyring.take_instance(&mut desired(stripped.clone()));
    assert!(keyring.volume(&stripped).is_ok());
    keyring.forget_volume("vol-1");
    assert!(Keyring::open(&layout(&folder)).volume(&stripped).unwrap_err().is_transient());
}

#[test]
fn bad_keys_are_refused_for_good() {
    let folder = tempfile::tempdir().unwrap();
    let keyring = Keyring::open(&layout(&folder));
    for bad in [&[1; 63][..], &[1; 64], &[1; 65]] {
        let wanted = volume("vol-1", bad, &[7; 31]);
        keyring.take_instance(&mut desired(wanted.clone()));
        let error = keyring.volume(&wanted).unwrap_err();
        assert_eq!(error, KeyError::Malformed("volume vol-1".to_owned()));
        assert!(!error.is_transient());
    }
    assert!(matches!(keyring.domain("account-1"), Err(KeyError::Malformed(_))));
    let objects: Arc<dyn ObjectStore> = Arc::new(object_store::memory::InMemory::new());
    assert!(matches!(keyring.chunk_store(&objects, None), Err(KeyError::Domain(_))));
}

#[test]
fn a_volume_in_clear_needs_none() {
    let folder = tempfile::tempdir().unwrap();
    let wanted = v1::HostVolume { encrypted: false, ..volume("vol-1", &[], &[]) };
    assert!(Keyring::open(&layout(&folder)).volume(&wanted).unwrap().is_none());
}

#[test]
fn a_damaged_file_is_as_none() {
    let folder = tempfile::tempdir().unwrap();
    let layout = layout(&folder);
    std::fs::write(layout.keyring(), b"{\"volumes\": 7").unwrap();
    assert!(matches!(Keyring::open(&layout).domain("plain"), Err(KeyError::Missing(_))));
}
