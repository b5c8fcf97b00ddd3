//! Taps, opened for the VMM.
//! Source: <https://docs.kernel.org/networking/tuntap.html>

use std::fs::OpenOptions;
use std::io;
use std::os::fd::{AsRawFd, OwnedFd};
use std::os::unix::fs::OpenOptionsExt;

use crate::NetError;

nix::ioctl_write_int!(tun_set_iff, b'T', 202);

/// Opens a tap that packets carry a virtio-net header on and that vanishes with its last file descriptor.
/// A name that another process holds gives EBUSY.
pub(crate) fn open(name: &str) -> Result<OwnedFd, NetError> {
    let failed = |what: &str, source| NetError::System { action: format!("{what} the tap {name}"), source };
    let file = OpenOptions::new()
        .read(true)
        .write(true)
        .custom_flags(libc::O_NONBLOCK | libc::O_CLOEXEC)
        .open("/dev/net/tun")
        .map_err(|e| failed("open /dev/net/tun for", e))?;
    // SAFETY: ifreq is plain old data; all zeros is a valid value.
    let mut request: libc::ifreq = unsafe { std::mem::zeroed() };
    if name.len() >= request.ifr_name.len() {
        return Err(failed("name", io::Error::from_raw_os_error(libc::ENAMETOOLONG)));
    }
    for (to, from) in request.ifr_name.iter_mut().zip(name.bytes()) {
        *to = from as libc::c_char;
    }
    request.ifr_ifru.ifru_flags = (libc::IFF_TAP | libc::IFF_NO_PI | libc::IFF_VNET_HDR) as libc::c_short;
    // SAFETY: TUNSETIFF reads an ifreq at the given address, which outlives the call.
    unsafe { tun_set_iff(file.as_raw_fd(), std::ptr::addr_of_mut!(request) as libc::c_ulong) }
        .map_err(|e| failed("make", e.into()))?;
    Ok(file.into())
}
