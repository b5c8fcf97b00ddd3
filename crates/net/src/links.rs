//! The bridge and its taps' membership, by rtnetlink.

use std::net::{IpAddr, Ipv4Addr};

use futures::TryStreamExt;
use rtnetlink::packet_route::address::AddressAttribute;
use rtnetlink::packet_route::link::{InfoKind, LinkAttribute, LinkInfo, LinkMessage};
use rtnetlink::{Handle, LinkBridge, LinkUnspec};

use crate::NetError;

/// `No such device`, which asking for a link by an unknown name answers.
const ENODEV: i32 = 19;

/// A netlink socket in the network namespace of the thread that opened it.
pub(crate) struct Links {
    handle: Handle,
    connection: tokio::task::JoinHandle<()>,
}

impl Drop for Links {
    fn drop(&mut self) {
        self.connection.abort();
    }
}

fn failed(action: String) -> impl FnOnce(rtnetlink::Error) -> NetError {
    move |source| NetError::Netlink { action, source }
}

impl Links {
    pub(crate) fn open() -> Result<Self, NetError> {
        let (connection, handle, _) = rtnetlink::new_connection().map_err(NetError::system("open a netlink socket"))?;
        Ok(Self { handle, connection: tokio::spawn(connection) })
    }

    async fn find(&self, name: &str) -> Result<Option<LinkMessage>, NetError> {
        let mut links = self.handle.link().get().match_name(name.to_owned()).execute();
        match links.try_next().await {
            Ok(link) => Ok(link),
            Err(rtnetlink::Error::NetlinkError(message)) if message.raw_code() == -ENODEV => Ok(None),
            Err(source) => Err(failed(format!("look up the link {name}"))(source)),
        }
    }

    /// Whether there is a link of that name.
    pub(crate) async fn exists(&self, name: &str) -> Result<bool, NetError> {
        Ok(self.find(name).await?.is_some())
    }

    /// A bridge of that name that is up and has the address; what is there already is kept.
    pub(crate) async fn ensure_bridge(&self, name: &str, address: Ipv4Addr, prefix: u8) -> Result<(), NetError> {
        let link = match self.find(name).await? {
            Some(link) => link,
            None => {
                let message = LinkBridge::new(name).forward_delay(0).build();
                let action = format!("make the bridge {name}");
                self.handle.link().add(message).execute().await.map_err(failed(action.clone()))?;
                self.find(name)
                    .await?
                    .ok_or(NetError::System { action, source: std::io::Error::from_raw_os_error(ENODEV) })?
            }
        };
        if !is_bridge(&link) {
            return Err(NetError::NotABridge { name: name.to_owned() });
        }
        let index = link.header.index;
        let mut there = self.handle.address().get().set_link_index_filter(index).execute();
        let mut found = false;
        while let Some(entry) = there.try_next().await.map_err(failed(format!("list the addresses of {name}")))? {
            let same = entry
                .attributes
                .iter()
                .any(|a| matches!(a, AddressAttribute::Local(IpAddr::V4(local)) if *local == address));
            if same && entry.header.prefix_len == prefix {
                found = true;
            } else if entry.attributes.iter().any(|a| matches!(a, AddressAttribute::Local(IpAddr::V4(_)))) {
                // A changed instance network: the old gateway address must not stay.
                let action = format!("remove an old address from {name}");
                self.handle.address().del(entry).execute().await.map_err(failed(action))?;
            }
        }
        if !found {
            let action = format!("give {address}/{prefix} to {name}");
            self.handle.address().add(index, IpAddr::V4(address), prefix).execute().await.map_err(failed(action))?;
        }
        let up = LinkUnspec::new_with_index(index).up().build();
        self.handle.link().set(up).execute().await.map_err(failed(format!("bring {name} up")))
    }

    /// Puts a link on a bridge, with its MTU, and brings it up.
    pub(crate) async fn join_bridge(&self, name: &str, bridge: &str, mtu: u16) -> Result<(), NetError> {
        let action = format!("put {name} on {bridge}");
        let controller = self.find(bridge).await?.ok_or_else(|| NetError::System {
            action: action.clone(),
            source: std::io::Error::from_raw_os_error(ENODEV),
        })?;
        let message =
            LinkUnspec::new_with_name(name).controller(controller.header.index).mtu(u32::from(mtu)).up().build();
        self.handle.link().set(message).execute().await.map_err(failed(action))
    }

    /// Removes a link; one that is not there is no error.
    pub(crate) async fn remove(&self, name: &str) -> Result<(), NetError> {
        if let Some(link) = self.find(name).await? {
            let action = format!("remove {name}");
            self.handle.link().del(link.header.index).execute().await.map_err(failed(action))?;
        }
        Ok(())
    }
}

fn is_bridge(link: &LinkMessage) -> bool {
    link.attributes.iter().any(|attribute| match attribute {
        LinkAttribute::LinkInfo(infos) => infos.iter().any(|i| matches!(i, LinkInfo::Kind(InfoKind::Bridge))),
        _ => false,
    })
}
