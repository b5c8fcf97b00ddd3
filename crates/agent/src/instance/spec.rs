//! What the control plane asks for, checked.

use std::net::Ipv4Addr;

use hearth_proto::v1;
use hearth_types::instance_type::{MAX_VCPUS, MIN_MEMORY_MIB};
use hearth_types::{Resources, VolumeId};

use crate::boot::Override;

/// Most disks and most NICs of one instance: slots of its PCI bus.
const MAX_DEVICES: usize = 24;
/// Bytes of a virtio-blk serial number.
const MAX_SERIAL: usize = 20;

/// One NIC.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Nic {
    /// 0 = the first.
    pub device_index: u32,
    /// Station address.
    pub mac: [u8; 6],
    /// Address that DHCP hands out.
    pub ipv4: Ipv4Addr,
}

/// One instance-store disk.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct InstanceStore {
    /// What the guest reads as serial number.
    pub serial: String,
    /// Size.
    pub bytes: u64,
}

/// One EBS volume of an instance.
#[derive(Clone, Debug, PartialEq)]
pub struct Attachment {
    /// Its id.
    pub id: VolumeId,
    /// The volume as it is wanted.
    pub volume: v1::HostVolume,
    /// Whether the guest is to let go of it.
    pub detach: v1::DetachWish,
    /// Grows each time that is asked again.
    pub detach_attempt: u32,
}

/// An instance, as far as the agent must understand it.
#[derive(Clone, Debug, PartialEq)]
pub struct Spec {
    /// What its owner says about booting it.
    pub boot: Override,
    /// Name of its type.
    pub instance_type: String,
    /// Virtual CPUs.
    pub vcpus: u8,
    /// What it takes.
    pub resources: Resources,
    /// Thousandths of an ECU to enforce; 0 = whole threads.
    pub ecu_milli_quota: u64,
    /// What the root disk is made from, if it is no volume.
    pub bundle_root: Option<v1::BundleRoot>,
    /// EBS volumes; the first is the root volume, unless there is a `bundle_root`.
    pub volumes: Vec<Attachment>,
    /// Instance-store disks.
    pub instance_store: Vec<InstanceStore>,
    /// NICs by index.
    pub nics: Vec<Nic>,
}

impl Spec {
    /// Checks every field that is used. Errors name the field.
    pub fn parse(spec: &v1::InstanceSpec) -> Result<Self, String> {
        let resources = spec.resources.as_ref().ok_or("resources are missing")?;
        if !(1..=MAX_VCPUS).contains(&resources.vcpus) {
            return Err(format!("{} vCPUs; 1..={MAX_VCPUS} are possible", resources.vcpus));
        }
        if resources.memory_mib < MIN_MEMORY_MIB {
            return Err(format!("{} MiB of memory; at least {MIN_MEMORY_MIB} are needed", resources.memory_mib));
        }
        let mut sorted: Vec<&v1::AttachedVolume> = spec.volumes.iter().collect();
        sorted.sort_by_key(|attached| attached.device_name != spec.root_device_name);
        let volumes: Vec<Attachment> = sorted.into_iter().map(attachment).collect::<Result<_, _>>()?;
        let at_root = spec.volumes.iter().any(|attached| attached.device_name == spec.root_device_name);
        let root = volumes.first().filter(|_| at_root);
        if root.is_some_and(|root| !root.volume.backend.is_empty()) {
            return Err("volumes: a volume of a backend cannot be the root volume".to_owned());
        }
        if let Some(bundle) = &spec.bundle_root {
            check_serial(&bundle.serial)?;
            if at_root || bundle.size_bytes == 0 {
                return Err("bundle_root: it has no size, or there is a root volume too".to_owned());
            }
        } else if !at_root {
            return Err(format!("volumes: none is at the root device '{}'", spec.root_device_name));
        }
        if spec.instance_store.len() + spec.volumes.len() > MAX_DEVICES || spec.network_interfaces.len() > MAX_DEVICES {
            return Err(format!("more than {MAX_DEVICES} disks or network interfaces"));
        }
        let instance_store = spec.instance_store.iter().map(instance_store).collect::<Result<_, _>>()?;
        let mut nics: Vec<Nic> = spec.network_interfaces.iter().map(nic).collect::<Result<_, _>>()?;
        nics.sort_by_key(|nic| nic.device_index);
        let boot = spec.boot.clone().unwrap_or_default();
        Ok(Self {
            boot: Override { cmdline: boot.cmdline, extra_cmdline: boot.extra_cmdline },
            instance_type: spec.instance_type.clone(),
            vcpus: u8::try_from(resources.vcpus).map_err(|error| error.to_string())?,
            resources: Resources {
                vcpus: resources.vcpus,
                memory_mib: resources.memory_mib,
                ecu_milli: resources.ecu_milli,
                instance_store_bytes: resources.instance_store_bytes,
            },
            ecu_milli_quota: spec.ecu_milli_quota,
            bundle_root: spec.bundle_root.clone(),
            volumes,
            instance_store,
            nics,
        })
    }
}

impl Spec {
    /// Whether this is the root volume.
    pub fn is_root(&self, attachment: &Attachment) -> bool {
        self.bundle_root.is_none() && self.volumes.first().is_some_and(|root| root.id == attachment.id)
    }
}

fn attachment(attached: &v1::AttachedVolume) -> Result<Attachment, String> {
    let volume = attached.volume.clone().ok_or("volumes: one is missing")?;
    let id = volume.volume_id.parse().map_err(|error| format!("volumes: {error}"))?;
    Ok(Attachment { id, volume, detach: attached.detach(), detach_attempt: attached.detach_attempt })
}

fn check_serial(serial: &str) -> Result<(), String> {
    if serial.is_empty() || serial.len() > MAX_SERIAL || !serial.is_ascii() {
        return Err(format!("serial '{serial}' is empty, has more than {MAX_SERIAL} bytes or is not ASCII"));
    }
    Ok(())
}

fn instance_store(disk: &v1::InstanceStoreDisk) -> Result<InstanceStore, String> {
    check_serial(&disk.serial)?;
    if disk.size_bytes == 0 || !disk.size_bytes.is_multiple_of(512) {
        return Err(format!("instance store '{}' of {} bytes", disk.virtual_name, disk.size_bytes));
    }
    Ok(InstanceStore { serial: disk.serial.clone(), bytes: disk.size_bytes })
}

fn nic(nic: &v1::NetworkInterface) -> Result<Nic, String> {
    let parts: Option<Vec<u8>> = nic.mac_address.split(':').map(|part| u8::from_str_radix(part, 16).ok()).collect();
    let mac = parts.and_then(|parts| <[u8; 6]>::try_from(parts).ok());
    let mac = mac.filter(|mac| mac.first().is_some_and(|first| first & 1 == 0));
    Ok(Nic {
        device_index: nic.device_index,
        mac: mac.ok_or_else(|| format!("'{}' is not a station's MAC address", nic.mac_address))?,
        ipv4: nic
            .private_ip_address
            .parse()
            .map_err(|_| format!("'{}' is not an IPv4 address", nic.private_ip_address))?,
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::instance::tests::spec;
    use proptest::prelude::*;

    #[test]
    fn a_good_spec_is_understood() {
        let parsed = Spec::parse(&spec()).unwrap();
        assert_eq!(parsed.volumes[0].id.serial().len(), 20);
        assert_eq!(parsed.nics[0].mac, [2, 0, 0, 0, 0, 1]);
    }

    #[test]
    fn each_wrong_field_is_named() {
        type Change = fn(&mut v1::InstanceSpec);
        let cases: [(Change, &str); 8] = [
            (|s| s.root_device_name = "/dev/xvda".into(), "root device"),
            (|s| s.volumes[0].volume = None, "volumes"),
            (|s| s.resources = None, "resources"),
            (|s| s.resources.as_mut().unwrap().vcpus = 33, "33 vCPUs"),
            (|s| s.resources.as_mut().unwrap().memory_mib = 1, "MiB of memory"),
            (|s| s.volumes[0].volume.as_mut().unwrap().volume_id = "vol-1".into(), "volumes"),
            (|s| s.network_interfaces[0].mac_address = "01:00:00:00:00:01".into(), "MAC"),
            (|s| s.network_interfaces[0].private_ip_address = "::1".into(), "IPv4"),
        ];
        for (change, wanted) in cases {
            let mut spec = spec();
            change(&mut spec);
            let error = Spec::parse(&spec).unwrap_err();
            assert!(error.contains(wanted), "{error}");
        }
    }

    proptest! {
        #[test]
        fn no_message_makes_the_check_panic(bytes in prop::collection::vec(any::<u8>(), 0..200), mac in ".{0,20}", at in 0usize..500, value: u8) {
            use prost::Message;
            let mut spec = spec();
            spec.network_interfaces[0].mac_address = mac;
            let mut encoded = spec.encode_to_vec();
            let at = at % encoded.len();
            encoded[at] = value;
            for bytes in [bytes, encoded] {
                if let Ok(message) = v1::InstanceSpec::decode(bytes.as_slice()) {
                    let _ = Spec::parse(&message);
                }
            }
        }
    }
}
