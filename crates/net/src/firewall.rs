//! nftables rules, given to `nft` as one atomic transaction each.
//! Source: <https://wiki.nftables.org/> and nft(8).

use std::net::Ipv4Addr;
use std::process::Stdio;

use tokio::io::AsyncWriteExt;
use tokio::process::Command;

use crate::config::{HostNetworkConfig, InstanceMetadata, mac_text, tap_name};
use crate::{NetError, links::Links};

/// Where guests look for their metadata.
pub(crate) const METADATA_ADDRESS: Ipv4Addr = Ipv4Addr::new(169, 254, 169, 254);

/// The host's rules. Chains are made anew, the sets of known sources stay, so that a restart drops no packet of a
/// running instance. Every tap is held to its source, known by its name's beginning (see [`tap_name`]), so that one network
/// namespace carries one such bridge.
pub(crate) fn host_rules(config: &HostNetworkConfig, metadata_port: u16) -> String {
    let HostNetworkConfig { bridge, instance_cidr, .. } = config;
    let masquerade = if config.nat {
        format!("add rule ip {bridge} postrouting ip saddr {instance_cidr} oifname != \"{bridge}\" masquerade\n")
    } else {
        String::new()
    };
    format!(
        r#"add table ip {bridge}
delete table ip {bridge}
add table ip {bridge}
add chain ip {bridge} prerouting {{ type nat hook prerouting priority dstnat; }}
add rule ip {bridge} prerouting iifname "{bridge}" ip daddr {METADATA_ADDRESS} tcp dport 80 redirect to :{metadata_port}
add chain ip {bridge} postrouting {{ type nat hook postrouting priority srcnat; }}
{masquerade}add chain ip {bridge} forward {{ type filter hook forward priority filter; }}
add rule ip {bridge} forward iifname "{bridge}" ip daddr 169.254.0.0/16 drop
add table bridge {bridge}
add set bridge {bridge} stations {{ type ifname . ether_addr; }}
add set bridge {bridge} sources {{ type ifname . ether_addr . ipv4_addr; }}
add chain bridge {bridge} prerouting {{ type filter hook prerouting priority -200; }}
flush chain bridge {bridge} prerouting
add rule bridge {bridge} prerouting iifname != "ht*" accept
add rule bridge {bridge} prerouting ether type arp iifname . arp saddr ether . arp saddr ip @sources accept
add rule bridge {bridge} prerouting ether type arp arp saddr ip 0.0.0.0 iifname . ether saddr @stations accept
add rule bridge {bridge} prerouting ether type ip iifname . ether saddr . ip saddr @sources accept
add rule bridge {bridge} prerouting ether type ip ip saddr 0.0.0.0 udp dport 67 iifname . ether saddr @stations accept
add rule bridge {bridge} prerouting drop
"#
    )
}

/// Undoes [`host_rules`].
pub(crate) fn no_rules(bridge: &str) -> String {
    format!(
        "add table ip {bridge}\ndelete table ip {bridge}\nadd table bridge {bridge}\ndelete table bridge {bridge}\n"
    )
}

/// Lets an instance's taps send as what they are.
pub(crate) fn allow(bridge: &str, metadata: &InstanceMetadata) -> String {
    let mut rules = String::new();
    for nic in &metadata.nics {
        let tap = tap_name(&metadata.instance_id, nic.device_index);
        let mac = mac_text(&nic.mac);
        rules += &format!("add element bridge {bridge} stations {{ \"{tap}\" . {mac} }}\n");
        rules += &format!("add element bridge {bridge} sources {{ \"{tap}\" . {mac} . {} }}\n", nic.ipv4);
    }
    rules
}

/// Undoes [`allow`]. Adding before deleting makes it do whatever the state was.
pub(crate) fn forbid(bridge: &str, metadata: &InstanceMetadata) -> String {
    let allow = allow(bridge, metadata);
    allow.clone() + &allow.replace("add element", "delete element")
}

/// Runs one transaction: all of it or nothing.
pub(crate) async fn apply(table: &str, rules: &str) -> Result<(), NetError> {
    nft(table, &["-f", "-"], rules).await.map(drop)
}

async fn nft(table: &str, arguments: &[&str], input: &str) -> Result<Vec<u8>, NetError> {
    let run = async {
        let mut child = Command::new("nft")
            .args(arguments)
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .stderr(Stdio::piped())
            .kill_on_drop(true)
            .spawn()?;
        if let Some(mut stdin) = child.stdin.take() {
            stdin.write_all(input.as_bytes()).await?;
        }
        child.wait_with_output().await
    };
    let output = run.await.map_err(NetError::system("run nft (Debian package nftables)"))?;
    if output.status.success() {
        return Ok(output.stdout);
    }
    let message = String::from_utf8_lossy(&output.stderr).trim().to_owned();
    Err(NetError::Nft { table: table.to_owned(), message })
}

/// Forgets sources whose tap is gone: what a killed agent could not remove.
pub(crate) async fn prune(bridge: &str, links: &Links) -> Result<(), NetError> {
    for set in ["stations", "sources"] {
        let listed = nft(bridge, &["-j", "list", "set", "bridge", bridge, set], "").await?;
        let listed: serde_json::Value = serde_json::from_slice(&listed).map_err(|e| NetError::Nft {
            table: bridge.to_owned(),
            message: format!("its JSON cannot be read: {e}"),
        })?;
        let mut rules = String::new();
        for element in elements(&listed) {
            if let Some(tap) = element.first()
                && !links.exists(tap).await?
            {
                let rest = element.get(1..).unwrap_or_default().join(" . ");
                rules += &format!("delete element bridge {bridge} {set} {{ \"{tap}\" . {rest} }}\n");
            }
        }
        if !rules.is_empty() {
            apply(bridge, &rules).await?;
        }
    }
    Ok(())
}

/// The concatenations of a set in nft's JSON, see libnftables-json(5).
fn elements(listed: &serde_json::Value) -> Vec<Vec<String>> {
    let texts = |concat: &serde_json::Value| {
        concat.as_array().into_iter().flatten().filter_map(|v| v.as_str().map(str::to_owned)).collect()
    };
    let objects = listed.get("nftables").and_then(|v| v.as_array()).into_iter().flatten();
    let sets = objects.filter_map(|object| object.get("set")?.get("elem")?.as_array());
    sets.flatten().filter_map(|element| element.get("concat")).map(texts).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn elements_are_read_from_nfts_json() {
        let listed = serde_json::json!({"nftables": [
            {"metainfo": {"version": "1.0.6"}},
            {"set": {"family": "bridge", "name": "stations", "table": "hearth0", "type": ["ifname", "ether_addr"],
                     "elem": [{"concat": ["ht012", "02:00:00:00:00:01"]}, {"concat": ["ht345", "02:00:00:00:00:02"]}]}},
        ]});
        assert_eq!(elements(&listed), [["ht012", "02:00:00:00:00:01"], ["ht345", "02:00:00:00:00:02"]]);
        assert!(elements(&serde_json::json!({"nftables": [{"set": {"name": "stations"}}]})).is_empty());
    }
}
