//! Session tokens, which version 2 of the service requires.
//!
//! A token is self-contained: its expiry, its number, and an HMAC of both and the microVM's id. The
//! key is random and belongs to one microVM. So:
//!
//! - The monitor stores nothing per token, and a guest cannot exhaust memory by requesting many.
//! - A token cannot be forged, changed or used in another microVM.
//! - All tokens expire with the key, which no snapshot has.

use std::fmt;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use hmac::{Hmac, KeyInit, Mac};
use sha2::Sha256;

/// Shortest lifetime of a token, in seconds.
pub const MIN_TTL_SECONDS: u32 = 1;
/// Longest lifetime of a token, in seconds: six hours.
pub const MAX_TTL_SECONDS: u32 = 21600;

/// Length of the HMAC in a token: 128 bits, half of SHA-256's output.
const TAG_LEN: usize = 16;
/// Length of a token in bytes: expiry, number, HMAC. As text it has two hex digits a byte.
const LEN: usize = 8 + 8 + TAG_LEN;

/// Issues and validates tokens.
pub(crate) struct Tokens {
    /// HMAC that has absorbed the id of the microVM.
    hmac: Hmac<Sha256>,
    /// Secret that is added to the expiry in a token. It hides the host's uptime from the guest.
    offset: u64,
    /// Number of tokens issued.
    issued: AtomicU64,
}

impl Tokens {
    /// `key` is random and used for this microVM only.
    pub(crate) fn new(key: &[u8; 32], vm_id: &str) -> Tokens {
        let mut hmac = Hmac::<Sha256>::new_from_slice(key).expect("HMAC takes a key of any length");
        // The data after the id has a fixed length, so ids of any length are unambiguous.
        hmac.update(vm_id.as_bytes());
        let tokens = Tokens { hmac, offset: 0, issued: AtomicU64::new(0) };
        Tokens { offset: tokens.derive_secret(u64::MAX), ..tokens }
    }

    /// Issues a token that is valid for `ttl_seconds` from `now` on.
    pub(crate) fn issue(&self, ttl_seconds: u32, now: Duration) -> String {
        let end = now + Duration::from_secs(ttl_seconds.into());
        let number = self.issued.fetch_add(1, Ordering::Relaxed);
        let mut token = [0; LEN];
        token[..8].copy_from_slice(&(end.as_millis() as u64).wrapping_add(self.offset).to_be_bytes());
        token[8..16].copy_from_slice(&number.to_be_bytes());
        let tag = self.hmac.clone().chain_update(&token[..16]).finalize().into_bytes();
        token[16..].copy_from_slice(&tag[..TAG_LEN]);
        to_hex(&token)
    }

    /// Derives an unpredictable number from the key, a different one for each `number`.
    pub(crate) fn derive_secret(&self, number: u64) -> u64 {
        // Longer than the signed part of a token, so never the HMAC of one.
        let signed = self.hmac.clone().chain_update(b"a secret").chain_update([0; 16]);
        let tag = signed.chain_update(number.to_be_bytes()).finalize().into_bytes();
        let mut secret = [0; 8];
        secret.copy_from_slice(&tag[..8]);
        u64::from_be_bytes(secret)
    }

    /// Whether `token` was issued here and has not expired.
    pub(crate) fn is_valid(&self, token: &[u8], now: Duration) -> bool {
        let Some(token) = from_hex(token) else { return false };
        let (signed, tag) = token.split_at(16);
        // In constant time, and before the expiry is read.
        if self.hmac.clone().chain_update(signed).verify_truncated_left(tag).is_err() {
            return false;
        }
        let mut end = [0; 8];
        end.copy_from_slice(&signed[..8]);
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
    fn token_is_valid_for_its_ttl() {
        let tokens = Tokens::new(&KEY, "vm");
        let token = tokens.issue(60, NOW);
        let last = NOW + Duration::from_millis(59_999);
        for (now, alive) in [(NOW, true), (last, true), (NOW + Duration::from_mins(1), false)] {
            assert_eq!(tokens.is_valid(token.as_bytes(), now), alive, "{now:?}");
        }
    }

    #[test]
    fn token_is_bound_to_one_microvm_and_key() {
        let token = Tokens::new(&KEY, "vm").issue(60, NOW);
        for other in [Tokens::new(&KEY, "vn"), Tokens::new(&KEY, "v"), Tokens::new(&[8; 32], "vm")] {
            assert!(!other.is_valid(token.as_bytes(), NOW));
        }
    }

    #[test]
    fn token_hides_the_hosts_uptime() {
        let signed = |key| Tokens::new(key, "vm").issue(60, NOW)[..16].to_owned();
        assert_ne!(signed(&KEY), signed(&[8; 32]));
        assert_ne!(signed(&KEY), format!("{:016x}", (NOW + Duration::from_mins(1)).as_millis()));
    }

    #[test]
    fn tokens_are_unique() {
        let tokens = Tokens::new(&KEY, "vm");
        assert_ne!(tokens.issue(60, NOW), tokens.issue(60, NOW));
    }

    #[test]
    fn longest_ttl_does_not_overflow() {
        let tokens = Tokens::new(&KEY, "vm");
        let now = Duration::from_secs(u32::MAX.into());
        assert!(tokens.is_valid(tokens.issue(MAX_TTL_SECONDS, now).as_bytes(), now));
    }

    proptest! {
        #[test]
        fn changed_token_is_invalid(at in 0..2 * LEN, byte in any::<u8>()) {
            let tokens = Tokens::new(&KEY, "vm");
            let mut token = tokens.issue(60, NOW).into_bytes();
            let before = std::mem::replace(&mut token[at], byte);
            let same = before.eq_ignore_ascii_case(&byte);
            prop_assert_eq!(tokens.is_valid(&token, NOW), same);
        }

        #[test]
        fn noise_is_not_a_valid_token(noise in prop::collection::vec(any::<u8>(), 0..80)) {
            prop_assert!(!Tokens::new(&KEY, "vm").is_valid(&noise, NOW));
        }
    }
}
