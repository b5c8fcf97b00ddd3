//! Instances on a pretended host: VMMs that are entries of a table, real files.

mod crash;
mod life;
mod network;
mod volumes;
pub(crate) mod world;

pub use world::{CrashPoint, spec};
