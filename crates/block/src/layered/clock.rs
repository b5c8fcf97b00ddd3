//! Time for rate limits and retries.

/// A monotonic clock, or a test's.
#[derive(Clone, Debug)]
pub(crate) enum Clock {
    Monotonic,
    #[cfg(test)]
    Manual(std::sync::Arc<std::sync::atomic::AtomicU64>),
}

impl Clock {
    /// Nanoseconds of `CLOCK_MONOTONIC`, the clock of timerfds.
    pub(crate) fn now(&self) -> u64 {
        match self {
            Self::Monotonic => {
                let mut time = libc::timespec { tv_sec: 0, tv_nsec: 0 };
                // SAFETY: clock_gettime writes one timespec to the pointer, which is valid for that.
                unsafe { libc::clock_gettime(libc::CLOCK_MONOTONIC, &raw mut time) };
                (time.tv_sec as u64).saturating_mul(1_000_000_000).saturating_add(time.tv_nsec as u64)
            }
            #[cfg(test)]
            Self::Manual(now) => now.load(std::sync::atomic::Ordering::Relaxed),
        }
    }
}
