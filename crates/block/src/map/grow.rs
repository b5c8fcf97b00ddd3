//! Making a volume larger.

use super::format::{pages_for, slot_offset};
use super::header::check_size;
use super::{Header, MapError, Storage, write_header};

/// The map's length first (its new pages were never written, so they are all LOCAL), then the `data` file, then the header: a
/// crash leaves the old size or the new one.
pub(crate) fn grow(
    map: &dyn Storage,
    data: &dyn Storage,
    header: &mut Header,
    size_bytes: u64,
) -> Result<(), MapError> {
    check_size(size_bytes)?;
    if size_bytes < header.size_bytes {
        return Err(MapError::Shrink { from: header.size_bytes, to: size_bytes });
    }
    extend(map, slot_offset(pages_for(size_bytes), 0), "extend", "make durable")?;
    extend(data, size_bytes, "extend the data file of", "make durable the data file of")?;
    header.size_bytes = size_bytes;
    write_header(map, header)
}

fn extend(file: &dyn Storage, bytes: u64, extending: &'static str, syncing: &'static str) -> Result<(), MapError> {
    if file.length().map_err(MapError::io(extending))? < bytes {
        file.set_length(bytes).map_err(MapError::io(extending))?;
    }
    file.sync().map_err(MapError::io(syncing))
}
