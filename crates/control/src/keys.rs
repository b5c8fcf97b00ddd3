//! Where records stand in the store. Values are messages of `hearth.record.v1`, or an id where a key only makes something
//! unique.

use std::fmt::Write;

use hearth_store::leader::{LAST_LEADER_KEY, LEADER_KEY};
use sha2::{Digest, Sha256};

pub(crate) const CLUSTER: &str = "/cluster";

pub(crate) fn account(account: &str) -> String {
    format!("/accounts/{account}")
}

pub(crate) fn account_name(name: &str) -> String {
    format!("/account-names/{}", segment(name))
}

pub(crate) fn api_token(sha256_hex: &str) -> String {
    format!("/tokens/{sha256_hex}")
}

pub(crate) fn join_token(sha256_hex: &str) -> String {
    format!("/join-tokens/{sha256_hex}")
}

pub(crate) fn client_token(account: &str, call: &str, token: &str) -> String {
    format!("/client-tokens/{account}/{call}/{}", segment(token))
}

pub(crate) fn key_pair(account: &str, id: &str) -> String {
    format!("/key-pairs/{account}/{id}")
}

pub(crate) fn key_pair_name(account: &str, name: &str) -> String {
    format!("/key-pair-names/{account}/{}", segment(name))
}

pub(crate) fn image_spec(account: &str, id: &str) -> String {
    format!("/images/{account}/{id}/spec")
}

pub(crate) fn image_status(account: &str, id: &str) -> String {
    format!("/images/{account}/{id}/status")
}

pub(crate) fn image_name(account: &str, name: &str) -> String {
    format!("/image-names/{account}/{}", segment(name))
}

pub(crate) fn volume(account: &str, id: &str) -> String {
    format!("/volumes/{account}/{id}/spec")
}

pub(crate) fn snapshot_spec(account: &str, id: &str) -> String {
    format!("/snapshots/{account}/{id}/spec")
}

pub(crate) fn snapshot_status(account: &str, id: &str) -> String {
    format!("/snapshots/{account}/{id}/status")
}

pub(crate) fn task(account: &str, id: &str) -> String {
    format!("/tasks/{account}/{id}")
}

pub(crate) const STORAGE_EPOCH: &str = "/storage/epoch";

pub(crate) fn host_spec(id: &str) -> String {
    format!("/hosts/{id}/spec")
}

pub(crate) fn host_status(id: &str) -> String {
    format!("/hosts/{id}/status")
}

pub(crate) fn host_name(name: &str) -> String {
    format!("/host-names/{}", segment(name))
}

pub(crate) fn instance_spec(account: &str, id: &str) -> String {
    format!("/instances/{account}/{id}/spec")
}

pub(crate) fn instance_status(account: &str, id: &str) -> String {
    format!("/instances/{account}/{id}/status")
}

pub(crate) fn eviction(host: &str, instance: &str) -> String {
    format!("/evictions/{host}/{instance}")
}

/// An address of a host's instance network; its value is the instance's id.
pub(crate) fn address(host: &str, address: &str) -> String {
    format!("/addresses/{host}/{address}")
}

/// A MAC address; its value is the instance's id.
pub(crate) fn mac(mac: &str) -> String {
    format!("/macs/{mac}")
}

/// What a key is about.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum Key<'a> {
    Cluster,
    Account(&'a str),
    ApiToken(&'a str),
    JoinToken(&'a str),
    ClientToken,
    Pair(&'a str),
    ImageSpec(&'a str),
    ImageStatus(&'a str),
    Volume(&'a str),
    SnapshotSpec(&'a str),
    SnapshotStatus(&'a str),
    Task(&'a str),
    StorageEpoch,
    HostSpec(&'a str),
    HostStatus(&'a str),
    InstanceSpec(&'a str),
    InstanceStatus(&'a str),
    Eviction(&'a str, &'a str),
    Address(&'a str, &'a str),
    Mac(&'a str),
    /// Unique names and the leader: only transactions look at them.
    Other,
    /// No release has written this.
    Unknown,
}

impl<'a> Key<'a> {
    pub fn parse(key: &'a str) -> Self {
        if key == LEADER_KEY || key == LAST_LEADER_KEY {
            return Self::Other;
        }
        let mut parts = key.split('/').skip(1);
        let all = (parts.next(), parts.next(), parts.next(), parts.next(), parts.next());
        match all {
            (Some("cluster"), None, ..) => Self::Cluster,
            (Some("accounts"), Some(id), None, ..) => Self::Account(id),
            (Some("tokens"), Some(hash), None, ..) => Self::ApiToken(hash),
            (Some("join-tokens"), Some(hash), None, ..) => Self::JoinToken(hash),
            (Some("client-tokens"), Some(_), Some(_), Some(_), None) => Self::ClientToken,
            (Some("key-pairs"), Some(_), Some(id), None, _) => Self::Pair(id),
            (Some("images"), Some(_), Some(id), Some("spec"), None) => Self::ImageSpec(id),
            (Some("images"), Some(_), Some(id), Some("status"), None) => Self::ImageStatus(id),
            (Some("volumes"), Some(_), Some(id), Some("spec"), None) => Self::Volume(id),
            (Some("snapshots"), Some(_), Some(id), Some("spec"), None) => Self::SnapshotSpec(id),
            (Some("snapshots"), Some(_), Some(id), Some("status"), None) => Self::SnapshotStatus(id),
            (Some("tasks"), Some(_), Some(id), None, _) => Self::Task(id),
            (Some("storage"), Some("epoch"), None, ..) => Self::StorageEpoch,
            (Some("hosts"), Some(id), Some("spec"), None, _) => Self::HostSpec(id),
            (Some("hosts"), Some(id), Some("status"), None, _) => Self::HostStatus(id),
            (Some("instances"), Some(_), Some(id), Some("spec"), None) => Self::InstanceSpec(id),
            (Some("instances"), Some(_), Some(id), Some("status"), None) => Self::InstanceStatus(id),
            (Some("evictions"), Some(host), Some(id), None, _) => Self::Eviction(host, id),
            (Some("addresses"), Some(host), Some(address), None, _) => Self::Address(host, address),
            (Some("macs"), Some(mac), None, ..) => Self::Mac(mac),
            (Some("account-names" | "key-pair-names" | "image-names" | "host-names"), ..) => Self::Other,
            _ => Self::Unknown,
        }
    }
}

/// Longest name that is kept readable in a key.
const MAX_SEGMENT_BYTES: usize = 600;

/// A user's text as one key segment: letters, digits, `.`, `_`, `-` stand for themselves, other bytes as `%XX`. Texts that
/// would become too long are replaced by their hash.
fn segment(text: &str) -> String {
    let mut out = String::with_capacity(text.len());
    for byte in text.bytes() {
        match byte {
            b'a'..=b'z' | b'A'..=b'Z' | b'0'..=b'9' | b'.' | b'_' | b'-' => out.push(char::from(byte)),
            // Writing to a String cannot fail.
            _ => _ = write!(out, "%{byte:02X}"),
        }
    }
    if out.is_empty() {
        // No text encodes to a bare percent sign.
        out.push('%');
    }
    if out.len() > MAX_SEGMENT_BYTES {
        out = format!("%sha256-{}", sha256_hex(text.as_bytes()));
    }
    out
}

pub(crate) fn sha256_hex(bytes: &[u8]) -> String {
    hex::encode(Sha256::digest(bytes))
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn keys_are_read_back_as_what_they_are() {
        assert_eq!(Key::parse(CLUSTER), Key::Cluster);
        assert_eq!(Key::parse(&account("1")), Key::Account("1"));
        assert_eq!(Key::parse(&api_token("ab")), Key::ApiToken("ab"));
        assert_eq!(Key::parse(&join_token("ab")), Key::JoinToken("ab"));
        assert_eq!(Key::parse(&client_token("1", "run", "a/b")), Key::ClientToken);
        assert_eq!(Key::parse(&key_pair("1", "key-1")), Key::Pair("key-1"));
        assert_eq!(Key::parse(&image_spec("1", "ami-1")), Key::ImageSpec("ami-1"));
        assert_eq!(Key::parse(&image_status("1", "ami-1")), Key::ImageStatus("ami-1"));
        assert_eq!(Key::parse(&volume("1", "vol-1")), Key::Volume("vol-1"));
        assert_eq!(Key::parse(&snapshot_spec("1", "snap-1")), Key::SnapshotSpec("snap-1"));
        assert_eq!(Key::parse(&snapshot_status("1", "snap-1")), Key::SnapshotStatus("snap-1"));
        assert_eq!(Key::parse(&task("1", "bun-1")), Key::Task("bun-1"));
        assert_eq!(Key::parse(STORAGE_EPOCH), Key::StorageEpoch);
        assert_eq!(Key::parse(&host_spec("h-1")), Key::HostSpec("h-1"));
        assert_eq!(Key::parse(&host_status("h-1")), Key::HostStatus("h-1"));
        assert_eq!(Key::parse(&instance_spec("1", "i-1")), Key::InstanceSpec("i-1"));
        assert_eq!(Key::parse(&instance_status("1", "i-1")), Key::InstanceStatus("i-1"));
        assert_eq!(Key::parse(&eviction("h-1", "i-1")), Key::Eviction("h-1", "i-1"));
        assert_eq!(Key::parse(&address("h-1", "10.0.0.4")), Key::Address("h-1", "10.0.0.4"));
        assert_eq!(Key::parse(&mac("0e:00")), Key::Mac("0e:00"));
        assert_eq!(Key::parse(&image_name("1", "x/y")), Key::Other);
        assert_eq!(Key::parse(LEADER_KEY), Key::Other);
        assert_eq!(Key::parse(LAST_LEADER_KEY), Key::Other);
        assert_eq!(Key::parse("/instances/1/i-1/other"), Key::Unknown);
        assert_eq!(Key::parse("/else"), Key::Unknown);
    }

    proptest! {
        #[test]
        fn any_name_makes_a_key_of_its_own(a in any::<String>(), b in any::<String>()) {
            let (key_a, key_b) = (image_name("1", &a), image_name("1", &b));
            prop_assert!(hearth_store::limits::check_key(&key_a).is_ok());
            prop_assert_eq!(a == b, key_a == key_b);
        }
    }
}
