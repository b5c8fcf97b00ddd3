//! Resource ids as numbers.

use std::fmt;
use std::hash::{Hash, Hasher};
use std::marker::PhantomData;
use std::num::NonZeroU128;

use crate::id::ID_HEX_DIGITS;

/// A kind of resource id: a prefix, a hyphen and 17 lower-case hex digits.
pub trait ResourceId {
    /// Prefix without the hyphen.
    const PREFIX: &'static str;
}

/// Set in every packed id, above its 68 bits: so none is zero, and an `Option` of one takes no more room.
const MARK: NonZeroU128 = match NonZeroU128::new(1 << (4 * ID_HEX_DIGITS)) {
    Some(mark) => mark,
    None => NonZeroU128::MIN,
};

/// An id of kind `I` as a number: what large tables are keyed by. It is copied, compared and hashed without following a pointer,
/// takes no memory of its own, and its text can be had back at any time.
pub struct Packed<I>(NonZeroU128, PhantomData<fn() -> I>);

impl<I: ResourceId> Packed<I> {
    /// Packs an id; `None` for a text that is no id of this kind.
    pub fn parse(text: &str) -> Option<Self> {
        let digits = text.strip_prefix(I::PREFIX)?.strip_prefix('-')?;
        if digits.len() != ID_HEX_DIGITS {
            return None;
        }
        let number = digits.bytes().try_fold(0u128, |number, digit| {
            let value = match digit {
                b'0'..=b'9' => digit - b'0',
                b'a'..=b'f' => digit - b'a' + 10,
                _ => return None,
            };
            Some(number << 4 | u128::from(value))
        })?;
        Some(Self(MARK | number, PhantomData))
    }

    /// The id as text.
    pub fn text(self) -> String {
        let mut text = String::with_capacity(I::PREFIX.len() + 1 + ID_HEX_DIGITS);
        text.push_str(I::PREFIX);
        text.push('-');
        let number = self.0.get();
        for place in (0..ID_HEX_DIGITS).rev() {
            let digit = (number >> (4 * place)) as u32 & 0xf;
            text.push(char::from_digit(digit, 16).unwrap_or('0'));
        }
        text
    }
}

impl<I> Clone for Packed<I> {
    fn clone(&self) -> Self {
        *self
    }
}

impl<I> Copy for Packed<I> {}

impl<I> PartialEq for Packed<I> {
    fn eq(&self, other: &Self) -> bool {
        self.0 == other.0
    }
}

impl<I> Eq for Packed<I> {}

impl<I> Hash for Packed<I> {
    fn hash<H: Hasher>(&self, state: &mut H) {
        self.0.hash(state);
    }
}

impl<I: ResourceId> fmt::Display for Packed<I> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.text())
    }
}

impl<I: ResourceId> fmt::Debug for Packed<I> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(self, f)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::id::{HostId, InstanceId};

    #[test]
    fn every_id_comes_back_as_it_was() {
        for id in ["i-00000000000000000", "i-fffffffffffffffff", "i-0123456789abcdef0"] {
            assert_eq!(Packed::<InstanceId>::parse(id).unwrap().to_string(), id);
        }
        for _ in 0..1000 {
            let (a, b) = (HostId::generate().unwrap(), HostId::generate().unwrap());
            let packed = Packed::<HostId>::parse(a.as_str()).unwrap();
            assert_eq!(packed.text(), a.as_str());
            assert_eq!(packed == Packed::parse(b.as_str()).unwrap(), a == b);
        }
        assert_eq!(size_of::<Option<Packed<HostId>>>(), 16);
    }

    #[test]
    fn what_is_no_id_of_the_kind_is_not_packed() {
        let texts =
            ["", "h", "h-", "h-0", "i-00000000000000001", "h-0000000000000000A", "h-+0000000000000001", "host-a"];
        for text in texts {
            assert_eq!(Packed::<HostId>::parse(text), None, "{text}");
            assert!(text.parse::<HostId>().is_err());
        }
        assert_eq!(Packed::<HostId>::parse("h-000000000000000001"), None);
    }
}
