//! Page-aligned bounce buffers, and moving bytes between them and iovecs.

use std::alloc::{Layout, alloc_zeroed, dealloc, handle_alloc_error};
use std::ptr::NonNull;

/// `O_DIRECT` wants at most this.
const ALIGN: usize = 4096;
/// Sizes kept for reuse: a block, a piece, a chunk.
const CLASSES: [(usize, usize); 3] = [(4096, 64), (64 << 10, 8), (512 << 10, 2)];

/// Owned, zeroed at first, aligned memory.
#[derive(Debug)]
pub(crate) struct Buffer {
    memory: NonNull<u8>,
    length: usize,
}

// SAFETY: a Buffer owns its memory like a Vec does.
unsafe impl Send for Buffer {}

impl Buffer {
    fn new(length: usize) -> Self {
        let layout = Self::layout(length);
        // SAFETY: `layout` rounds up to at least one page, so it is not zero-sized.
        let memory = unsafe { alloc_zeroed(layout) };
        match NonNull::new(memory) {
            Some(memory) => Self { memory, length },
            None => handle_alloc_error(layout),
        }
    }

    fn layout(length: usize) -> Layout {
        // 4096 is a power of two and lengths are at most a chunk: cannot fail.
        Layout::from_size_align(length.max(1).next_multiple_of(ALIGN), ALIGN).unwrap_or(Layout::new::<[u8; ALIGN]>())
    }

    pub(crate) fn bytes(&mut self) -> &mut [u8] {
        // SAFETY: the memory is owned, initialised and `length` long.
        unsafe { std::slice::from_raw_parts_mut(self.memory.as_ptr(), self.length) }
    }

    pub(crate) fn content(&self) -> &[u8] {
        // SAFETY: as in `bytes`.
        unsafe { std::slice::from_raw_parts(self.memory.as_ptr(), self.length) }
    }

    /// The part from `from`, `length` long (cut at the end), as an iovec.
    pub(crate) fn iovec(&mut self, from: usize, length: usize) -> libc::iovec {
        let from = from.min(self.length);
        let length = length.min(self.length - from);
        // SAFETY: `from` is inside the allocation or one past its end.
        libc::iovec { iov_base: unsafe { self.memory.as_ptr().add(from) }.cast(), iov_len: length }
    }
}

impl Drop for Buffer {
    fn drop(&mut self) {
        // SAFETY: allocated with the same layout, freed once.
        unsafe { dealloc(self.memory.as_ptr(), Self::layout(self.length)) }
    }
}

/// Buffers of one queue that wait for their next use.
#[derive(Debug, Default)]
pub(crate) struct BufferPool {
    spare: [Vec<Buffer>; CLASSES.len()],
}

impl BufferPool {
    /// At least `length` bytes; `bytes()` is of the class's size.
    pub(crate) fn take(&mut self, length: usize) -> Buffer {
        for ((size, _), spare) in CLASSES.iter().zip(&mut self.spare) {
            if length <= *size {
                return spare.pop().unwrap_or_else(|| Buffer::new(*size));
            }
        }
        Buffer::new(length)
    }

    pub(crate) fn give(&mut self, buffer: Buffer) {
        for ((size, most), spare) in CLASSES.iter().zip(&mut self.spare) {
            if buffer.length == *size && spare.len() < *most {
                spare.push(buffer);
                return;
            }
        }
    }
}

/// Copies guest memory into `to`.
///
/// # Safety
/// The iovecs' memory must be readable.
pub(crate) unsafe fn gather(from: &[libc::iovec], mut to: &mut [u8]) {
    for iovec in from {
        let length = iovec.iov_len.min(to.len());
        let (now, rest) = to.split_at_mut(length);
        // SAFETY: the caller's promise; guest memory and our buffers do not overlap.
        unsafe { std::ptr::copy_nonoverlapping(iovec.iov_base.cast::<u8>(), now.as_mut_ptr(), length) };
        to = rest;
    }
}

/// Copies `from` into guest memory.
///
/// # Safety
/// The iovecs' memory must be writable.
pub(crate) unsafe fn scatter(mut from: &[u8], to: &[libc::iovec]) {
    for iovec in to {
        let length = iovec.iov_len.min(from.len());
        let (now, rest) = from.split_at(length);
        // SAFETY: the caller's promise; guest memory and our buffers do not overlap.
        unsafe { std::ptr::copy_nonoverlapping(now.as_ptr(), iovec.iov_base.cast::<u8>(), length) };
        from = rest;
    }
}
