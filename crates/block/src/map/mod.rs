//! The `map` file of a layered volume: which 4 KiB blocks its own `data` file holds (LOCAL) and which 512 KiB chunks were
//! written since the last snapshot (DIRTY). The format is described byte by byte in docs/storage.md.

mod bits;
mod create;
mod error;
mod extent;
pub(crate) mod format;
mod grow;
mod header;
mod load;
pub(crate) mod log;
mod storage;

#[cfg(test)]
mod hostile_tests;
#[cfg(test)]
mod tests;

pub(crate) use bits::{Bits, PageWrite, Run};
pub use create::{MapBase, MapSpec, create};
pub use error::MapError;
pub use extent::Extent;
pub use format::{BLOCK_BYTES, CHUNK_BYTES};
pub(crate) use grow::grow;
pub use header::{Header, read_header};
pub(crate) use header::{SIZE_MAX, even_out, write_header};
pub(crate) use load::load;
pub use storage::Storage;
