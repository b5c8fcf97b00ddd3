//! Turns settings into the configurations of control plane and agent, with one layout of the state folder for all roles:
//!
//! ```text
//! STATE-DIR/admin.json   credentials of the first operator
//! STATE-DIR/control/     store, certificate authority, images
//! STATE-DIR/agent/       identity, instances and their disks
//! ```

use std::collections::BTreeMap;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};

use hearth_agent::AgentConfig;
use hearth_control::ControlConfig;
use hearth_types::JoinToken;

use crate::error::DaemonError;
use crate::settings::Settings;

/// Name of the credentials file in the state folder.
pub const ADMIN_CREDENTIALS: &str = "admin.json";

fn refuse(name: &'static str, reason: impl Into<String>) -> DaemonError {
    DaemonError::Setting { name, reason: reason.into() }
}

/// Configuration of the control plane; `default_address` is where it listens when nothing is said.
pub fn control(settings: &Settings, default_address: IpAddr) -> Result<ControlConfig, DaemonError> {
    let mut config = ControlConfig::new(settings.state_dir().join("control"));
    config.listen = settings.listen_or(default_address);
    config.server_names.clone_from(&settings.server_names);
    config.public_endpoint.clone_from(&settings.public_endpoint);
    config.region = settings.region().to_owned();
    config.admin_credentials = Some(settings.state_dir().join(ADMIN_CREDENTIALS));
    config.instance_types.clone_from(&settings.instance_types);
    set(&mut config.host_timeout, settings.host_timeout.map(|span| span.0));
    set(&mut config.tombstone_ttl, settings.tombstone_ttl.map(|span| span.0));
    set(&mut config.max_instances_per_account, settings.max_instances_per_account);
    set(&mut config.max_volumes_per_account, settings.max_volumes_per_account);
    set(&mut config.max_volume_gib_per_account, settings.max_volume_gib_per_account);
    set(&mut config.max_snapshots_per_account, settings.max_snapshots_per_account);
    set(&mut config.max_images_per_account, settings.max_images_per_account);
    set(&mut config.max_image_bytes, settings.max_image_bytes);
    set(&mut config.upload_ttl, settings.upload_ttl.map(|span| span.0));
    config.object_store.clone_from(&settings.object_store);
    config.object_store_options = hearth_control::object_store_options(|name| std::env::var(name).ok())?;
    Ok(config)
}

/// Configuration of the agent, without where and how to join.
pub fn agent(settings: &Settings) -> Result<AgentConfig, DaemonError> {
    let mut config = AgentConfig { state_dir: settings.state_dir().join("agent"), ..AgentConfig::default() };
    config.availability_zone = settings.zone.clone().unwrap_or_else(|| format!("{}a", settings.region()));
    config.labels = labels(&settings.labels)?;
    set(&mut config.run_dir, settings.run_dir.clone());
    set(&mut config.host_name, settings.name.clone());
    set(&mut config.vmm_binary, settings.vmm.clone());
    set(&mut config.cgroup_parent, settings.cgroup_parent.clone());
    set(&mut config.uid_base, settings.uid_base);
    set(&mut config.uid_count, settings.uid_count);
    set(&mut config.vcpu_overcommit_percent, settings.vcpu_overcommit_percent);
    set(&mut config.stop_timeout, settings.stop_timeout.map(|span| span.0));
    set(&mut config.terminate_timeout, settings.terminate_timeout.map(|span| span.0));
    config.volume_backends.clone_from(&settings.volume_backends);
    config.reserved_memory_mib = settings.reserved_memory_mib.or(config.reserved_memory_mib);
    config.background_fill = u64::from(settings.background_fill_mibps.unwrap_or(0)) << 20;
    config.reserved_disk_bytes = settings.reserved_disk_bytes.or(config.reserved_disk_bytes);
    set(&mut config.network.bridge, settings.bridge.clone());
    set(&mut config.network.instance_cidr, settings.instance_cidr.map(|cidr| cidr.0));
    set(&mut config.network.nat, settings.nat);
    set(&mut config.network.mtu, settings.mtu);
    if !settings.dns.is_empty() {
        config.network.dns.clone_from(&settings.dns);
    }
    if config.uid_base < 1000 {
        return Err(refuse("uid-base", format!("{} belongs to the system, take 1000 or more", config.uid_base)));
    }
    if config.uid_base.checked_add(config.uid_count).is_none() || config.uid_count == 0 {
        return Err(refuse("uid-count", "no room behind uid-base"));
    }
    // IFNAMSIZ of linux/if.h, 16 with the terminator.
    if config.network.bridge.is_empty() || config.network.bridge.len() > 15 {
        return Err(refuse("bridge", "must have 1 to 15 characters"));
    }
    Ok(config)
}

/// Where and how an agent on another host joins.
pub fn join(settings: &Settings, config: &mut AgentConfig) -> Result<(), DaemonError> {
    for endpoint in &settings.control {
        if !endpoint.starts_with("https://") {
            return Err(refuse("control", format!("'{endpoint}' must be a URL like https://10.0.0.1:7443")));
        }
    }
    config.control_endpoints.clone_from(&settings.control);
    config.join_token = match &settings.join {
        Some(text) => Some(text.parse::<JoinToken>().map_err(|error| refuse("join", error.to_string()))?),
        None => None,
    };
    Ok(())
}

/// URL at which a control plane in the same process is reached.
pub fn own_endpoint(listening: SocketAddr) -> String {
    let address = match listening.ip() {
        IpAddr::V4(ip) if ip.is_unspecified() => IpAddr::V4(Ipv4Addr::LOCALHOST),
        IpAddr::V6(ip) if ip.is_unspecified() => IpAddr::V6(Ipv6Addr::LOCALHOST),
        ip => ip,
    };
    format!("https://{}", SocketAddr::new(address, listening.port()))
}

fn labels(given: &[String]) -> Result<BTreeMap<String, String>, DaemonError> {
    given
        .iter()
        .map(|label| match label.split_once('=') {
            Some((key, value)) if !key.is_empty() => Ok((key.to_owned(), value.to_owned())),
            _ => Err(refuse("labels", format!("'{label}' must be KEY=VALUE"))),
        })
        .collect()
}

fn set<T>(field: &mut T, value: Option<T>) {
    if let Some(value) = value {
        *field = value;
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::path::Path;

    #[test]
    fn everything_lies_under_the_state_folder() {
        let settings =
            Settings { state_dir: Some("/srv/h".into()), region: Some("attic-1".into()), ..Settings::default() };
        let control = control(&settings, Ipv4Addr::LOCALHOST.into()).unwrap();
        assert_eq!(control.state_dir, Path::new("/srv/h/control"));
        assert_eq!(control.admin_credentials_path(), Path::new("/srv/h/admin.json"));
        assert_eq!(control.listen.to_string(), "127.0.0.1:7443");
        let agent = agent(&settings).unwrap();
        assert_eq!(agent.state_dir, Path::new("/srv/h/agent"));
        assert_eq!(agent.availability_zone, "attic-1a");
    }

    #[test]
    fn what_cannot_work_is_refused_by_name() {
        let refused = |settings: Settings| agent(&settings).unwrap_err().to_string();
        assert!(refused(Settings { labels: vec!["rack".into()], ..Settings::default() }).contains("labels"));
        assert!(refused(Settings { uid_base: Some(0), ..Settings::default() }).contains("uid-base"));
        assert!(refused(Settings { uid_base: Some(u32::MAX), ..Settings::default() }).contains("uid-count"));
        assert!(refused(Settings { bridge: Some("a".repeat(16)), ..Settings::default() }).contains("bridge"));
        let mut config = agent(&Settings::default()).unwrap();
        let plain = Settings { control: vec!["http://x:1".into()], ..Settings::default() };
        assert!(join(&plain, &mut config).unwrap_err().to_string().contains("https://"));
        let token = Settings { join: Some("secret-stuff".into()), ..Settings::default() };
        let error = join(&token, &mut config).unwrap_err().to_string();
        assert!(error.contains("join") && !error.contains("secret-stuff"), "{error}");
    }

    #[test]
    fn an_agent_beside_its_control_plane_dials_an_address_that_exists() {
        assert_eq!(own_endpoint("0.0.0.0:7443".parse().unwrap()), "https://127.0.0.1:7443");
        assert_eq!(own_endpoint("[::]:1".parse().unwrap()), "https://[::1]:1");
        assert_eq!(own_endpoint("10.1.2.3:7443".parse().unwrap()), "https://10.1.2.3:7443");
    }
}
