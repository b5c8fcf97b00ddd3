//! Rate limits of a volume: operations and bytes per second, with exact times of admission. Pure: time is an argument.

#[cfg(test)]
mod tests;

/// Bytes that count as one operation (EBS counts SSD I/O in units of 256 KiB).
pub const IO_UNIT_BYTES: u64 = 256 << 10;
/// What an idle volume may do at once, as time at its full rate: enough that a limit does not cost latency, and short
/// enough that every second stays within a few percent of it.
const BURST_NS: u64 = 50_000_000;
const PS_PER_SECOND: u128 = 1_000_000_000_000;
const PS_PER_NS: u128 = 1000;

/// Most a volume may do; 0 = not limited.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct RateLimits {
    /// Operations per second; a request counts once per started 256 KiB.
    pub iops: u64,
    /// Bytes read and written per second.
    pub bytes_per_second: u64,
}

/// One token bucket, kept as the time at which it will be full again (GCRA), in picoseconds.
#[derive(Clone, Copy, Debug, Default)]
struct Bucket {
    rate: u64,
    full_at: u128,
}

impl Bucket {
    /// Earliest time in ns at which anything is admitted.
    fn opens_at(&self) -> u64 {
        if self.rate == 0 {
            return 0;
        }
        let opens = self.full_at.saturating_sub(u128::from(BURST_NS) * PS_PER_NS);
        u64::try_from(opens.div_ceil(PS_PER_NS)).unwrap_or(u64::MAX)
    }

    fn take(&mut self, cost: u64, now: u64) {
        if self.rate > 0 {
            let start = self.full_at.max(u128::from(now) * PS_PER_NS);
            self.full_at = start + u128::from(cost) * PS_PER_SECOND / u128::from(self.rate);
        }
    }
}

/// Both buckets of a volume. A request is admitted when neither is overdrawn and may then overdraw them, so that requests
/// larger than a bucket get through and the long-term rate is exact.
#[derive(Clone, Copy, Debug, Default)]
pub(crate) struct Limiter {
    operations: Bucket,
    bytes: Bucket,
}

impl Limiter {
    /// New rates; what was spent under the old ones is forgiven.
    pub(crate) fn set(&mut self, limits: RateLimits) {
        self.operations = Bucket { rate: limits.iops, full_at: 0 };
        self.bytes = Bucket { rate: limits.bytes_per_second, full_at: 0 };
    }

    pub(crate) fn is_off(&self) -> bool {
        self.operations.rate == 0 && self.bytes.rate == 0
    }

    /// Admits a transfer of `bytes` at `now` (ns), or tells the time at which to ask again.
    pub(crate) fn admit(&mut self, bytes: u64, now: u64) -> Result<(), u64> {
        let opens = self.operations.opens_at().max(self.bytes.opens_at());
        if opens > now {
            return Err(opens);
        }
        self.operations.take(bytes.div_ceil(IO_UNIT_BYTES).max(1), now);
        self.bytes.take(bytes, now);
        Ok(())
    }
}
