use proptest::prelude::*;

use super::*;

#[test]
fn keys_have_a_syntax() {
    for good in ["/a", "/leader", "/instances/123456789012/i-0abc", "/names/My VM/é", "/a.b:c@d"] {
        check_key(good).unwrap();
        check_prefix(good).unwrap();
    }
    for bad in ["", "a", "a/b", "/", "/a/", "//a", "/a//b", "/a\0b", "/a\nb", "/a\u{7f}"] {
        assert!(matches!(check_key(bad), Err(Error::InvalidKey { .. })), "{bad:?}");
    }
    check_prefix("/").unwrap();
    check_prefix("/a/").unwrap();
    for bad in ["", "a/", "//", "/a//", "/\t"] {
        assert!(matches!(check_prefix(bad), Err(Error::InvalidPrefix { .. })), "{bad:?}");
    }
}

#[test]
fn key_length_is_bounded_in_bytes() {
    let longest = format!("/{}", "x".repeat(MAX_KEY_BYTES - 1));
    check_key(&longest).unwrap();
    let error = check_key(&format!("{longest}x")).unwrap_err();
    assert!(error.to_string().len() < 400, "{error}");
}

#[test]
fn lease_ttls_are_bounded() {
    check_lease_ttl(MIN_LEASE_TTL).unwrap();
    check_lease_ttl(MAX_LEASE_TTL).unwrap();
    for ttl in [Duration::ZERO, Duration::from_millis(999), MAX_LEASE_TTL + Duration::from_nanos(1)] {
        assert!(matches!(check_lease_ttl(ttl), Err(Error::LeaseTtl { .. })));
    }
}

#[test]
fn a_key_changes_once_per_transaction() {
    let twice = Txn::new().put("/a", "1").put("/a", "2");
    assert_eq!(check_txn(&twice), Err(Error::DuplicateKey { key: "/a".into() }));
    let put_and_delete = Txn::new().delete("/a").put("/a", "2");
    assert_eq!(check_txn(&put_and_delete), Err(Error::DuplicateKey { key: "/a".into() }));
    let under_prefix = Txn::new().put("/a/b", "2").delete_prefix("/a/");
    assert_eq!(check_txn(&under_prefix), Err(Error::DuplicateKey { key: "/a/b".into() }));
    check_txn(&Txn::new().delete("/a").delete("/a").delete_prefix("/a")).unwrap();
    check_txn(&Txn::new()).unwrap();
}

#[test]
fn prefix_end_steps_over_surrogates_and_the_last_code_point() {
    assert_eq!(prefix_end("/"), Some("0".into()));
    assert_eq!(prefix_end("/a"), Some("/b".into()));
    assert_eq!(prefix_end("/\u{D7FF}"), Some("/\u{E000}".into()));
    assert_eq!(prefix_end("/a\u{10FFFF}"), Some("/b".into()));
    assert_eq!(prefix_end("\u{10FFFF}"), None);
    assert_eq!(prefix_end(""), None);
}

proptest! {
    #[test]
    fn prefix_end_bounds_exactly_the_prefixed_keys(prefix in "/\\PC{0,6}", other in "/\\PC{0,8}", tail in "\\PC{0,4}") {
        let end = prefix_end(&prefix).unwrap();
        let inside = |key: &str| prefix.as_str() <= key && key < end.as_str();
        let extended = format!("{prefix}{tail}");
        prop_assert!(inside(&extended));
        prop_assert_eq!(inside(&other), other.starts_with(&prefix));
    }

    #[test]
    fn any_text_is_judged_without_panic(text in any::<String>()) {
        let key_ok = check_key(&text).is_ok();
        let prefix_ok = check_prefix(&text).is_ok();
        prop_assert!(prefix_ok || !key_ok);
    }
}
