//! Making a volume larger.

use super::header::check_size;
use super::{Header, MapError, Storage, append_pages, write_header};

/// New pages first, then the `data` file, then the header: a crash leaves the old size or the new one.
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
    append_pages(map, header, size_bytes)?;
    let length = data.length().map_err(MapError::io("learn the data file's length for"))?;
    if length < size_bytes {
        data.set_length(size_bytes).map_err(MapError::io("extend the data file of"))?;
    }
    data.sync().map_err(MapError::io("make durable the data file of"))?;
    header.size_bytes = size_bytes;
    write_header(map, header)
}
