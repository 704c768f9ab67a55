//! Rate limiters and their token buckets, which several devices have.

use serde::{Deserialize, Serialize};

use crate::checks::in_range;
use crate::error::ConfigError;
use crate::limits::MAX_REFILL_TIME_MS;

/// A budget of tokens (bytes or operations) that refills at a steady rate.
///
/// A bucket with `size` 0 or `refill_time` 0 limits nothing.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[cfg_attr(feature = "schema", derive(schemars::JsonSchema))]
#[serde(deny_unknown_fields)]
pub struct TokenBucket {
    /// Tokens in a full bucket.
    pub size: u64,
    /// Extra tokens at the start, on top of `size`. They are never refilled.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub one_time_burst: Option<u64>,
    /// Milliseconds to refill from empty to full, at most [`MAX_REFILL_TIME_MS`].
    #[cfg_attr(feature = "schema", schemars(range(max = MAX_REFILL_TIME_MS)))]
    pub refill_time: u64,
}

impl TokenBucket {
    /// Checks bounds.
    pub fn check(&self) -> Result<(), ConfigError> {
        in_range("refill_time", self.refill_time, 0, MAX_REFILL_TIME_MS)
    }

    /// Whether the bucket limits nothing.
    pub fn is_unlimited(&self) -> bool {
        self.size == 0 || self.refill_time == 0
    }
}

/// Limits on bytes and on operations, independent of each other. A bucket that is absent or null
/// limits nothing.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
#[cfg_attr(feature = "schema", derive(schemars::JsonSchema))]
#[serde(deny_unknown_fields)]
pub struct RateLimiter {
    /// Bucket of bytes.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub bandwidth: Option<TokenBucket>,
    /// Bucket of operations.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub ops: Option<TokenBucket>,
}

impl RateLimiter {
    /// Checks bounds.
    pub fn check(&self) -> Result<(), ConfigError> {
        [self.bandwidth, self.ops].iter().flatten().try_for_each(TokenBucket::check)
    }

    /// Returns `old` with the buckets that `new` has. Those that limit nothing are removed.
    pub(crate) fn updated(old: Option<RateLimiter>, new: Option<RateLimiter>) -> Option<RateLimiter> {
        let Some(new) = new else { return old };
        let old = old.unwrap_or_default();
        RateLimiter { bandwidth: new.bandwidth.or(old.bandwidth), ops: new.ops.or(old.ops) }.in_force()
    }

    /// The buckets that limit something. `None` if there are none.
    pub(crate) fn in_force(self) -> Option<RateLimiter> {
        let [bandwidth, ops] =
            [self.bandwidth, self.ops].map(|bucket| bucket.filter(|bucket| !bucket.is_unlimited()));
        (bandwidth.is_some() || ops.is_some()).then_some(RateLimiter { bandwidth, ops })
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
    fn refill_time_is_bounded_by_64_bits_of_nanoseconds() {
        let bucket = |refill_time| TokenBucket { size: 1, one_time_burst: None, refill_time };
        assert_eq!(bucket(MAX_REFILL_TIME_MS).check(), Ok(()));
        assert!(MAX_REFILL_TIME_MS.checked_mul(1_000_000).is_some());
        assert!(bucket(MAX_REFILL_TIME_MS + 1).check().is_err());
        assert!(RateLimiter { ops: Some(bucket(u64::MAX)), bandwidth: None }.check().is_err());
        assert!(RateLimiter { ops: None, bandwidth: Some(bucket(u64::MAX)) }.check().is_err());
    }

    #[test]
    fn update_replaces_keeps_and_removes_buckets() {
        let bucket = |size, refill_time| Some(TokenBucket { size, one_time_burst: None, refill_time });
        let limiter = |bandwidth, ops| Some(RateLimiter { bandwidth, ops });
        let old = limiter(bucket(1, 1), bucket(2, 2));
        for (new, expected) in [
            (None, old),
            (limiter(None, None), old),
            (limiter(bucket(3, 3), None), limiter(bucket(3, 3), bucket(2, 2))),
            (limiter(None, bucket(0, 5)), limiter(bucket(1, 1), None)),
            (limiter(bucket(5, 0), None), limiter(None, bucket(2, 2))),
            (limiter(bucket(0, 0), bucket(0, 0)), None),
        ] {
            assert_eq!(RateLimiter::updated(old, new), expected, "{new:?}");
        }
        assert_eq!(RateLimiter::updated(None, limiter(bucket(0, 0), None)), None);
        assert_eq!(RateLimiter::updated(None, limiter(None, bucket(1, 1))), limiter(None, bucket(1, 1)));
    }

    #[test]
    fn size_and_refill_time_are_required_and_not_negative() {
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
        fn rate_limiter_round_trips_through_json(
            bandwidth in prop::option::of(bucket()), ops in prop::option::of(bucket()),
        ) {
            let limiter = RateLimiter { bandwidth, ops };
            prop_assert_eq!(limiter.check(), Ok(()));
            let json = serde_json::to_string(&limiter).unwrap();
            prop_assert_eq!(serde_json::from_str::<RateLimiter>(&json).unwrap(), limiter);
        }
    }
}
