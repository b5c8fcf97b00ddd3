//! Times of day as records and answers show them.

use std::time::{Duration, SystemTime, UNIX_EPOCH};

use time::OffsetDateTime;
use time::format_description::well_known::Rfc3339;
use time::macros::format_description;

/// Milliseconds since 1970.
pub(crate) fn now_ms() -> u64 {
    let since = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or(Duration::ZERO);
    u64::try_from(since.as_millis()).unwrap_or(u64::MAX)
}

fn date_time(ms: u64) -> OffsetDateTime {
    OffsetDateTime::from_unix_timestamp_nanos(i128::from(ms) * 1_000_000).unwrap_or(OffsetDateTime::UNIX_EPOCH)
}

/// `2026-11-23T13:00:00.123Z`.
pub(crate) fn rfc3339(ms: u64) -> String {
    date_time(ms).format(&Rfc3339).unwrap_or_default()
}

/// EC2's form inside a state transition reason: `2026-11-23 13:00:00 GMT`.
pub(crate) fn gmt(ms: u64) -> String {
    let form = format_description!("[year]-[month]-[day] [hour]:[minute]:[second] GMT");
    date_time(ms).format(form).unwrap_or_default()
}

/// A duration as record fields count it.
pub(crate) fn as_ms(duration: Duration) -> u64 {
    u64::try_from(duration.as_millis()).unwrap_or(u64::MAX)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn times_have_the_forms_that_clients_expect() {
        assert_eq!(rfc3339(1_795_438_800_123), "2026-11-23T13:00:00.123Z");
        assert_eq!(gmt(1_795_438_800_123), "2026-11-23 13:00:00 GMT");
        assert_eq!(rfc3339(u64::MAX), "1970-01-01T00:00:00Z");
    }
}
