//! Bundles whose manifest is well formed, whose digests are right, and which lie.

use proptest::prelude::*;
use serde_json::{Value, json};

use super::*;

const DISK_BYTES: u64 = 1 << 20;

/// A part as it stands in the bucket, and what the manifest says of it.
#[derive(Clone, Debug)]
struct Part {
    object: String,
    extents: Vec<(u64, u64)>,
    stored: Vec<u8>,
    /// Size and digests told, if they are lies.
    bytes: Option<u64>,
    digest: Option<String>,
}

#[derive(Clone, Debug)]
struct Forged {
    format: String,
    version: u32,
    codec: String,
    disk_bytes: u64,
    data_bytes: Option<u64>,
    parts: Vec<Part>,
}

/// What a part of these extents holds: bytes that tell where they belong.
fn content(extents: &[(u64, u64)]) -> Vec<u8> {
    extents.iter().flat_map(|(offset, length)| (*offset..offset + length).map(|at| (at / 512) as u8 | 1)).collect()
}

fn packed(content: &[u8]) -> Vec<u8> {
    zstd::bulk::compress(content, 3).unwrap()
}

impl Forged {
    fn honest() -> Self {
        let part = |object: &str, extents: Vec<(u64, u64)>| Part {
            stored: packed(&content(&extents)),
            object: object.into(),
            extents,
            bytes: None,
            digest: None,
        };
        Self {
            format: "hearth-bundle".into(),
            version: 1,
            codec: "zstd".into(),
            disk_bytes: DISK_BYTES,
            data_bytes: None,
            parts: vec![
                part("web.part.0000", vec![(8192, 4096), (0, 4096)]),
                part("web.part.0001", vec![(4096, 4096), (DISK_BYTES - 512, 512)]),
            ],
        }
    }

    fn json(&self) -> Value {
        let part = |part: &Part| {
            json!({
                "object": part.object,
                "bytes": part.bytes.unwrap_or(part.stored.len() as u64),
                "blake3": blake3::hash(&part.stored).to_hex().as_str(),
                "sha256": part.digest.clone().unwrap_or_else(|| hex::encode(Sha256::digest(&part.stored))),
                "extents": part.extents,
            })
        };
        let lengths = self.parts.iter().flat_map(|part| &part.extents).map(|(_, length)| *length);
        let told = self.data_bytes.unwrap_or_else(|| lengths.fold(0, u64::wrapping_add));
        json!({
            "format": self.format, "version": self.version, "name": "web", "codec": self.codec,
            "disk_bytes": self.disk_bytes, "data_bytes": told, "attributes": {"anything": [null, {}]},
            "parts": self.parts.iter().map(part).collect::<Vec<_>>(),
        })
    }

    /// Whether the manifest makes sense by itself, by the documentation alone.
    fn makes_sense(&self) -> bool {
        let extents: Vec<(u64, u64)> = self.parts.iter().flat_map(|part| part.extents.clone()).collect();
        let end = |(offset, length): (u64, u64)| u128::from(offset) + u128::from(length);
        let inside = |extent: &(u64, u64)| extent.1 > 0 && end(*extent) <= u128::from(self.disk_bytes);
        let apart = |(at, a): (usize, &(u64, u64))| {
            extents.iter().skip(at + 1).all(|b| end(*a) <= u128::from(b.0) || end(*b) <= u128::from(a.0))
        };
        let named = |part: &Part| {
            let allowed = "abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789-_.";
            (1..=255).contains(&part.object.len())
                && !part.object.starts_with('.')
                && part.object.chars().all(|letter| allowed.contains(letter))
        };
        let digest = |part: &Part| {
            let told = part.digest.as_ref();
            told.is_none_or(|told| told.len() == 64 && told.chars().all(|digit| digit.is_ascii_hexdigit()))
        };
        let sum: u128 = extents.iter().map(|(_, length)| u128::from(*length)).sum();
        self.format == "hearth-bundle"
            && self.version == 1
            && self.codec == "zstd"
            && (512..=1 << 40).contains(&self.disk_bytes)
            && self.disk_bytes.is_multiple_of(512)
            && self
                .parts
                .iter()
                .all(|part| named(part) && digest(part) && part.bytes.unwrap_or(part.stored.len() as u64) <= 20 << 20)
            && extents.iter().all(inside)
            && extents.iter().enumerate().all(apart)
            && u128::from(self.data_bytes.unwrap_or(sum as u64)) == sum
    }

    /// The disk, if the parts are what the manifest says.
    fn disk(&self) -> Option<Vec<u8>> {
        let mut disk = vec![0; self.disk_bytes as usize];
        for part in &self.parts {
            if part.digest.is_some() || part.bytes.is_some_and(|bytes| bytes != part.stored.len() as u64) {
                return None;
            }
            let mut content = Vec::new();
            let decoder = zstd::stream::read::Decoder::new(&part.stored[..]).ok()?;
            decoder.take(part.data_bytes() + 1).read_to_end(&mut content).ok()?;
            if content.len() as u64 != part.data_bytes() {
                return None;
            }
            for (offset, length) in &part.extents {
                let rest = content.split_off(*length as usize);
                disk[*offset as usize..(offset + length) as usize].copy_from_slice(&content);
                content = rest;
            }
        }
        Some(disk)
    }
}

impl Part {
    fn data_bytes(&self) -> u64 {
        self.extents.iter().map(|(_, length)| length).sum()
    }
}

fn forged() -> impl Strategy<Value = Forged> {
    let edges =
        vec![0, 1, 511, 512, 4096, 8192, 12288, DISK_BYTES - 512, DISK_BYTES, 1 << 40, u64::MAX - 511, u64::MAX];
    let number = move || prop::sample::select(edges.clone());
    let object = prop_oneof![
        3 => prop::sample::select(vec!["web.part.0000", "web.part.0001", "a", "..part"]).prop_map(str::to_owned),
        1 => prop::sample::select(vec!["", "..", "../web", "a/b", "/etc/passwd", "a\\b", "a%2fb", "a\0", "ä"]).prop_map(str::to_owned),
        1 => "[a-z./]{0,12}",
        1 => (254usize..258).prop_map(|length| "n".repeat(length)),
    ];
    let part = (
        object,
        prop::collection::vec((number(), number()), 0..3),
        prop::option::weighted(0.1, prop_oneof![number(), Just((20 << 20) + 1)]),
        prop::option::weighted(0.1, "[0-9a-fA-Fg]{63,65}"),
    );
    let part = part.prop_map(|(object, extents, bytes, digest)| Part {
        stored: packed(b"whatever"),
        object,
        extents,
        bytes,
        digest,
    });
    let honest = prop::sample::select(Forged::honest().parts);
    (
        prop::collection::vec(prop_oneof![3 => honest, 1 => part], 0..4),
        prop_oneof![3 => Just(DISK_BYTES), 1 => number()],
        prop::option::weighted(0.1, number()),
        prop_oneof![9 => Just("zstd"), 1 => Just("none")],
        prop_oneof![9 => Just(1u32), 1 => any::<u32>()],
        prop_oneof![9 => Just("hearth-bundle"), 1 => Just("")],
    )
        .prop_map(|(parts, disk_bytes, data_bytes, codec, version, format)| Forged {
            format: format.into(),
            codec: codec.into(),
            version,
            disk_bytes,
            data_bytes,
            parts,
        })
}

/// Restores it; the file's content afterwards, and what came out of it.
async fn restored(forged: &Forged) -> (Vec<u8>, Result<(), StorageError>) {
    let objects = InMemory::new();
    let put = async |path: &str, content: Vec<u8>| {
        objects.put(&Path::from(path), PutPayload::from(content)).await.unwrap();
    };
    put("b/web.manifest.json", serde_json::to_vec(&forged.json()).unwrap()).await;
    for part in &forged.parts {
        put(&format!("b/{}", part.object), part.stored.clone()).await;
    }
    let folder = tempfile::tempdir().unwrap();
    let (path, file) = target(folder.path());
    let work = async {
        let (manifest, _) = load_bundle(&objects, "b/web.manifest.json", None).await?;
        restore_bundle(&objects, "b/web.manifest.json", &manifest, file, silent()).await
    };
    let result = work.await;
    (fs::read(path).unwrap(), result)
}

#[tokio::test(flavor = "multi_thread")]
async fn parts_with_right_digests_that_lie_are_refused() {
    let honest = Forged::honest();
    let (disk, result) = restored(&honest).await;
    result.unwrap();
    assert!(Some(disk) == honest.disk());
    let bomb = zstd::stream::encode_all(std::io::repeat(7).take(1 << 30), 1).unwrap();
    let whole = content(&honest.parts[0].extents);
    let mut wide = zstd::stream::Encoder::new(Vec::new(), 1).unwrap();
    wide.window_log(27).unwrap();
    std::io::copy(&mut &whole[..], &mut wide).unwrap();
    let wide = wide.finish().unwrap();
    for stored in [bomb, packed(&whole[1..]), packed(&[&whole[..], &[0]].concat()), whole.clone(), Vec::new(), wide] {
        let mut forged = Forged::honest();
        forged.parts[0].stored = stored;
        let (disk, result) = restored(&forged).await;
        let error = result.unwrap_err();
        assert!(matches!(error, StorageError::Damaged { damage: Damage::Decompression(8192), .. }), "{error}");
        assert_eq!(disk.len() as u64, DISK_BYTES, "the file outgrew its disk");
        assert!(disk[12288..DISK_BYTES as usize - 512].iter().all(|byte| *byte == 0), "written outside of extents");
    }
}

/// Every bit and every length of a small part, and of the manifest for whoever kept its hash.
#[tokio::test(flavor = "multi_thread")]
async fn invariant_6_every_flipped_bit_and_cut_of_a_bundle_is_noticed() {
    let honest = Forged::honest();
    let json = serde_json::to_vec(&honest.json()).unwrap();
    let manifest = BundleManifest::decode(&json).unwrap();
    let kept = hex::encode(Sha256::digest(&json));
    let part = &honest.parts[0].stored;
    let damaged = |whole: &[u8]| {
        let whole = whole.to_vec();
        let flipped = (0..whole.len() * 8).map({
            let whole = whole.clone();
            move |bit| {
                let mut changed = whole.clone();
                changed[bit / 8] ^= 1 << (bit % 8);
                changed
            }
        });
        flipped.chain((0..whole.len()).map(move |length| whole[..length].to_vec()))
    };
    let objects = InMemory::new();
    let put = async |path: &str, content: Vec<u8>| {
        objects.put(&Path::from(path), PutPayload::from(content)).await.unwrap();
    };
    for content in damaged(&json) {
        put("b/web.manifest.json", content).await;
        let loaded = load_bundle(&objects, "b/web.manifest.json", Some(&kept)).await;
        assert!(matches!(loaded, Err(StorageError::Damaged { .. })), "{loaded:?}");
    }
    put("b/web.part.0001", honest.parts[1].stored.clone()).await;
    assert!(part.len() < 300, "{} bytes", part.len());
    for content in damaged(part) {
        put("b/web.part.0000", content).await;
        let file = Arc::new(tempfile::tempfile().unwrap());
        let result = restore_bundle(&objects, "b/web.manifest.json", &manifest, file, silent()).await;
        assert!(matches!(result, Err(StorageError::Damaged { .. })), "{result:?}");
    }
}

proptest! {
    #![proptest_config(crate::testing::cases(600))]

    #[test]
    fn a_manifest_makes_sense_or_is_damage(forged in forged()) {
        let decoded = BundleManifest::decode(&serde_json::to_vec(&forged.json()).unwrap());
        prop_assert_eq!(decoded.is_ok(), forged.makes_sense(), "{:?}", decoded);
    }
}

proptest! {
    #![proptest_config(crate::testing::cases(300))]

    #[test]
    fn a_bundle_is_its_disk_or_an_error(forged in forged()) {
        let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(2).build().unwrap();
        prop_assume!(forged.disk_bytes <= DISK_BYTES);
        // What stands in the bucket under one name is one object.
        let mut names = std::collections::HashMap::new();
        prop_assume!(forged.parts.iter().all(|p| names.insert(p.object.clone(), p.stored.clone()).is_none_or(|old| old == p.stored)));
        let (disk, result) = runtime.block_on(restored(&forged));
        match result {
            Ok(()) => prop_assert!(forged.makes_sense() && forged.disk() == Some(disk)),
            Err(error) => {
                prop_assert!(!forged.makes_sense() || forged.disk().is_none(), "{}", error);
                prop_assert!(matches!(error, StorageError::Damaged { .. }), "{}", error);
                prop_assert!(disk.len() as u64 <= DISK_BYTES);
            }
        }
    }
}
