//! Boot discovery on disk images made here, on damaged ones, and on noise.

mod damage;
mod grub;
mod journal;
pub mod journal_support;
pub mod kernels;
mod layouts;
pub mod support;
