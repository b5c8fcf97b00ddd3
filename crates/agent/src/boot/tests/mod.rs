//! Boot discovery on disk images made here, on damaged ones, and on noise.

mod damage;
mod grub;
mod kernels;
mod layouts;
mod support;
