//! Values of flags.

use std::time::Duration;

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
    let shift = match unit.trim().to_ascii_lowercase().trim_end_matches('b').trim_end_matches('i') {
        "" => 0,
        "k" => 10,
        "m" => 20,
        "g" => 30,
        "t" => 40,
        _ => return Err(format!("unknown unit '{}'; units are K, M, G, T", unit.trim())),
    };
    number.checked_mul(1 << shift).ok_or_else(|| "this is too large".to_owned())
}

#[cfg(test)]
mod tests {
    use super::*;

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
    fn tags_have_a_key() {
        assert_eq!(parse_tag("a=b=c").unwrap(), Tag { key: "a".into(), value: Some("b=c".into()) });
        assert!(parse_tag("a").is_err());
        assert!(parse_tag_or_key("a").is_ok());
        assert!(parse_tag_or_key("=x").is_err());
    }
}
