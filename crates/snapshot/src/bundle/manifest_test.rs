use proptest::prelude::*;

use super::*;

fn sample() -> BundleManifest {
    let part = |number: u64, extents: Vec<(u64, u64)>| BundlePart {
        object: format!("web.part.000{number}"),
        bytes: 1000 + number,
        blake3: "ab".repeat(32),
        sha256: "cd".repeat(32),
        extents,
    };
    BundleManifest {
        format: FORMAT.to_owned(),
        version: VERSION,
        name: "web".to_owned(),
        disk_bytes: 1 << 20,
        data_bytes: 12288,
        codec: CODEC.to_owned(),
        attributes: serde_json::from_str(r#"{"architecture":"x86_64"}"#).unwrap(),
        parts: vec![part(0, vec![(8192, 4096), (0, 4096)]), part(1, vec![(4096, 4096)])],
    }
}

#[test]
fn a_manifest_comes_back() {
    assert_eq!(BundleManifest::decode(&sample().encode().unwrap()).unwrap(), sample());
}

/// docs/storage-objects.md.
#[test]
fn a_manifest_is_the_documented_one() {
    let digests = format!(r#""blake3":"{}","sha256":"{}""#, "ab".repeat(32), "cd".repeat(32));
    let expected = format!(
        r#"{{"format":"hearth-bundle","version":1,"name":"web","disk_bytes":1048576,"data_bytes":12288,"codec":"zstd",
        "attributes":{{"architecture":"x86_64"}},"parts":[
        {{"object":"web.part.0000","bytes":1000,{digests},"extents":[[8192,4096],[0,4096]]}},
        {{"object":"web.part.0001","bytes":1001,{digests},"extents":[[4096,4096]]}}]}}"#
    );
    let strip = |text: &str| text.split_whitespace().collect::<String>();
    assert_eq!(strip(&String::from_utf8(sample().encode().unwrap()).unwrap()), strip(&expected));
    assert_eq!(BundleManifest::decode(expected.as_bytes()).unwrap(), sample());
}

#[test]
fn nonsense_in_it_is_refused() {
    let refused = |what: &str, change: fn(&mut BundleManifest)| {
        let mut manifest = sample();
        change(&mut manifest);
        let error = BundleManifest::decode(&manifest.encode().unwrap()).unwrap_err().to_string();
        assert!(error.contains(what), "{error}");
    };
    refused("signature", |m| m.format = "x".into());
    refused("version 2", |m| m.version = 2);
    refused("codec", |m| m.codec = "gzip".into());
    refused("a disk of", |m| m.disk_bytes = 0);
    refused("a disk of", |m| m.disk_bytes = 1000);
    refused("a disk of", |m| m.disk_bytes = u64::MAX - 511);
    refused("called", |m| m.parts[0].object = "../../etc/passwd".into());
    refused("called", |m| m.parts[0].object = "..".into());
    refused("called", |m| m.parts[0].object = String::new());
    refused("of 99999999999 bytes", |m| m.parts[0].bytes = 99_999_999_999);
    refused("digest", |m| m.parts[1].sha256 = "abc".into());
    refused("overlaps", |m| m.parts[1].extents = vec![(4096, 4097)]);
    refused("overlaps", |m| m.parts[1].extents = vec![(1 << 20, 1)]);
    refused("overlaps", |m| m.parts[1].extents = vec![(u64::MAX, 2)]);
    refused("overlaps", |m| m.parts[1].extents = vec![(4096, 0)]);
    refused("it says", |m| m.data_bytes = 1);
}

proptest! {
    #[test]
    fn changed_bytes_never_make_an_impossible_manifest(changes in proptest::collection::vec((0usize..900, any::<u8>()), 1..8)) {
        let mut object = sample().encode().unwrap();
        for (at, value) in changes {
            if let Some(byte) = object.get_mut(at) {
                *byte = value;
            }
        }
        if let Ok(manifest) = BundleManifest::decode(&object) {
            for (offset, length) in manifest.parts.iter().flat_map(|part| &part.extents) {
                prop_assert!(offset + length <= manifest.disk_bytes);
            }
            prop_assert!(manifest.parts.iter().all(|part| !part.object.contains('/') && part.bytes <= 2 * PART_BYTES));
        }
    }
}
