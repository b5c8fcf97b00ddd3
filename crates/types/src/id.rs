//! Resource ids as EC2 writes them: a prefix, a hyphen and 17 lower-case hex digits.
//! Source: <https://docs.aws.amazon.com/AWSEC2/latest/UserGuide/resource-ids.html>

use std::fmt;
use std::str::FromStr;

use serde::{Deserialize, Serialize};
use thiserror::Error;

/// Hex digits behind the hyphen of a resource id.
pub const ID_HEX_DIGITS: usize = 17;

/// Why a text is not an id of the wanted kind.
#[derive(Clone, Debug, PartialEq, Eq, Error)]
pub enum IdError {
    /// Not of the form prefix + hyphen + digits.
    #[error("'{text}' is not {article} id: it must be '{prefix}-' and 17 hex digits (0-9, a-f)")]
    Malformed {
        /// What was given.
        text: String,
        /// What the kind is called, with its article.
        article: &'static str,
        /// The wanted prefix.
        prefix: &'static str,
    },
    /// Account ids are 12 decimal digits.
    #[error("'{0}' is not an account id: it must be 12 decimal digits")]
    Account(String),
}

fn random_hex() -> Result<String, getrandom::Error> {
    let mut bytes = [0u8; 9];
    getrandom::fill(&mut bytes)?;
    let mut text: String = bytes.iter().map(|byte| format!("{byte:02x}")).collect();
    text.truncate(ID_HEX_DIGITS);
    Ok(text)
}

macro_rules! resource_id {
    ($(#[$doc:meta])* $name:ident, $prefix:literal, $article:literal) => {
        $(#[$doc])*
        #[derive(Clone, Debug, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
        #[serde(try_from = "String", into = "String")]
        pub struct $name(String);

        impl $name {
            /// Prefix without the hyphen.
            pub const PREFIX: &'static str = $prefix;

            /// A new random id; fails only when the system has no entropy source.
            pub fn generate() -> Result<Self, getrandom::Error> {
                Ok(Self(format!(concat!($prefix, "-{}"), random_hex()?)))
            }

            /// The id as text.
            pub fn as_str(&self) -> &str {
                &self.0
            }

            /// The 17 hex digits behind the hyphen.
            pub fn hex(&self) -> &str {
                self.0.get(Self::PREFIX.len() + 1..).unwrap_or_default()
            }
        }

        impl crate::packed::ResourceId for $name {
            const PREFIX: &'static str = $prefix;
        }

        impl FromStr for $name {
            type Err = IdError;

            fn from_str(text: &str) -> Result<Self, IdError> {
                let digits = text.strip_prefix(concat!($prefix, "-"));
                match digits {
                    Some(digits)
                        if digits.len() == ID_HEX_DIGITS
                            && digits.bytes().all(|b| matches!(b, b'0'..=b'9' | b'a'..=b'f')) =>
                    {
                        Ok(Self(text.to_owned()))
                    }
                    _ => Err(IdError::Malformed {
                        text: text.to_owned(),
                        article: $article,
                        prefix: $prefix,
                    }),
                }
            }
        }

        impl TryFrom<String> for $name {
            type Error = IdError;
            fn try_from(text: String) -> Result<Self, IdError> {
                text.parse()
            }
        }

        impl From<$name> for String {
            fn from(id: $name) -> String {
                id.0
            }
        }

        impl fmt::Display for $name {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str(&self.0)
            }
        }

        impl AsRef<str> for $name {
            fn as_ref(&self) -> &str {
                &self.0
            }
        }
    };
}

resource_id!(
    /// One instance.
    InstanceId, "i", "an instance");
resource_id!(
    /// One run-instances call and the instances it made.
    ReservationId, "r", "a reservation");
resource_id!(
    /// One AMI.
    ImageId, "ami", "an image");
resource_id!(
    /// One EBS volume.
    VolumeId, "vol", "a volume");
resource_id!(
    /// One EBS snapshot.
    SnapshotId, "snap", "a snapshot");
resource_id!(
    /// One key pair.
    KeyPairId, "key", "a key pair");
resource_id!(
    /// One machine that runs an agent.
    HostId, "h", "a host");

impl VolumeId {
    /// What the guest reads as the disk's serial number: the id without its hyphen, 20 bytes as virtio-blk GET_ID allows
    /// and as EC2's Nitro instances show it.
    pub fn serial(&self) -> String {
        format!("vol{}", self.hex())
    }
}

/// A 12-digit account number.
#[derive(Clone, Debug, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub struct AccountId(String);

impl AccountId {
    /// The id as text.
    pub fn as_str(&self) -> &str {
        &self.0
    }
}

impl FromStr for AccountId {
    type Err = IdError;
    fn from_str(text: &str) -> Result<Self, IdError> {
        if text.len() == 12 && text.bytes().all(|b| b.is_ascii_digit()) {
            Ok(Self(text.to_owned()))
        } else {
            Err(IdError::Account(text.to_owned()))
        }
    }
}

impl TryFrom<String> for AccountId {
    type Error = IdError;
    fn try_from(text: String) -> Result<Self, IdError> {
        text.parse()
    }
}

impl From<AccountId> for String {
    fn from(id: AccountId) -> String {
        id.0
    }
}

impl fmt::Display for AccountId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn generated_ids_parse_and_differ() {
        let a = InstanceId::generate().unwrap();
        let b = InstanceId::generate().unwrap();
        assert_ne!(a, b);
        assert_eq!(a.as_str().parse::<InstanceId>().unwrap(), a);
        assert_eq!(a.hex().len(), ID_HEX_DIGITS);
    }

    #[test]
    fn wrong_ids_are_named_in_the_error() {
        for text in ["", "i-", "i-123", "ami-0123456789abcdef0", "i-0123456789ABCDEF0", "i-0123456789abcdef00"] {
            let error = text.parse::<InstanceId>().unwrap_err();
            assert!(error.to_string().contains(text), "{error}");
        }
    }

    #[test]
    fn volume_serial_has_the_twenty_bytes_of_get_id() {
        let id: VolumeId = "vol-0123456789abcdef0".parse().unwrap();
        assert_eq!(id.serial(), "vol0123456789abcdef0");
        assert_eq!(id.serial().len(), 20);
    }

    #[test]
    fn account_ids_are_twelve_digits() {
        assert!("000000000001".parse::<AccountId>().is_ok());
        assert!("1".parse::<AccountId>().is_err());
        assert!("00000000000a".parse::<AccountId>().is_err());
    }
}
