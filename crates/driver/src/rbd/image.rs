//! Names that are safe on a command line and in Ceph's `pool/image@snapshot`.

use std::fmt;
use std::str::FromStr;

use crate::DriverError;

/// Longest name.
const MAX_BYTES: usize = 96;

/// The name of a pool, a namespace, an image or a snapshot: 1 to 96 letters, digits, `.`, `_` and `-`, of which the first is a letter
/// or digit.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Name(String);

impl Name {
    /// The text.
    pub fn as_str(&self) -> &str {
        &self.0
    }
}

impl FromStr for Name {
    type Err = DriverError;

    fn from_str(text: &str) -> Result<Self, DriverError> {
        let refuse = |why| Err(DriverError::Name { what: "name", name: text.to_owned(), why });
        if text.len() > MAX_BYTES {
            return refuse("it is longer than 96 bytes");
        }
        if !text.starts_with(|first: char| first.is_ascii_alphanumeric()) {
            return refuse("it does not begin with a letter or digit");
        }
        if !text.chars().all(|char| char.is_ascii_alphanumeric() || matches!(char, '.' | '_' | '-')) {
            return refuse("only letters, digits, '.', '_' and '-' are possible");
        }
        Ok(Self(text.to_owned()))
    }
}

impl fmt::Display for Name {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    proptest! {
        #[test]
        fn a_name_is_never_an_option_nor_a_path_nor_two(text in ".{0,100}") {
            if let Ok(name) = text.parse::<Name>() {
                prop_assert!(!name.as_str().starts_with(['-', '.']) && !name.as_str().contains(['/', '@', ',', ' ', '\0']));
                prop_assert!(!name.as_str().is_empty() && name.as_str() == text);
            }
        }
    }

    #[test]
    fn volume_ids_are_names() {
        assert!("vol-0123456789abcdef0".parse::<Name>().is_ok());
        for bad in ["", "-v", "a/b", "a@b", ".", &"x".repeat(97)] {
            assert!(matches!(bad.parse::<Name>(), Err(DriverError::Name { .. })), "{bad}");
        }
    }
}
