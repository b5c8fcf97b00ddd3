use proptest::prelude::*;

use super::*;

fn parse(text: &str) -> Result<BackendSettings, String> {
    serde_json::from_str(text).map_err(|error| error.to_string())
}

fn refused(settings: &BackendSettings) -> String {
    let runtime = tokio::runtime::Builder::new_current_thread().build().unwrap();
    Backend::new(settings, runtime.handle().clone()).unwrap_err().to_string()
}

fn nbd(uri: &str) -> NbdSettings {
    NbdSettings {
        name: "san".into(),
        uri: uri.into(),
        provisioner: "/usr/local/bin/provision".into(),
        tls_authority: None,
        tls_certificate: None,
        tls_key: None,
    }
}

fn rbd(name: &str) -> RbdSettings {
    RbdSettings { name: name.into(), pool: "volumes".into(), namespace: None, conf: None, user: None }
}

#[test]
fn settings_are_understood() {
    let parsed = parse(r#"{"kind": "rbd", "name": "ceph", "pool": "volumes", "conf": "/etc/ceph/ceph.conf"}"#).unwrap();
    assert_eq!(parsed, BackendSettings::Rbd(RbdSettings { conf: Some("/etc/ceph/ceph.conf".into()), ..rbd("ceph") }));
    let text =
        r#"{"kind": "nbd", "name": "san", "uri": "nbds://san/{volume}", "provisioner": "/p", "tls-authority": "/ca"}"#;
    let wanted =
        NbdSettings { provisioner: "/p".into(), tls_authority: Some("/ca".into()), ..nbd("nbds://san/{volume}") };
    assert_eq!(parse(text).unwrap(), BackendSettings::Nbd(wanted));
    for bad in [
        r#"{"name": "x", "pool": "p"}"#,
        r#"{"kind": "iscsi", "name": "x"}"#,
        r#"{"kind": "rbd", "name": "x"}"#,
        r#"{"kind": "rbd", "name": "x", "pool": "p", "uri": "nbd://h/{volume}"}"#,
        r#"{"kind": "nbd", "name": "x", "uri": "nbd://h/{volume}"}"#,
    ] {
        assert!(parse(bad).is_err(), "{bad}");
    }
}

#[test]
fn what_cannot_work_is_refused_with_its_reason() {
    for name in ["", "local", "Ceph", "-x", "a b", &"x".repeat(33)] {
        let error = refused(&BackendSettings::Rbd(rbd(name)));
        assert!(error.contains("name"), "{name}: {error}");
    }
    let error = refused(&BackendSettings::Rbd(RbdSettings { pool: "a/b".into(), ..rbd("ceph") }));
    assert!(error.contains("a/b"), "{error}");
    let some = |path: &str| Some(PathBuf::from(path));
    let cases = [
        (nbd("nbd://san/one"), "{volume}"),
        (nbd("http://san/{volume}"), "none of nbd"),
        (nbd("nbds://san/{volume}"), "tls-authority"),
        (NbdSettings { tls_authority: some("/ca"), ..nbd("nbd://san/{volume}") }, "nbds"),
        (NbdSettings { tls_certificate: some("/c"), ..nbd("nbds://san/{volume}") }, "go together"),
        (NbdSettings { tls_authority: some("/no/such/ca"), ..nbd("nbds://san/{volume}") }, "/no/such/ca"),
        (NbdSettings { provisioner: "provision".into(), ..nbd("nbd://san/{volume}") }, "absolute"),
    ];
    for (settings, wanted) in cases {
        let error = refused(&BackendSettings::Nbd(settings));
        assert!(error.contains(wanted), "{wanted}: {error}");
    }
}

proptest! {
    #[test]
    fn no_uri_does_harm(uri in ".{0,40}", volume in "[a-z0-9-]{1,24}") {
        let runtime = tokio::runtime::Builder::new_current_thread().build().unwrap();
        for uri in [uri.clone(), format!("{uri}{VOLUME}"), format!("nbd://{uri}/{VOLUME}")] {
            if let Ok(backend) = Backend::new(&BackendSettings::Nbd(nbd(&uri)), runtime.handle().clone())
                && let Ok(volume) = volume.parse()
            {
                let _ = backend.export(&volume);
            }
        }
    }
}

#[test]
fn what_a_later_attachment_uses_is_not_closed() {
    let folder = tempfile::tempdir().unwrap();
    let of_volume = folder.path().join("vol-1");
    note_generation(&of_volume, 7).unwrap();
    close(&of_volume, 6).unwrap();
    assert_eq!(generation(&of_volume), Some(7));
    close(&of_volume, 7).unwrap();
    assert!(!of_volume.exists());
    close(&of_volume, 7).unwrap();
}
