//! What a bundle's manifest says.

use serde::{Deserialize, Serialize};

use crate::objects::Damage;

/// Parts are not larger than this, as those of EC2's bundles.
pub const PART_BYTES: u64 = 10 << 20;
/// Largest disk in a bundle: 1 TiB.
pub const MAX_BUNDLE_DISK_BYTES: u64 = 1 << 40;
pub(super) const FORMAT: &str = "hearth-bundle";
pub(super) const VERSION: u32 = 1;
pub(super) const CODEC: &str = "zstd";
/// Largest manifest object.
pub(super) const MAX_MANIFEST_BYTES: u64 = 256 << 20;

/// The manifest of a bundle.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct BundleManifest {
    /// `hearth-bundle`.
    pub format: String,
    /// 1.
    pub version: u32,
    /// Name of the bundle.
    pub name: String,
    /// Size of the disk in bytes.
    pub disk_bytes: u64,
    /// Bytes of it that the parts hold; all others are zeros.
    pub data_bytes: u64,
    /// `zstd`: every part is one zstd frame.
    pub codec: String,
    /// Attributes of the AMI (architecture, kernel, command line, …), as whoever registers it understands them.
    #[serde(default)]
    pub attributes: serde_json::Map<String, serde_json::Value>,
    /// The parts.
    pub parts: Vec<BundlePart>,
}

/// One part: an object beside the manifest.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct BundlePart {
    /// Name of the object, in the manifest's folder.
    pub object: String,
    /// Its size in bytes.
    pub bytes: u64,
    /// BLAKE3 of the object, 64 hex digits.
    pub blake3: String,
    /// SHA-256 of the object, 64 hex digits.
    pub sha256: String,
    /// Where its content stands on the disk, one after the other: (offset, length) in bytes.
    pub extents: Vec<(u64, u64)>,
}

impl BundlePart {
    /// Bytes that it unpacks to.
    pub fn data_bytes(&self) -> u64 {
        self.extents.iter().fold(0, |sum, (_, length)| sum.saturating_add(*length))
    }
}

impl BundleManifest {
    pub(super) fn encode(&self) -> Result<Vec<u8>, Damage> {
        serde_json::to_vec_pretty(self).map_err(|error| Damage::Field(error.to_string()))
    }

    /// Reads and checks a manifest.
    pub(super) fn decode(object: &[u8]) -> Result<Self, Damage> {
        let manifest: Self = serde_json::from_slice(object).map_err(|error| Damage::Field(error.to_string()))?;
        manifest.check()?;
        Ok(manifest)
    }

    /// Every extent inside the disk, none twice, every name a plain one.
    pub(super) fn check(&self) -> Result<(), Damage> {
        let bad = |what: String| Err(Damage::Field(what));
        if self.format != FORMAT {
            return Err(Damage::Signature("a bundle's manifest"));
        }
        if self.version != VERSION {
            return Err(Damage::Version(self.version));
        }
        if self.codec != CODEC {
            return bad(format!("codec '{}' is not known", self.codec));
        }
        if self.disk_bytes == 0 || self.disk_bytes > MAX_BUNDLE_DISK_BYTES || !self.disk_bytes.is_multiple_of(512) {
            return bad(format!("a disk of {} bytes", self.disk_bytes));
        }
        let mut extents = Vec::new();
        for part in &self.parts {
            let plain = |byte: u8| byte.is_ascii_alphanumeric() || matches!(byte, b'-' | b'_' | b'.');
            if part.object.is_empty()
                || part.object.len() > 255
                || part.object.starts_with('.')
                || !part.object.bytes().all(plain)
            {
                return bad(format!("a part called '{}'", part.object));
            }
            if part.bytes > 2 * PART_BYTES {
                return bad(format!("part {} of {} bytes", part.object, part.bytes));
            }
            for digest in [&part.blake3, &part.sha256] {
                let mut bytes = [0; 32];
                if hex::decode_to_slice(digest, &mut bytes).is_err() {
                    return bad(format!("part {} has '{digest}' for a digest", part.object));
                }
            }
            extents.extend_from_slice(&part.extents);
        }
        extents.sort_unstable();
        let mut end = 0;
        let mut data_bytes = 0u64;
        for (offset, length) in extents {
            let behind = offset.checked_add(length).filter(|behind| *behind <= self.disk_bytes);
            let Some(behind) = behind.filter(|_| offset >= end && length > 0) else {
                return bad(format!("an extent of {length} bytes at {offset} overlaps another or leaves the disk"));
            };
            end = behind;
            data_bytes += length;
        }
        if data_bytes != self.data_bytes {
            return bad(format!("its parts hold {data_bytes} bytes, it says {}", self.data_bytes));
        }
        Ok(())
    }
}

#[cfg(test)]
#[path = "manifest_test.rs"]
mod tests;
