//! What a control plane and a joining agent must agree on before they share a certificate authority.

use std::fmt;
use std::str::FromStr;

use thiserror::Error;

/// DNS name (subject alternative name) in the certificate of every control plane server. Agents check it whatever address
/// they dialled, so that no other certificate of the same authority (another agent's, a user's) passes for the server.
pub const CONTROL_SERVER_NAME: &str = "control.hearth.internal";

/// First word of a join token; a later form of the token gets another one.
const TOKEN_PREFIX: &str = "hearth-join-1";

/// A one-time secret with which one agent may join, and the fingerprint by which that agent knows the right control plane.
///
/// Text form: `hearth-join-1.<64 hex digits of the CA's fingerprint>.<64 hex digits of the secret>`.
#[derive(Clone, PartialEq, Eq)]
pub struct JoinToken {
    /// SHA-256 of the certificate authority's certificate in DER. The control plane's TLS server sends that certificate as
    /// the last one of its chain.
    pub ca_sha256: [u8; 32],
    /// What the control plane knows the token by (it keeps a hash only).
    pub secret: [u8; 32],
}

/// A text that is no join token. The text itself is not repeated: it may hold a secret.
#[derive(Clone, Debug, PartialEq, Eq, Error)]
#[error("not a join token: it must be '{TOKEN_PREFIX}.', 64 hex digits, '.', 64 hex digits (see `hearth host token`)")]
pub struct JoinTokenError;

fn hex_of(bytes: &[u8; 32]) -> String {
    bytes.iter().map(|byte| format!("{byte:02x}")).collect()
}

fn parse_hex(text: &str) -> Result<[u8; 32], JoinTokenError> {
    if text.len() != 64 || !text.bytes().all(|b| b.is_ascii_hexdigit()) {
        return Err(JoinTokenError);
    }
    let mut bytes = [0u8; 32];
    for (index, byte) in bytes.iter_mut().enumerate() {
        let digits = text.get(2 * index..2 * index + 2).ok_or(JoinTokenError)?;
        *byte = u8::from_str_radix(digits, 16).map_err(|_| JoinTokenError)?;
    }
    Ok(bytes)
}

impl JoinToken {
    /// The text to hand to the operator. Whoever has it may join one host.
    pub fn reveal(&self) -> String {
        format!("{TOKEN_PREFIX}.{}.{}", hex_of(&self.ca_sha256), hex_of(&self.secret))
    }
}

impl fmt::Debug for JoinToken {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("JoinToken").field("ca_sha256", &hex_of(&self.ca_sha256)).finish_non_exhaustive()
    }
}

impl FromStr for JoinToken {
    type Err = JoinTokenError;

    fn from_str(text: &str) -> Result<Self, JoinTokenError> {
        let mut parts = text.trim().split('.');
        match (parts.next(), parts.next(), parts.next(), parts.next()) {
            (Some(TOKEN_PREFIX), Some(ca), Some(secret), None) => {
                Ok(Self { ca_sha256: parse_hex(ca)?, secret: parse_hex(secret)? })
            }
            _ => Err(JoinTokenError),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_token_survives_its_text_and_hides_its_secret() {
        let token = JoinToken { ca_sha256: [0xab; 32], secret: [0x5c; 32] };
        let text = token.reveal();
        assert_eq!(text.parse::<JoinToken>().unwrap(), token);
        assert!(!format!("{token:?}").contains("5c5c"));
    }

    #[test]
    fn other_texts_are_refused() {
        let good = JoinToken { ca_sha256: [1; 32], secret: [2; 32] }.reveal();
        let longer = format!("{good}0");
        let fourth = format!("{good}.x");
        for text in ["", "hearth-join-1", "hearth-join-1..", &good[1..], &good[..good.len() - 1], &longer, &fourth] {
            assert!(text.parse::<JoinToken>().is_err(), "{text}");
        }
        assert!(good.replace('2', "é").parse::<JoinToken>().is_err());
    }
}
