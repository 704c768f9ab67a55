//! Session tokens: what a guest shows to be answered by version 2.
//!
//! A token is its own proof: its end and its number, and a code over both and the microVM's id under a key that this
//! monitor drew for this microVM. So nothing is kept per token and a guest cannot fill anything by asking for many; none can be
//! made up, changed or carried to another microVM; and all end with the key, which no snapshot has.

use std::fmt;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use hmac::{Hmac, KeyInit, Mac};
use sha2::Sha256;

/// Shortest life that a guest may ask for, in seconds.
pub const MIN_TTL_SECONDS: u32 = 1;
/// Longest life that a guest may ask for, in seconds: six hours.
pub const MAX_TTL_SECONDS: u32 = 21600;

/// Half of SHA-256's output: nobody guesses 128 bits.
const CODE_LEN: usize = 16;
const LEN: usize = 8 + 8 + CODE_LEN;

/// Makes and checks tokens.
pub(crate) struct Tokens {
    code: Hmac<Sha256>,
    /// Added to what a token says of its end: the guest does not learn since when its host runs.
    offset: u64,
    issued: AtomicU64,
}

impl Tokens {
    /// `key` is random, and of this microVM alone.
    pub(crate) fn new(key: &[u8; 32], vm_id: &str) -> Tokens {
        let mut code = Hmac::<Sha256>::new_from_slice(key).expect("HMAC takes a key of any length");
        // What follows the id has a fixed length, so no two ids and ends run into each other.
        code.update(vm_id.as_bytes());
        let tokens = Tokens { code, offset: 0, issued: AtomicU64::new(0) };
        Tokens { offset: tokens.secret(u64::MAX), ..tokens }
    }

    /// A token that lives for `ttl_seconds` from `now` on.
    pub(crate) fn issue(&self, ttl_seconds: u32, now: Duration) -> String {
        let end = now + Duration::from_secs(ttl_seconds.into());
        let number = self.issued.fetch_add(1, Ordering::Relaxed);
        let mut token = [0; LEN];
        token[..8].copy_from_slice(&(end.as_millis() as u64).wrapping_add(self.offset).to_be_bytes());
        token[8..16].copy_from_slice(&number.to_be_bytes());
        let code = self.code.clone().chain_update(&token[..16]).finalize().into_bytes();
        token[16..].copy_from_slice(&code[..CODE_LEN]);
        to_hex(&token)
    }

    /// A number that nobody can guess who does not have the key; another for each `number`.
    pub(crate) fn secret(&self, number: u64) -> u64 {
        // Longer than what a token says, so never the code of one.
        let said = self.code.clone().chain_update(b"a secret").chain_update([0; 16]);
        let code = said.chain_update(number.to_be_bytes()).finalize().into_bytes();
        let mut secret = [0; 8];
        secret.copy_from_slice(&code[..8]);
        u64::from_be_bytes(secret)
    }

    /// Whether `token` is one of these and alive.
    pub(crate) fn is_valid(&self, token: &[u8], now: Duration) -> bool {
        let Some(token) = from_hex(token) else { return false };
        let (said, code) = token.split_at(16);
        // In constant time, and before anything that the token says is looked at.
        if self.code.clone().chain_update(said).verify_truncated_left(code).is_err() {
            return false;
        }
        let mut end = [0; 8];
        end.copy_from_slice(&said[..8]);
        (now.as_millis() as u64) < u64::from_be_bytes(end).wrapping_sub(self.offset)
    }
}

impl fmt::Debug for Tokens {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Tokens").field("issued", &self.issued).finish_non_exhaustive()
    }
}

fn to_hex(bytes: &[u8]) -> String {
    let digit = |value: u8| char::from_digit(value.into(), 16).expect("four bits are a digit");
    bytes.iter().flat_map(|byte| [digit(byte >> 4), digit(byte & 15)]).collect()
}

fn from_hex(text: &[u8]) -> Option<[u8; LEN]> {
    let mut bytes = [0; LEN];
    if text.len() != 2 * LEN {
        return None;
    }
    for (byte, pair) in bytes.iter_mut().zip(text.chunks_exact(2)) {
        let digit = |at: usize| char::from(pair[at]).to_digit(16);
        *byte = (16 * digit(0)? + digit(1)?) as u8;
    }
    Some(bytes)
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    const KEY: [u8; 32] = [7; 32];
    const NOW: Duration = Duration::from_secs(1000);

    #[test]
    fn a_token_lives_as_long_as_it_was_asked_for() {
        let tokens = Tokens::new(&KEY, "vm");
        let token = tokens.issue(60, NOW);
        let last = NOW + Duration::from_millis(59_999);
        for (now, alive) in [(NOW, true), (last, true), (NOW + Duration::from_mins(1), false)] {
            assert_eq!(tokens.is_valid(token.as_bytes(), now), alive, "{now:?}");
        }
    }

    #[test]
    fn a_token_is_of_one_microvm_and_one_key() {
        let token = Tokens::new(&KEY, "vm").issue(60, NOW);
        for other in [Tokens::new(&KEY, "vn"), Tokens::new(&KEY, "v"), Tokens::new(&[8; 32], "vm")] {
            assert!(!other.is_valid(token.as_bytes(), NOW));
        }
    }

    #[test]
    fn a_token_does_not_tell_the_hosts_time() {
        let said = |key| Tokens::new(key, "vm").issue(60, NOW)[..16].to_owned();
        assert_ne!(said(&KEY), said(&[8; 32]));
        assert_ne!(said(&KEY), format!("{:016x}", (NOW + Duration::from_mins(1)).as_millis()));
    }

    #[test]
    fn no_two_tokens_are_the_same() {
        let tokens = Tokens::new(&KEY, "vm");
        assert_ne!(tokens.issue(60, NOW), tokens.issue(60, NOW));
    }

    #[test]
    fn the_longest_life_at_the_end_of_time_is_no_overflow() {
        let tokens = Tokens::new(&KEY, "vm");
        let now = Duration::from_secs(u32::MAX.into());
        assert!(tokens.is_valid(tokens.issue(MAX_TTL_SECONDS, now).as_bytes(), now));
    }

    proptest! {
        #[test]
        fn a_token_with_a_byte_changed_is_none(at in 0..2 * LEN, byte in any::<u8>()) {
            let tokens = Tokens::new(&KEY, "vm");
            let mut token = tokens.issue(60, NOW).into_bytes();
            let before = std::mem::replace(&mut token[at], byte);
            let same = before.eq_ignore_ascii_case(&byte);
            prop_assert_eq!(tokens.is_valid(&token, NOW), same);
        }

        #[test]
        fn noise_is_no_token(noise in prop::collection::vec(any::<u8>(), 0..80)) {
            prop_assert!(!Tokens::new(&KEY, "vm").is_valid(&noise, NOW));
        }
    }
}
