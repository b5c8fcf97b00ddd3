//! Boot discovery on disk images made here, on damaged ones, and on noise.

mod damage;
mod grub;
pub(super) mod kernels;
mod layouts;
pub(super) mod support;
