//! The metadata categories as a tree of texts.
//! Source: <https://docs.aws.amazon.com/AWSEC2/latest/UserGuide/instancedata-data-categories.html>

use std::collections::BTreeMap;

use ipnet::Ipv4Net;
use serde_json::json;

use crate::config::{InstanceMetadata, mac_text};
use crate::host_name;

/// Versions of the interface; all answer alike. The first is what old clients ask for, the middle ones are cloud-init's.
const VERSIONS: [&str; 6] = ["1.0", "2009-04-04", "2016-09-02", "2018-09-24", "2021-03-23", "latest"];

enum Node {
    Text(Vec<u8>),
    Folder(BTreeMap<String, Node>),
}

impl Node {
    fn folder() -> Self {
        Self::Folder(BTreeMap::new())
    }

    fn put(&mut self, path: &str, text: impl Into<Vec<u8>>) {
        let mut node = self;
        for name in path.split('/') {
            let Node::Folder(entries) = node else { return };
            node = entries.entry(name.to_owned()).or_insert_with(Node::folder);
        }
        *node = Node::Text(text.into());
    }

    fn get(&self, path: &str) -> Option<&Node> {
        path.split('/').filter(|name| !name.is_empty()).try_fold(self, |node, name| match node {
            Node::Folder(entries) => entries.get(name),
            Node::Text(_) => None,
        })
    }

    fn listing(&self) -> Vec<u8> {
        match self {
            Node::Text(text) => text.clone(),
            Node::Folder(entries) => entries
                .iter()
                .map(|(name, node)| match node {
                    Node::Folder(_) => format!("{name}/"),
                    Node::Text(_) => name.clone(),
                })
                .collect::<Vec<_>>()
                .join("\n")
                .into_bytes(),
        }
    }
}

/// What follows the version in a path, or `None` when there is no known version.
pub(super) fn strip_version(path: &str) -> Option<&str> {
    let path = path.strip_prefix('/')?;
    let version = VERSIONS.iter().find(|v| path == **v || path.starts_with(&format!("{v}/")))?;
    path.get(version.len()..)
}

/// The body for a path, or `None` for 404.
pub(super) fn lookup(instance: &InstanceMetadata, subnet: Ipv4Net, path: &str) -> Option<Vec<u8>> {
    if path.is_empty() || path == "/" {
        return Some(VERSIONS.join("\n").into_bytes());
    }
    let inside = strip_version(path)?.trim_matches('/');
    // The list of keys is no folder like others: it shows "0=name", and 0/ holds the formats.
    if inside == "meta-data/public-keys" {
        return instance.public_key.as_ref().map(|(name, _)| format!("0={name}").into_bytes());
    }
    tree(instance, subnet).get(inside).map(Node::listing)
}

fn tree(instance: &InstanceMetadata, subnet: Ipv4Net) -> Node {
    let mut root = Node::folder();
    let mut put = |path: &str, text: &str| root.put(&format!("meta-data/{path}"), text);
    put("ami-id", &instance.image_id);
    put("ami-launch-index", &instance.ami_launch_index.to_string());
    put("ami-manifest-path", "(unknown)");
    put("block-device-mapping/ami", "/dev/sda1");
    put("block-device-mapping/root", "/dev/sda1");
    put("instance-action", "none");
    put("instance-id", instance.instance_id.as_str());
    put("instance-life-cycle", "on-demand");
    put("instance-type", &instance.instance_type);
    put("placement/availability-zone", &instance.availability_zone);
    put("placement/region", &instance.region);
    put("profile", "default-hvm");
    put("reservation-id", &instance.reservation_id);
    put("services/domain", "hearth.internal");
    put("services/partition", "aws");
    if let Some((_, key)) = &instance.public_key {
        put("public-keys/0/openssh-key", key);
    }
    for (key, value) in instance.tags.iter().filter(|(key, _)| !key.is_empty() && !key.contains('/')) {
        put(&format!("tags/instance/{key}"), value);
    }
    if let Some(first) = instance.nics.first() {
        let name = host_name(first.ipv4);
        put("hostname", &name);
        put("local-hostname", &name);
        put("local-ipv4", &first.ipv4.to_string());
        put("mac", &mac_text(&first.mac));
    }
    for nic in &instance.nics {
        let mac = mac_text(&nic.mac);
        let mut put = |name: &str, text: &str| put(&format!("network/interfaces/macs/{mac}/{name}"), text);
        put("device-number", &nic.device_index.to_string());
        put("local-hostname", &host_name(nic.ipv4));
        put("local-ipv4s", &nic.ipv4.to_string());
        put("mac", &mac);
        put("owner-id", &instance.account_id);
        put("subnet-ipv4-cidr-block", &subnet.to_string());
    }
    if let Some(user_data) = &instance.user_data {
        root.put("user-data", user_data.clone());
    }
    let document = json!({
        "accountId": instance.account_id,
        "architecture": "x86_64",
        "availabilityZone": instance.availability_zone,
        "imageId": instance.image_id,
        "instanceId": instance.instance_id.as_str(),
        "instanceType": instance.instance_type,
        "pendingTime": instance.launch_time,
        "privateIp": instance.nics.first().map(|nic| nic.ipv4.to_string()),
        "region": instance.region,
        "version": "2017-09-30",
    });
    root.put("dynamic/instance-identity/document", format!("{document:#}"));
    root
}

#[cfg(test)]
#[path = "tree_test.rs"]
mod tests;
