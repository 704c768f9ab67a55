//! Rate limits: two token buckets, one for bytes and one for operations.
//!
//! A bucket holds up to `size` tokens and refills from empty to full in `refill_time`, at a steady rate and without steps: the time
//! that passed is counted to the nanosecond and fractions of tokens are kept, so that over any span the tokens
//! given out are exactly what the rate allows. Beside it stands a one-time burst, spent first and never refilled.
//!
//! A request may be larger than what the bucket holds, or than the bucket: it passes once the bucket is not in debt, and what
//! it took too much is a debt that must refill before the next one passes. So any request gets through, and the rate holds.
//!
//! There is no clock in here: the caller says what time it is, and [`RateLimiter::next_allowed_at`] says when to come back.

use serde::{Deserialize, Serialize};

use crate::worker::Nanos;

/// A bucket as its user describes it.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct BucketConfig {
    /// Most tokens that it holds. 0: no limit.
    pub size: u64,
    /// Milliseconds in which it refills from empty to full. 0: no limit.
    pub refill_time_ms: u64,
    /// Tokens to begin with on top of `size`.
    pub one_time_burst: u64,
}

/// Limits as their user describes them. None: no limit.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct RateLimiterConfig {
    /// Tokens are bytes.
    pub bandwidth: Option<BucketConfig>,
    /// Tokens are requests.
    pub ops: Option<BucketConfig>,
}

/// A change of limits: a bucket that is None stays as it is, one of size 0 or refill time 0 is removed, any other replaces what
/// was there and begins full.
pub type RateLimiterUpdate = RateLimiterConfig;

/// One bucket at one moment.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct BucketState {
    /// As described.
    pub config: BucketConfig,
    /// What is left of the one-time burst.
    pub burst: u64,
    /// Whole tokens in it.
    pub tokens: u64,
    /// Tokens owed (then `tokens` is 0).
    pub debt: u64,
    /// The fraction of a token that it has on top, in parts of the refill time in nanoseconds.
    pub fraction: u64,
}

/// Both buckets at one moment.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct RateLimiterState {
    /// Tokens are bytes.
    pub bandwidth: Option<BucketState>,
    /// Tokens are requests.
    pub ops: Option<BucketState>,
}

#[derive(Debug, Clone, Copy)]
struct Bucket {
    config: BucketConfig,
    burst: u64,
    /// Tokens times `refill_ns`; negative is debt.
    level: i128,
    refill_ns: u64,
    at: Nanos,
}

impl Bucket {
    fn new(config: BucketConfig, now: Nanos) -> Option<Self> {
        if config.size == 0 || config.refill_time_ms == 0 {
            return None;
        }
        let refill_ns = config.refill_time_ms.saturating_mul(1_000_000);
        let mut bucket = Bucket { config, burst: config.one_time_burst, level: 0, refill_ns, at: now };
        bucket.level = bucket.capacity();
        Some(bucket)
    }

    fn restore(state: &BucketState, now: Nanos) -> Option<Self> {
        let mut bucket = Bucket::new(state.config, now)?;
        let refill = i128::from(bucket.refill_ns);
        let whole = i128::from(state.tokens) - i128::from(state.debt);
        // A saved bucket is the file's word: keep it in bounds.
        let level =
            whole.saturating_mul(refill).saturating_add(i128::from(state.fraction.min(bucket.refill_ns)));
        bucket.level = level.min(bucket.capacity());
        bucket.burst = state.burst.min(state.config.one_time_burst);
        Some(bucket)
    }

    fn save(&self, now: Nanos) -> BucketState {
        let mut bucket = *self;
        bucket.refill(now);
        let whole = bucket.level.div_euclid(i128::from(bucket.refill_ns));
        BucketState {
            config: bucket.config,
            burst: bucket.burst,
            tokens: u64::try_from(whole).unwrap_or(0),
            debt: u64::try_from(-whole).unwrap_or(0),
            fraction: bucket.level.rem_euclid(i128::from(bucket.refill_ns)) as u64,
        }
    }

    /// At most (2^64 - 1)^2: a factor of 2 short of what an `i128` holds... see `capacity`'s callers for sums.
    fn capacity(&self) -> i128 {
        i128::try_from(u128::from(self.config.size) * u128::from(self.refill_ns)).unwrap_or(i128::MAX)
    }

    fn refill(&mut self, now: Nanos) {
        let passed = now.saturating_sub(self.at);
        let gained = i128::try_from(u128::from(passed) * u128::from(self.config.size)).unwrap_or(i128::MAX);
        self.level = self.level.saturating_add(gained).min(self.capacity());
        self.at = self.at.max(now);
    }
}
