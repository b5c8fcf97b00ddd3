//! Values of flags.

use std::time::Duration;

use hearth_types::volume::GIB;

/// One `--filter` or `--tag` of a list command.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Filter {
    /// EC2's name of the filter.
    pub name: String,
    /// Alternatives.
    pub values: Vec<String>,
}

/// A tag as given.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Tag {
    /// Before the first `=`.
    pub key: String,
    /// Behind it; `None` without `=`.
    pub value: Option<String>,
}

/// `NAME=VALUE[,VALUE…]`; `\,` is a comma inside a value.
pub fn parse_filter(text: &str) -> Result<Filter, String> {
    let (name, values) = text.split_once('=').ok_or("write it as NAME=VALUE, e.g. instance-state-name=running")?;
    if name.is_empty() {
        return Err("the name before '=' is missing".to_owned());
    }
    let mut list = vec![String::new()];
    let mut chars = values.chars().peekable();
    while let Some(c) = chars.next() {
        match (c, list.last_mut()) {
            (',', _) => list.push(String::new()),
            ('\\', Some(last)) if chars.peek() == Some(&',') => {
                chars.next();
                last.push(',');
            }
            (c, Some(last)) => last.push(c),
            _ => {}
        }
    }
    Ok(Filter { name: name.to_owned(), values: list })
}

/// `KEY=VALUE` or `KEY`, as the filter `tag:KEY` or `tag-key`.
pub fn parse_tag_filter(text: &str) -> Result<Filter, String> {
    match text.split_once('=') {
        Some(("", _)) => Err("the key before '=' is missing".to_owned()),
        Some((key, value)) => Ok(Filter { name: format!("tag:{key}"), values: vec![value.to_owned()] }),
        None => Ok(Filter { name: "tag-key".to_owned(), values: vec![text.to_owned()] }),
    }
}

/// `KEY=VALUE`.
pub fn parse_tag(text: &str) -> Result<Tag, String> {
    match parse_tag_or_key(text)? {
        Tag { value: None, .. } => Err("write it as KEY=VALUE".to_owned()),
        tag => Ok(tag),
    }
}

/// `KEY=VALUE` or `KEY`.
pub fn parse_tag_or_key(text: &str) -> Result<Tag, String> {
    let (key, value) = match text.split_once('=') {
        Some((key, value)) => (key, Some(value.to_owned())),
        None => (text, None),
    };
    if key.is_empty() { Err("the key is missing".to_owned()) } else { Ok(Tag { key: key.to_owned(), value }) }
}

/// "90s", "10min", "2h".
pub fn parse_duration(text: &str) -> Result<Duration, String> {
    humantime::parse_duration(text).map_err(|error| format!("{error} (write it as 90s, 10min or 2h)"))
}

/// "20G", "512M", "1T" (powers of 1024, with or without "iB"), or bytes.
pub fn parse_size(text: &str) -> Result<u64, String> {
    let text = text.trim();
    let digits = text.len() - text.trim_start_matches(|c: char| c.is_ascii_digit()).len();
    let (number, unit) = text.split_at(digits);
    let number: u64 = number.parse().map_err(|_| "write it as a whole number and a unit, e.g. 20G".to_owned())?;
    let shift = match unit.trim().to_ascii_lowercase().as_str() {
        "" | "b" => 0,
        "k" | "kb" | "kib" => 10,
        "m" | "mb" | "mib" => 20,
        "g" | "gb" | "gib" => 30,
        "t" | "tb" | "tib" => 40,
        _ => return Err(format!("unknown unit '{}'; units are K, M, G, T", unit.trim())),
    };
    number.checked_mul(1 << shift).ok_or_else(|| "this is too large".to_owned())
}

/// A size in whole GiB, at least one: "20G", "1T".
pub fn parse_volume_size(text: &str) -> Result<u64, String> {
    let size = parse_size(text)?;
    if size == 0 || !size.is_multiple_of(GIB) {
        return Err(match text.trim().parse::<u64>() {
            Ok(number) => format!("the unit is missing; write it as {number}G"),
            Err(_) => "volumes have whole GiB, e.g. 20G".to_owned(),
        });
    }
    Ok(size)
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn filters_split_at_commas_that_are_not_escaped() {
        let filter = parse_filter(r"tag:Name=a,b\,c,=d").unwrap();
        assert_eq!(filter.name, "tag:Name");
        assert_eq!(filter.values, ["a", "b,c", "=d"]);
        assert!(parse_filter("state").is_err());
        assert!(parse_filter("=running").is_err());
        assert_eq!(parse_tag_filter("env").unwrap().name, "tag-key");
        assert_eq!(parse_tag_filter("env=").unwrap(), Filter { name: "tag:env".into(), values: vec!["".into()] });
    }

    #[test]
    fn sizes_are_powers_of_1024() {
        assert_eq!(parse_size("20G"), Ok(20 << 30));
        assert_eq!(parse_size("20 GiB"), Ok(20 << 30));
        assert_eq!(parse_size("1tb"), Ok(1 << 40));
        assert_eq!(parse_size("512"), Ok(512));
        for wrong in ["", "G", "1.5G", "20X", "99999999999T", "-1"] {
            assert!(parse_size(wrong).is_err(), "{wrong}");
        }
    }

    #[test]
    fn volumes_have_whole_gibibytes() {
        assert_eq!(parse_volume_size("10G"), Ok(10 << 30));
        assert_eq!(parse_volume_size("10GiB"), Ok(10 << 30));
        assert_eq!(parse_volume_size("2048M"), Ok(2 << 30));
        assert_eq!(parse_volume_size("16T"), Ok(16 << 40));
        assert!(parse_volume_size("10").unwrap_err().contains("10G"));
        for wrong in ["0", "0G", "512M", "1025M", "20Gbb", "20giib", "20i"] {
            assert!(parse_volume_size(wrong).is_err(), "{wrong}");
        }
    }

    proptest! {
        #[test]
        fn every_size_that_can_be_written_is_read(number in 0u64..1 << 20, unit in 0usize..5, iec in any::<bool>()) {
            let letter = ["", "K", "m", "G", "t"][unit];
            let text = if iec && unit > 0 { format!("{number} {letter}iB") } else { format!("{number}{letter}") };
            prop_assert_eq!(parse_size(&text), Ok(number << (10 * unit)));
            let whole = number > 0 && (number << (10 * unit)) % GIB == 0;
            prop_assert_eq!(parse_volume_size(&text).is_ok(), whole);
        }

        #[test]
        fn no_text_breaks_a_parser(text in "\\PC{0,40}") {
            let _ = (parse_size(&text), parse_volume_size(&text), parse_filter(&text), parse_tag(&text), parse_duration(&text));
        }
    }

    #[test]
    fn tags_have_a_key() {
        assert_eq!(parse_tag("a=b=c").unwrap(), Tag { key: "a".into(), value: Some("b=c".into()) });
        assert!(parse_tag("a").is_err());
        assert!(parse_tag_or_key("a").is_ok());
        assert!(parse_tag_or_key("=x").is_err());
    }
}
