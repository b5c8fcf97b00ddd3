use super::*;
use proptest::prelude::*;

fn pager(request: &v1::ListInstancesRequest, max_results: u32, next_token: &str, now_ms: u64) -> ApiResult<Pager> {
    let page = v1::PageRequest { max_results, next_token: next_token.into() };
    Pager::with_key(b"key".to_vec(), "ListInstances", "000000000001", request, Some(&page), now_ms)
}

fn list(keys: &[String], max_results: u32, token: &str) -> (Vec<String>, String) {
    let pager = pager(&Default::default(), max_results, token, clock::now_ms()).unwrap();
    let wanted: Vec<&String> = keys.iter().filter(|key| pager.wants(key)).collect();
    let objects = wanted.iter().map(|key| (key.as_str(), v1::Tag { key: (*key).clone(), value: String::new() }));
    let (page, next) = pager.collect(objects);
    (page.into_iter().map(|tag| tag.key).collect(), next.unwrap().next_token)
}

#[test]
fn pages_hold_everything_once_while_others_come_and_go() {
    let mut keys: Vec<String> = (0..50).map(|n| format!("i-{n:03}")).collect();
    let stable = keys.clone();
    let mut seen = Vec::new();
    let mut token = String::new();
    loop {
        let (page, next) = list(&keys, 7, &token);
        assert!(page.len() <= 7);
        seen.extend(page);
        // Something new appears before and behind the cursor, something that was new is gone.
        keys.retain(|key| stable.contains(key));
        keys.push("i-000a".into());
        keys.push("i-048a".into());
        keys.sort();
        if next.is_empty() {
            break;
        }
        token = next;
    }
    seen.retain(|key| stable.contains(key));
    assert_eq!(seen, stable);
}

#[test]
fn an_exact_last_page_has_no_token_and_large_objects_end_a_page_early() {
    let keys: Vec<String> = (0..14).map(|n| format!("i-{n:03}")).collect();
    let (_, next) = list(&keys, 7, "");
    let (page, next) = list(&keys, 7, &next);
    assert_eq!((page.len(), next.as_str()), (7, ""));
    let pager = pager(&Default::default(), 0, "", 0).unwrap();
    let large = (0..10).map(|n| (["a", "b"][n % 2], v1::Tag { key: "x".repeat(1 << 19), value: String::new() }));
    let (page, next) = pager.collect(large);
    assert_eq!(page.len(), 3);
    assert_ne!(next.unwrap().next_token, "");
}

#[test]
fn tokens_are_bound_to_their_request_and_go_stale() {
    let now = clock::now_ms();
    let request = v1::ListInstancesRequest::default();
    let token = pager(&request, 0, "", now).unwrap().seal("i-1", now);
    assert!(pager(&request, 0, &token, now).is_ok());
    let other = v1::ListInstancesRequest { instance_ids: vec!["i-2".into()], ..Default::default() };
    let refused = pager(&other, 0, &token, now).err().unwrap();
    assert_eq!(refused.reason(), "InvalidNextToken");
    assert!(refused.to_string().contains("other parameters"));
    let refused = pager(&request, 0, &token, now + TOKEN_TTL_MS + 1).err().unwrap();
    assert!(refused.to_string().contains("stale"));
    assert!(pager(&request, MAX_RESULTS + 1, "", now).is_err());
}

proptest! {
    #[test]
    fn no_garbage_passes(text in ".{0,100}", encoded in "[A-Za-z0-9_-]{0,100}", at in 0usize..60, bit in 0u8..8) {
        let now = clock::now_ms();
        let request = v1::ListInstancesRequest::default();
        prop_assert!(text.is_empty() || pager(&request, 0, &text, now).is_err());
        prop_assert!(encoded.is_empty() || pager(&request, 0, &encoded, now).is_err());
        let token = pager(&request, 0, "", now).unwrap().seal("i-00000000000000001", now);
        let mut bytes = URL_SAFE_NO_PAD.decode(token).unwrap();
        let index = at % bytes.len();
        bytes[index] ^= 1 << bit;
        prop_assert!(pager(&request, 0, &URL_SAFE_NO_PAD.encode(bytes), now).is_err());
    }
}
