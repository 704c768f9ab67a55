//! Rate limits: token buckets, as every device that moves data takes them.

use serde::{Deserialize, Serialize};

use crate::{ConfigError, in_range};

/// Longest refill time in milliseconds: what still fits in 64 bits of nanoseconds (584 years).
pub const MAX_REFILL_TIME_MS: u64 = u64::MAX / 1_000_000;

/// A budget of tokens (bytes or operations) that refills at a steady rate.
///
/// A bucket of no size, or with no refill time, limits nothing.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct TokenBucket {
    /// Most tokens that it holds.
    pub size: u64,
    /// Tokens to begin with that are on top of `size` and never refilled.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub one_time_burst: Option<u64>,
    /// Milliseconds in which it refills from empty to full, at most [`MAX_REFILL_TIME_MS`].
    pub refill_time: u64,
}

impl TokenBucket {
    /// Checks bounds.
    pub fn check(&self) -> Result<(), ConfigError> {
        in_range("refill_time", self.refill_time, 0, MAX_REFILL_TIME_MS)
    }

    /// Whether it limits nothing.
    pub fn is_unlimited(&self) -> bool {
        self.size == 0 || self.refill_time == 0
    }
}

/// Limits on bytes and on operations, independent of each other. No limit where absent or null.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct RateLimiter {
    /// Tokens are bytes.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub bandwidth: Option<TokenBucket>,
    /// Tokens are operations.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub ops: Option<TokenBucket>,
}

impl RateLimiter {
    /// Checks bounds.
    pub fn check(&self) -> Result<(), ConfigError> {
        [self.bandwidth, self.ops].iter().flatten().try_for_each(TokenBucket::check)
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn bucket() -> impl Strategy<Value = TokenBucket> {
        (any::<u64>(), any::<Option<u64>>(), 0..=MAX_REFILL_TIME_MS)
            .prop_map(|(size, one_time_burst, refill_time)| TokenBucket { size, one_time_burst, refill_time })
    }

    #[test]
    fn empty_and_null_limiters_limit_nothing() {
        for json in ["{}", r#"{"bandwidth":null,"ops":null}"#] {
            assert_eq!(serde_json::from_str::<RateLimiter>(json).unwrap(), RateLimiter::default(), "{json}");
        }
    }

    #[test]
    fn the_longest_refill_time_fits_in_nanoseconds_and_one_more_is_refused() {
        let bucket = |refill_time| TokenBucket { size: 1, one_time_burst: None, refill_time };
        assert_eq!(bucket(MAX_REFILL_TIME_MS).check(), Ok(()));
        assert!(MAX_REFILL_TIME_MS.checked_mul(1_000_000).is_some());
        assert!(bucket(MAX_REFILL_TIME_MS + 1).check().is_err());
        assert!(RateLimiter { ops: Some(bucket(u64::MAX)), bandwidth: None }.check().is_err());
        assert!(RateLimiter { ops: None, bandwidth: Some(bucket(u64::MAX)) }.check().is_err());
    }

    #[test]
    fn size_and_refill_time_are_needed_and_negative_numbers_refused() {
        for (json, named) in [
            (r#"{"size":1}"#, "`refill_time`"),
            (r#"{"refill_time":1}"#, "`size`"),
            (r#"{"size":-1,"refill_time":1}"#, "`-1`"),
            (r#"{"size":1,"refill_time":1,"burst":1}"#, "`burst`"),
        ] {
            let error = serde_json::from_str::<TokenBucket>(json).unwrap_err().to_string();
            assert!(error.contains(named), "{error}");
        }
    }

    proptest! {
        #[test]
        fn a_limiter_in_bounds_comes_back_the_same(
            bandwidth in prop::option::of(bucket()), ops in prop::option::of(bucket()),
        ) {
            let limiter = RateLimiter { bandwidth, ops };
            prop_assert_eq!(limiter.check(), Ok(()));
            let json = serde_json::to_string(&limiter).unwrap();
            prop_assert_eq!(serde_json::from_str::<RateLimiter>(&json).unwrap(), limiter);
        }
    }
}
