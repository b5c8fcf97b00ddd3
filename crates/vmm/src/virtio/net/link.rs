//! The host's end of a network interface.

use std::io;
use std::os::fd::{AsRawFd, OwnedFd, RawFd};

use super::{HEADER_BYTES, has};
use virtio_bindings::virtio_net::{VIRTIO_NET_F_GUEST_CSUM, VIRTIO_NET_F_GUEST_TSO4, VIRTIO_NET_F_GUEST_TSO6};

/// Something that carries one frame per read or write, each behind a virtio-net header, and never blocks.
pub(crate) trait Link: Send {
    /// For readv, writev and epoll.
    fn fd(&self) -> RawFd;
    /// Which unfinished checksums and oversized segments the guest takes, as accepted feature bits.
    fn set_guest_features(&self, features: u64) -> io::Result<()>;
}

/// A tap device's queue.
pub(crate) struct Tap(OwnedFd);

// linux/if_tun.h
const TUNSETOFFLOAD: libc::c_ulong = 0x4004_54d0;
const TUNSETVNETHDRSZ: libc::c_ulong = 0x4004_54d8;
const TUN_F_CSUM: libc::c_ulong = 1;
const TUN_F_TSO4: libc::c_ulong = 2;
const TUN_F_TSO6: libc::c_ulong = 4;

impl Tap {
    /// Prepares an attached tap (`IFF_TAP | IFF_NO_PI | IFF_VNET_HDR`); the error names the failed step.
    pub(crate) fn new(fd: OwnedFd) -> Result<Self, (&'static str, io::Error)> {
        let size = HEADER_BYTES as libc::c_int;
        // SAFETY: TUNSETVNETHDRSZ reads one int from the pointer.
        let result = unsafe { libc::ioctl(fd.as_raw_fd(), TUNSETVNETHDRSZ, &size) };
        check(result).map_err(|error| ("TUNSETVNETHDRSZ", error))?;
        set_nonblocking(&fd).map_err(|error| ("O_NONBLOCK", error))?;
        Ok(Self(fd))
    }
}

impl Link for Tap {
    fn fd(&self) -> RawFd {
        self.0.as_raw_fd()
    }

    fn set_guest_features(&self, features: u64) -> io::Result<()> {
        let mut flags = 0;
        if has(features, VIRTIO_NET_F_GUEST_CSUM) {
            flags |= TUN_F_CSUM;
            if has(features, VIRTIO_NET_F_GUEST_TSO4) {
                flags |= TUN_F_TSO4;
            }
            if has(features, VIRTIO_NET_F_GUEST_TSO6) {
                flags |= TUN_F_TSO6;
            }
        }
        // SAFETY: TUNSETOFFLOAD takes its flags by value.
        check(unsafe { libc::ioctl(self.0.as_raw_fd(), TUNSETOFFLOAD, flags) })
    }
}

fn check(result: libc::c_int) -> io::Result<()> {
    if result < 0 { Err(io::Error::last_os_error()) } else { Ok(()) }
}

fn set_nonblocking(fd: &OwnedFd) -> io::Result<()> {
    // SAFETY: F_GETFL has no pointer argument.
    let flags = unsafe { libc::fcntl(fd.as_raw_fd(), libc::F_GETFL) };
    check(flags)?;
    // SAFETY: F_SETFL has no pointer argument.
    check(unsafe { libc::fcntl(fd.as_raw_fd(), libc::F_SETFL, flags | libc::O_NONBLOCK) })
}
