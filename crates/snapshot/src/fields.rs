//! Fixed-size fields of structures that were read whole.

/// The `N` bytes at `offset`; what lies behind the end reads as zeros.
pub(crate) fn field<const N: usize>(bytes: &[u8], offset: usize) -> [u8; N] {
    let mut value = [0; N];
    let end = offset.checked_add(N);
    if let Some(found) = end.and_then(|end| bytes.get(offset..end)) {
        value.copy_from_slice(found);
    }
    value
}
