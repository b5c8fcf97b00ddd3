//! Numbers and times as people write them.

use std::time::Duration;

use time::OffsetDateTime;
use time::format_description::well_known::Rfc3339;

/// "1.5 GiB", "300 B".
pub fn bytes(count: u64) -> String {
    const UNITS: [&str; 5] = ["KiB", "MiB", "GiB", "TiB", "PiB"];
    if count < 1024 {
        return format!("{count} B");
    }
    let mut value = count as f64 / 1024.0;
    let mut units = UNITS.iter();
    let mut unit = units.next().copied().unwrap_or_default();
    while value >= 1023.95 {
        let Some(next) = units.next() else { break };
        value /= 1024.0;
        unit = next;
    }
    let text = if value < 9.95 { format!("{value:.1}") } else { format!("{value:.0}") };
    format!("{} {unit}", text.strip_suffix(".0").unwrap_or(&text))
}

/// "45 s", "3 min", "5 h", "12 d": the age of an RFC 3339 time. Other texts come back as they are.
pub fn age(rfc3339: &str, now: OffsetDateTime) -> String {
    let Ok(then) = OffsetDateTime::parse(rfc3339, &Rfc3339) else { return rfc3339.to_owned() };
    let seconds = (now - then).whole_seconds().max(0);
    match seconds {
        0..120 => format!("{seconds} s"),
        120..7200 => format!("{} min", seconds / 60),
        7200..172_800 => format!("{} h", seconds / 3600),
        _ => format!("{} d", seconds / 86_400),
    }
}

/// "2.5 s", "48 s", "2 min 5 s".
pub fn duration(duration: Duration) -> String {
    let seconds = duration.as_secs();
    match seconds {
        0..10 => format!("{:.1} s", duration.as_secs_f64()),
        10..120 => format!("{seconds} s"),
        _ => format!("{} min {} s", seconds / 60, seconds % 60),
    }
}

/// "2 ECU", "0.5 ECU".
pub fn ecu(milli: u64) -> String {
    let whole = milli / 1000;
    match milli % 1000 {
        0 => whole.to_string(),
        part => format!("{whole}.{part:03}").trim_end_matches('0').to_owned(),
    }
}

/// "45 %" or what is done so far when the whole is unknown.
pub fn progress(done: u64, total: u64) -> String {
    match total {
        0 if done == 0 => String::new(),
        0 => bytes(done),
        _ => format!("{} %", done.min(total) as u128 * 100 / total as u128),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sizes_are_short_and_true() {
        for (count, text) in [
            (0, "0 B"),
            (1023, "1023 B"),
            (1024, "1 KiB"),
            (1536, "1.5 KiB"),
            (10 << 30, "10 GiB"),
            ((1 << 20) - 1, "1 MiB"),
            (20 << 30, "20 GiB"),
            (3 << 40, "3 TiB"),
            (u64::MAX, "16384 PiB"),
        ] {
            assert_eq!(bytes(count), text);
        }
    }

    #[test]
    fn ages_round_down() {
        let now = OffsetDateTime::parse("2026-11-23T13:00:00Z", &Rfc3339).unwrap();
        for (then, text) in [
            ("2026-11-23T12:59:15Z", "45 s"),
            ("2026-11-23T12:57:00.5Z", "2 min"),
            ("2026-11-23T08:00:00Z", "5 h"),
            ("2026-11-11T13:00:00Z", "12 d"),
            ("2026-11-23T13:00:09Z", "0 s"),
            ("soon", "soon"),
        ] {
            assert_eq!(age(then, now), text);
        }
    }

    #[test]
    fn compute_units_and_progress() {
        assert_eq!((ecu(2000), ecu(500), ecu(1250)), ("2".to_owned(), "0.5".to_owned(), "1.25".to_owned()));
        assert_eq!((progress(1, 3), progress(5, 0), progress(9, 8)), ("33 %".into(), "5 B".into(), "100 %".into()));
    }
}
