//! EC2's rules for tags.
//! Source: <https://docs.aws.amazon.com/AWSEC2/latest/UserGuide/Using_Tags.html#tag-restrictions>

use std::collections::BTreeSet;

use thiserror::Error;

/// Most tags on one resource.
pub const MAX_TAGS: usize = 50;
/// Longest key in characters.
pub const MAX_KEY_CHARS: usize = 128;
/// Longest value in characters.
pub const MAX_VALUE_CHARS: usize = 256;
/// Keys with this prefix are hearth's own.
pub const RESERVED_PREFIX: &str = "hearth:";

/// Why tags are refused.
#[derive(Clone, Debug, PartialEq, Eq, Error)]
pub enum TagError {
    /// More than [`MAX_TAGS`].
    #[error("{0} tags, a resource has at most {MAX_TAGS}")]
    TooMany(usize),
    /// A key is empty, too long or reserved.
    #[error("tag key '{key}': {reason}")]
    Key {
        /// The key, shortened.
        key: String,
        /// What is wrong.
        reason: &'static str,
    },
    /// A value is too long or holds control characters.
    #[error("value of tag '{key}': {reason}")]
    Value {
        /// The key.
        key: String,
        /// What is wrong.
        reason: &'static str,
    },
    /// A key stands twice.
    #[error("tag key '{0}' is given twice")]
    Duplicate(String),
}

fn shortened(text: &str) -> String {
    text.chars().take(40).collect()
}

/// Checks one key.
pub fn check_key(key: &str) -> Result<(), TagError> {
    let refuse = |reason| Err(TagError::Key { key: shortened(key), reason });
    if key.is_empty() {
        return refuse("must not be empty");
    }
    if key.chars().count() > MAX_KEY_CHARS {
        return refuse("must have at most 128 characters");
    }
    if key.chars().any(char::is_control) {
        return refuse("must not hold control characters");
    }
    let lower = key.to_ascii_lowercase();
    if lower.starts_with(RESERVED_PREFIX) || lower.starts_with("aws:") {
        return refuse("prefixes 'hearth:' and 'aws:' are reserved");
    }
    Ok(())
}

/// Checks one value.
pub fn check_value(key: &str, value: &str) -> Result<(), TagError> {
    let refuse = |reason| Err(TagError::Value { key: shortened(key), reason });
    if value.chars().count() > MAX_VALUE_CHARS {
        return refuse("must have at most 256 characters");
    }
    if value.chars().any(char::is_control) {
        return refuse("must not hold control characters");
    }
    Ok(())
}

/// Checks a whole set of (key, value).
pub fn check_tags<'a>(tags: impl IntoIterator<Item = (&'a str, &'a str)>) -> Result<(), TagError> {
    let mut seen = BTreeSet::new();
    for (key, value) in tags {
        check_key(key)?;
        check_value(key, value)?;
        if !seen.insert(key) {
            return Err(TagError::Duplicate(shortened(key)));
        }
    }
    if seen.len() > MAX_TAGS {
        return Err(TagError::TooMany(seen.len()));
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn limits_are_ec2s() {
        assert!(check_tags([("Name", "web 1"), ("empty", "")]).is_ok());
        assert!(matches!(check_tags([("", "x")]), Err(TagError::Key { .. })));
        assert!(matches!(check_tags([("AWS:x", "x")]), Err(TagError::Key { .. })));
        assert!(matches!(check_tags([("hearth:host", "x")]), Err(TagError::Key { .. })));
        assert!(matches!(check_tags([("a", "1"), ("a", "2")]), Err(TagError::Duplicate(_))));
        let long = "ä".repeat(MAX_KEY_CHARS);
        assert!(check_tags([(long.as_str(), "x")]).is_ok());
        let longer = "ä".repeat(MAX_KEY_CHARS + 1);
        assert!(check_tags([(longer.as_str(), "x")]).is_err());
        let value = "v".repeat(MAX_VALUE_CHARS + 1);
        assert!(matches!(check_tags([("a", value.as_str())]), Err(TagError::Value { .. })));
        let keys: Vec<String> = (0..=MAX_TAGS).map(|n| n.to_string()).collect();
        assert_eq!(check_tags(keys.iter().map(|k| (k.as_str(), ""))), Err(TagError::TooMany(MAX_TAGS + 1)));
    }
}
