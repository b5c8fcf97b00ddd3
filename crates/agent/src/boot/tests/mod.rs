//! Boot discovery on disk images made here, on damaged ones, and on noise.

mod damage;
mod grub;
pub mod kernels;
mod layouts;
pub mod support;
