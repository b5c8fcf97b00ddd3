//! Scattered guest memory as iovecs: what descriptors point to, checked against the guest's memory map once and then handed
//! to the kernel without a copy.

use std::sync::Arc;

use vm_memory::{GuestAddress, GuestMemory, GuestMemoryMmap, Permissions};

/// x86's smallest page.
const HOST_PAGE: usize = 4096;

/// A list of host-mapped pieces of guest memory. Reused between requests, so steady state allocates nothing.
pub(crate) struct GuestBuffers {
    /// Keeps the mapping under `pieces` alive.
    memory: Arc<GuestMemoryMmap>,
    pieces: Vec<libc::iovec>,
    bytes: u64,
}

// SAFETY: the pointers in `pieces` refer to the mapping that `memory` keeps alive; guest memory may be accessed from any
// thread (only through the kernel or volatile copies below, never as references).
unsafe impl Send for GuestBuffers {}

impl GuestBuffers {
    pub(crate) fn new(memory: Arc<GuestMemoryMmap>) -> Self {
        Self { memory, pieces: Vec::new(), bytes: 0 }
    }

    pub(crate) fn clear(&mut self) {
        self.pieces.clear();
        self.bytes = 0;
    }

    /// Appends `length` bytes at `address`; false when they are not all guest memory.
    pub(crate) fn append(&mut self, address: GuestAddress, length: u32, access: Permissions) -> bool {
        let Ok(slices) = self.memory.get_slices(address, length as usize, access) else { return false };
        let mut found = 0u64;
        for slice in slices {
            let Ok(slice) = slice else { return false };
            let iov_base = slice.ptr_guard_mut().as_ptr().cast();
            self.pieces.push(libc::iovec { iov_base, iov_len: slice.len() });
            found += slice.len() as u64;
        }
        self.bytes = self.bytes.saturating_add(found);
        found == u64::from(length)
    }

    /// Appends another list's pieces; both must be of the same memory.
    pub(crate) fn extend(&mut self, other: &Self) {
        debug_assert!(Arc::ptr_eq(&self.memory, &other.memory));
        self.pieces.extend_from_slice(&other.pieces);
        self.bytes = self.bytes.saturating_add(other.bytes);
    }

    /// Bytes in all pieces.
    pub(crate) fn len(&self) -> u64 {
        self.bytes
    }

    /// The pieces for a system call. The kernel may use them as long as this object's memory lives.
    pub(crate) fn iovecs(&self) -> &[libc::iovec] {
        &self.pieces
    }

    /// Calls `call` with the pieces followed by `length` bytes of `tail`.
    pub(crate) fn with_tail<R>(&mut self, tail: &mut [u8], length: usize, call: impl FnOnce(&[libc::iovec]) -> R) -> R {
        let count = self.pieces.len();
        if let Some(tail) = tail.get_mut(..length).filter(|tail| !tail.is_empty()) {
            self.pieces.push(libc::iovec { iov_base: tail.as_mut_ptr().cast(), iov_len: tail.len() });
        }
        let result = call(&self.pieces);
        self.pieces.truncate(count);
        result
    }

    /// Drops everything after the first `bytes` bytes.
    pub(crate) fn truncate(&mut self, bytes: u64) {
        let mut left = bytes;
        let mut keep = 0;
        for piece in &mut self.pieces {
            if left == 0 {
                break;
            }
            piece.iov_len = piece.iov_len.min(usize::try_from(left).unwrap_or(usize::MAX));
            left -= piece.iov_len as u64;
            keep += 1;
        }
        self.pieces.truncate(keep);
        self.bytes = bytes - left;
    }

    /// Drops the first `bytes` bytes.
    pub(crate) fn advance(&mut self, bytes: u64) {
        let mut left = bytes.min(self.bytes);
        self.bytes -= left;
        let mut drop = 0;
        for piece in &mut self.pieces {
            let length = piece.iov_len as u64;
            if left < length {
                piece.iov_base = piece.iov_base.cast::<u8>().wrapping_add(left as usize).cast();
                piece.iov_len = (length - left) as usize;
                break;
            }
            left -= length;
            drop += 1;
        }
        self.pieces.drain(..drop);
    }

    /// Gives whole pages among the pieces back to the host; they read as zeros (or as the file mapped there) afterwards.
    pub(crate) fn discard(&self) {
        for piece in &self.pieces {
            let start = (piece.iov_base as usize).next_multiple_of(HOST_PAGE);
            let end = (piece.iov_base as usize + piece.iov_len) / HOST_PAGE * HOST_PAGE;
            if start < end {
                let pages = piece.iov_base.cast::<u8>().wrapping_add(start - piece.iov_base as usize);
                // SAFETY: the pages lie within the piece, which is guest memory: dropping its content is what the guest asked for, and
                // no Rust reference to it exists. A failure leaves the memory as it was.
                let _ = unsafe { libc::madvise(pages.cast(), end - start, libc::MADV_DONTNEED) };
            }
        }
    }

    /// Copies from the start into `data`; false when there are fewer bytes.
    pub(crate) fn read(&self, data: &mut [u8]) -> bool {
        let mut rest = data;
        for piece in &self.pieces {
            let length = piece.iov_len.min(rest.len());
            let (target, later) = rest.split_at_mut(length);
            // SAFETY: `append` checked that the piece is mapped and `memory` keeps it so; `target` is as long as `length`. Guest
            // writes at the same time make the bytes arbitrary, which any guest data is.
            unsafe { std::ptr::copy_nonoverlapping(piece.iov_base.cast::<u8>(), target.as_mut_ptr(), length) };
            rest = later;
            if rest.is_empty() {
                break;
            }
        }
        rest.is_empty()
    }

    /// Copies `data` to byte `offset`; false when it does not fit (then a part may have been stored).
    pub(crate) fn write(&self, offset: u64, data: &[u8]) -> bool {
        let mut skip = offset;
        let mut rest = data;
        for piece in &self.pieces {
            let length = piece.iov_len as u64;
            if skip >= length {
                skip -= length;
                continue;
            }
            let (source, later) = rest.split_at(((length - skip) as usize).min(rest.len()));
            let target = piece.iov_base.cast::<u8>().wrapping_add(skip as usize);
            // SAFETY: within the piece, see `read`.
            unsafe { std::ptr::copy_nonoverlapping(source.as_ptr(), target, source.len()) };
            rest = later;
            skip = 0;
            if rest.is_empty() {
                break;
            }
        }
        rest.is_empty()
    }
}
