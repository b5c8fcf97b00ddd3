//! Session tokens: random, in memory, bound to one instance. An agent's restart ends them; clients fetch a new one on 401.

use std::collections::HashMap;
use std::time::{Duration, Instant};

use base64::Engine;
use base64::engine::general_purpose::URL_SAFE_NO_PAD;
use parking_lot::Mutex;

/// Live tokens one instance may hold; the one that ends first makes room.
const MAX_TOKENS_PER_INSTANCE: usize = 64;

#[derive(Default)]
pub(super) struct Tokens {
    by_instance: Mutex<HashMap<String, HashMap<String, Instant>>>,
}

impl Tokens {
    /// A new token of that instance that lives `ttl` seconds.
    pub(super) fn issue(&self, instance: &str, ttl: u32) -> Result<String, getrandom::Error> {
        let mut bytes = [0u8; 32];
        getrandom::fill(&mut bytes)?;
        let token = URL_SAFE_NO_PAD.encode(bytes);
        let now = Instant::now();
        let mut by_instance = self.by_instance.lock();
        by_instance.retain(|_, tokens| {
            tokens.retain(|_, end| *end > now);
            !tokens.is_empty()
        });
        let tokens = by_instance.entry(instance.to_owned()).or_default();
        if tokens.len() >= MAX_TOKENS_PER_INSTANCE
            && let Some(first) = tokens.iter().min_by_key(|(_, end)| **end).map(|(token, _)| token.clone())
        {
            tokens.remove(&first);
        }
        tokens.insert(token.clone(), now + Duration::from_secs(u64::from(ttl)));
        Ok(token)
    }

    pub(super) fn is_valid(&self, token: &str, instance: &str) -> bool {
        let by_instance = self.by_instance.lock();
        by_instance.get(instance).and_then(|tokens| tokens.get(token)).is_some_and(|end| *end > Instant::now())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_token_is_good_for_its_instance_only() {
        let tokens = Tokens::default();
        let token = tokens.issue("i-a", 60).unwrap();
        assert!(tokens.is_valid(&token, "i-a"));
        assert!(!tokens.is_valid(&token, "i-b"));
        assert!(!tokens.is_valid("", "i-a"));
    }

    #[test]
    fn an_instance_cannot_fill_the_memory() {
        let tokens = Tokens::default();
        let first = tokens.issue("i-a", 1).unwrap();
        let later: Vec<_> = (0..2 * MAX_TOKENS_PER_INSTANCE).map(|_| tokens.issue("i-a", 60).unwrap()).collect();
        assert!(tokens.by_instance.lock()["i-a"].len() <= MAX_TOKENS_PER_INSTANCE);
        assert!(!tokens.is_valid(&first, "i-a"));
        assert!(tokens.is_valid(later.last().unwrap(), "i-a"));
    }
}
