//! What the agent keeps on disk, laid out so that it can be killed after any step.

mod atomic;
mod layout;
mod record;

pub use atomic::{read_if_exists, sync_dir, write_atomically};
pub use layout::Layout;
pub use record::{Hold, InstanceRecord, Phase, RecordError};
