//! Images of a Ceph cluster (RADOS block device).
//!
//! [`Cluster`] manages images by the programs `rbd` and `ceph` (package `ceph-common`), whose output in JSON is stable and who know every
//! feature of the cluster they came with. [`Export`] serves an image to a VMM: a `qemu-storage-daemon` (packages `qemu-system-common`
//! and `qemu-block-extra`) has librbd in it and speaks NBD on a Unix socket. It outlives the agent that started it.
//!
//! **One writer.** Ceph hands an image's exclusive lock from client to client when they ask, so the lock alone keeps no second writer
//! out. An attachment has a generation, which grows with each. [`Export::start`] writes it to an object beside the image (`hearth.IMAGE`), puts
//! every client that has the image open on the cluster's blocklist ([`Cluster::fence`]), opens the image, and serves it only if
//! the object still has its generation then. It also takes the lock of a storage daemon that was killed, for which the next
//! one would otherwise wait half a minute.
//!
//! Source: <https://docs.ceph.com/en/pacific/rbd/>.

mod export;
mod image;
mod manage;

pub use export::Export;
pub use image::Name;
pub use manage::{Cluster, Extent, ImageInfo, Parent, SnapshotInfo};
