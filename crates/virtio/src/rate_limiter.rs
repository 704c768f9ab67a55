//! Rate limits: two token buckets, one for bytes and one for operations.
//!
//! A bucket holds up to `size` tokens and refills from empty to full in `refill_time`. Refilling is
//! continuous: time counts in nanoseconds and fractions of tokens are kept, so that over any span
//! the tokens given out are exactly those of the rate. A one-time burst is spent first and not
//! refilled.
//!
//! A request passes if the bucket holds enough tokens. A request larger than the bucket passes when
//! there is no debt, and the missing tokens become a debt that refills first: later requests wait
//! in proportion. So every request passes some time, and the rate holds.
//!
//! A timer wakes a request that waits, and timers are late. The tokens that flow in between the
//! time at which the request could have passed and the time at which it asks again count even if
//! the bucket is full, up to [`LATENESS`]. Otherwise a bucket of the size of one request would give
//! less than its rate.
//!
//! There is no clock here: the caller passes the time, and [`RateLimiter::next_allowed_at`] returns
//! when to ask again.

use serde::{Deserialize, Serialize};

use crate::worker::Nanos;

/// The longest delay of a timer that costs no tokens, in nanoseconds.
pub const LATENESS: Nanos = 100_000_000;

/// The configuration of a bucket.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct BucketConfig {
    /// The most tokens. 0 means no limit.
    pub size: u64,
    /// The time in milliseconds to refill an empty bucket. 0 means no limit.
    pub refill_time_ms: u64,
    /// Additional tokens at the start, not refilled.
    pub one_time_burst: u64,
}

/// The configuration of a rate limiter. `None` means no limit.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct RateLimiterConfig {
    /// Tokens are bytes.
    pub bandwidth: Option<BucketConfig>,
    /// Tokens are requests.
    pub ops: Option<BucketConfig>,
}

/// A change of limits. `None` keeps a bucket. Size 0 or refill time 0 removes it. Any other
/// replaces it by a full bucket.
pub type RateLimiterUpdate = RateLimiterConfig;

/// The saved state of a bucket.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct BucketState {
    /// Its configuration.
    pub config: BucketConfig,
    /// The rest of the one-time burst.
    pub burst: u64,
    /// Whole tokens.
    pub tokens: u64,
    /// The debt in tokens. If it is not 0, `tokens` is 0.
    pub debt: u64,
    /// The fraction of a token, in units of one token divided by the refill time in nanoseconds.
    pub fraction: u64,
}

/// The saved state of a rate limiter.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct RateLimiterState {
    /// Tokens are bytes.
    pub bandwidth: Option<BucketState>,
    /// Tokens are requests.
    pub ops: Option<BucketState>,
}

/// A rate limiter with a bucket for bytes and one for operations.
#[derive(Debug, Clone, Copy, Default)]
pub struct RateLimiter {
    bandwidth: Option<Bucket>,
    ops: Option<Bucket>,
}

impl RateLimiter {
    /// Creates a rate limiter whose buckets are full.
    pub fn new(config: RateLimiterConfig, now: Nanos) -> Self {
        let bucket = |config: Option<BucketConfig>| config.and_then(|config| Bucket::new(config, now));
        RateLimiter { bandwidth: bucket(config.bandwidth), ops: bucket(config.ops) }
    }

    /// Restores a rate limiter. The time since the save does not count.
    pub fn restore(state: &RateLimiterState, now: Nanos) -> Self {
        let bucket = |state: Option<BucketState>| state.and_then(|state| Bucket::restore(&state, now));
        RateLimiter { bandwidth: bucket(state.bandwidth), ops: bucket(state.ops) }
    }

    /// Returns the state at `now`.
    pub fn save(&self, now: Nanos) -> RateLimiterState {
        let state = |bucket: Option<Bucket>| bucket.map(|bucket| bucket.save(now));
        RateLimiterState { bandwidth: state(self.bandwidth), ops: state(self.ops) }
    }

    /// The current configuration.
    pub fn config(&self) -> RateLimiterConfig {
        RateLimiterConfig {
            bandwidth: self.bandwidth.map(|bucket| bucket.config),
            ops: self.ops.map(|bucket| bucket.config),
        }
    }

    /// Changes the limits.
    pub fn update(&mut self, update: RateLimiterUpdate, now: Nanos) {
        if let Some(config) = update.bandwidth {
            self.bandwidth = Bucket::new(config, now);
        }
        if let Some(config) = update.ops {
            self.ops = Bucket::new(config, now);
        }
    }

    /// Whether there is no limit at all.
    pub fn is_unlimited(&self) -> bool {
        self.bandwidth.is_none() && self.ops.is_none()
    }

    /// Takes the tokens of one request of `bytes`, if both buckets allow it. Otherwise neither
    /// bucket changes; [`RateLimiter::next_allowed_at`] returns when to ask again.
    pub fn try_take(&mut self, bytes: u64, now: Nanos) -> bool {
        if self.next_allowed_at(bytes, now).is_some() {
            return false;
        }
        self.charge(bytes);
        true
    }

    /// Takes the tokens of one request of `bytes` in any case, for requests whose size is known
    /// only afterwards. Missing tokens become a debt.
    pub fn charge(&mut self, bytes: u64) {
        if let Some(bucket) = &mut self.bandwidth {
            bucket.take(bytes);
        }
        if let Some(bucket) = &mut self.ops {
            bucket.take(1);
        }
    }

    /// The earliest time, rounded up to a nanosecond, at which a request of `bytes` may pass if no
    /// other passes before. `None` if it may pass now.
    pub fn next_allowed_at(&mut self, bytes: u64, now: Nanos) -> Option<Nanos> {
        let bandwidth = self.bandwidth.as_mut().and_then(|bucket| bucket.allowed_at(bytes, now));
        let ops = self.ops.as_mut().and_then(|bucket| bucket.allowed_at(1, now));
        bandwidth.max(ops)
    }
}

/// A bucket with fractions of tokens.
///
/// `level` is in tokens times `refill_ns`. It grows by `size` per nanosecond, so nothing is
/// rounded. It saturates where it would overflow (a bucket of 2^63 tokens that refills in
/// centuries).
#[derive(Debug, Clone, Copy)]
struct Bucket {
    config: BucketConfig,
    burst: u64,
    /// Negative values are debt.
    level: i128,
    refill_ns: u64,
    /// The time of `level`.
    at: Nanos,
    /// The time at which the waiting request may pass.
    due: Option<Nanos>,
}

impl Bucket {
    fn new(config: BucketConfig, now: Nanos) -> Option<Self> {
        if config.size == 0 || config.refill_time_ms == 0 {
            return None;
        }
        let refill_ns = config.refill_time_ms.saturating_mul(1_000_000);
        let level = product(config.size, refill_ns);
        Some(Bucket { config, burst: config.one_time_burst, level, refill_ns, at: now, due: None })
    }

    fn restore(state: &BucketState, now: Nanos) -> Option<Self> {
        let mut bucket = Bucket::new(state.config, now)?;
        // The state comes from a file: keep it in bounds.
        let fraction = i128::from(state.fraction.min(bucket.refill_ns - 1));
        let owned = product(state.tokens, bucket.refill_ns);
        let owed = product(state.debt, bucket.refill_ns);
        bucket.level = owned.saturating_sub(owed).saturating_add(fraction).min(bucket.level);
        bucket.burst = state.burst.min(state.config.one_time_burst);
        Some(bucket)
    }

    fn save(mut self, now: Nanos) -> BucketState {
        self.refill(now);
        let refill_ns = i128::from(self.refill_ns);
        let level = self.level.min(product(self.config.size, self.refill_ns));
        let tokens = level.div_euclid(refill_ns);
        BucketState {
            config: self.config,
            burst: self.burst,
            tokens: u64::try_from(tokens).unwrap_or(0),
            debt: u64::try_from(-tokens).unwrap_or(0),
            fraction: level.rem_euclid(refill_ns).unsigned_abs() as u64,
        }
    }

    fn refill(&mut self, now: Nanos) {
        let full = product(self.config.size, self.refill_ns);
        let mut most = full;
        if let Some(due) = self.due.take_if(|due| *due <= now) {
            self.flow_until(due, full);
            // The bucket may be full, but a request was waiting.
            let late = (now - due).min(LATENESS);
            most = full.max(self.level.saturating_add(product(late, self.config.size)));
        }
        self.flow_until(now, most);
    }

    /// Refills up to `most`. Does nothing if it holds more already.
    fn flow_until(&mut self, now: Nanos, most: i128) {
        let gained = product(now.saturating_sub(self.at), self.config.size);
        self.level = self.level.saturating_add(gained).min(most.max(self.level));
        self.at = self.at.max(now);
    }

    /// When `tokens` may be taken. `None` means now.
    fn allowed_at(&mut self, tokens: u64, now: Nanos) -> Option<Nanos> {
        self.refill(now);
        let tokens = tokens.saturating_sub(self.burst);
        if tokens == 0 {
            return None;
        }
        // A request larger than the bucket passes when there is no debt, and leaves one.
        let needed = if tokens > self.config.size { 0 } else { product(tokens, self.refill_ns) };
        let missing = needed.saturating_sub(self.level);
        if missing <= 0 {
            return None;
        }
        let wait = missing.unsigned_abs().div_ceil(self.config.size.into());
        self.due = Some(self.at.saturating_add(u64::try_from(wait).unwrap_or(u64::MAX)));
        self.due
    }

    fn take(&mut self, tokens: u64) {
        self.due = None;
        let from_burst = tokens.min(self.burst);
        self.burst -= from_burst;
        self.level = self.level.saturating_sub(product(tokens - from_burst, self.refill_ns));
    }
}

fn product(a: u64, b: u64) -> i128 {
    i128::try_from(u128::from(a) * u128::from(b)).unwrap_or(i128::MAX)
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    const MS: Nanos = 1_000_000;
    const SECOND: Nanos = 1_000 * MS;

    fn bucket(size: u64, refill_time_ms: u64) -> BucketConfig {
        BucketConfig { size, refill_time_ms, one_time_burst: 0 }
    }

    fn bytes_only(config: BucketConfig) -> RateLimiterConfig {
        RateLimiterConfig { bandwidth: Some(config), ops: None }
    }

    /// Takes `bytes` at a time for `span`, as a device with a timer does. Returns the total, and
    /// how often it waited.
    fn run(limiter: &mut RateLimiter, bytes: u64, from: Nanos, span: Nanos, late: Nanos) -> (u64, u64) {
        let (mut now, mut passed, mut waits) = (from, 0, 0);
        while now < from + span {
            if limiter.try_take(bytes, now) {
                passed += bytes;
            } else {
                now = limiter.next_allowed_at(bytes, now).unwrap() + late;
                waits += 1;
            }
        }
        (passed, waits)
    }

    #[test]
    fn ten_seconds_of_any_rate_are_exact_within_one_percent() {
        for (size, refill_time_ms, request) in [
            (1 << 20, 1000, 4096),     // 1 MiB/s
            (10, 1000, 1),             // 10 operations a second
            (1, 100, 1),               // 10 operations a second, no burst
            (1 << 30, 100, 128 << 10), // 10 GiB/s
            (4096, 1, 4096),           // 4 MB/s in steps of a millisecond
            (1000, 7, 3),              // nothing divides
            (50_000, 10, 1 << 20),     // requests larger than the bucket
        ] {
            let mut limiter = RateLimiter::new(bytes_only(bucket(size, refill_time_ms)), 0);
            // Start empty: the first fill is not part of the rate.
            while limiter.try_take(1.max(size / 1000), 0) {}
            let (passed, _) = run(&mut limiter, request, 0, 10 * SECOND, 0);
            let want = size * 10_000 / refill_time_ms;
            let slack = request.max(want / 100);
            let range = want - slack..=want + slack;
            assert!(
                range.contains(&passed),
                "{size} per {refill_time_ms} ms by {request}: {passed}, not {want}"
            );
        }
    }

    #[test]
    fn late_timer_costs_no_tokens_of_a_one_request_bucket() {
        for (size, refill_time_ms, request, late) in [
            (1_000_000, 10, 4096, 200_000),
            (1, 1, 1, 80_000),
            (4096, 1, 4096, 2 * MS),
            (1, 100, 1, 9 * MS),
            (1, 1000, 1, 99 * MS),
        ] {
            let mut limiter = RateLimiter::new(bytes_only(bucket(size, refill_time_ms)), 0);
            let (passed, _) = run(&mut limiter, request, 0, 10 * SECOND, late);
            let want = size + size * 10_000 / refill_time_ms;
            assert!(
                passed.abs_diff(want) <= want / 100 + 1,
                "{size} per {refill_time_ms} ms: {passed}, not {want}"
            );
        }
    }

    #[test]
    fn waiting_long_after_a_refusal_gives_a_full_bucket_and_no_more() {
        let mut limiter = RateLimiter::new(bytes_only(bucket(1000, 1000)), 0);
        assert!(limiter.try_take(1000, 0) && !limiter.try_take(1, 0));
        let (passed, _) = run(&mut limiter, 1, 100 * SECOND, 1, 0);
        assert_eq!(passed, 1000);
    }

    #[test]
    fn the_one_time_burst_is_spent_first_and_never_comes_back() {
        let config = BucketConfig { one_time_burst: 1000, ..bucket(100, 1000) };
        let mut limiter = RateLimiter::new(bytes_only(config), 0);
        assert!(limiter.try_take(1000, 0));
        assert!(limiter.try_take(100, 0), "the bucket is still full");
        assert!(!limiter.try_take(1, 0));
        let much_later = 1000 * SECOND;
        assert!(limiter.try_take(100, much_later));
        assert_eq!(limiter.next_allowed_at(100, much_later), Some(much_later + SECOND));
    }

    #[test]
    fn request_larger_than_the_bucket_delays_later_ones() {
        let mut limiter = RateLimiter::new(bytes_only(bucket(100, 1000)), 0);
        assert!(limiter.try_take(350, 0));
        // The debt is 250, and the next request needs 50 more: 3 seconds.
        assert!(!limiter.try_take(50, 0));
        assert_eq!(limiter.next_allowed_at(50, 0), Some(3 * SECOND));
        assert!(!limiter.try_take(50, 3 * SECOND - 1));
        assert!(limiter.try_take(50, 3 * SECOND));
    }

    #[test]
    fn requests_whose_size_is_known_only_afterwards_keep_the_rate() {
        for (size, refill_time_ms, request) in [(1 << 20, 1000, 1514), (1000, 100, 65_000), (10, 1000, 60)] {
            let mut limiter = RateLimiter::new(bytes_only(bucket(size, refill_time_ms)), 0);
            let (mut now, mut passed) = (0, 0);
            while now < 100 * SECOND {
                match limiter.next_allowed_at(1, now) {
                    Some(at) => now = at,
                    None => {
                        limiter.charge(request);
                        passed += request;
                    }
                }
            }
            let want = size + size * 100_000 / refill_time_ms;
            assert!(passed.abs_diff(want) <= want / 100 + request, "{size}: {passed}, not {want}");
        }
    }

    #[test]
    fn a_request_that_one_bucket_refuses_costs_the_other_nothing() {
        let config = RateLimiterConfig { bandwidth: Some(bucket(100, 1000)), ops: Some(bucket(1, 1000)) };
        let mut limiter = RateLimiter::new(config, 0);
        assert!(limiter.try_take(10, 0));
        assert!(!limiter.try_take(10, 0));
        let state = limiter.save(0);
        assert_eq!((state.bandwidth.unwrap().tokens, state.ops.unwrap().tokens), (90, 0));
    }

    #[test]
    fn an_update_replaces_removes_or_leaves_each_bucket() {
        let config = RateLimiterConfig { bandwidth: Some(bucket(100, 1000)), ops: Some(bucket(1, 1000)) };
        let mut limiter = RateLimiter::new(config, 0);
        limiter.update(RateLimiterUpdate { bandwidth: None, ops: Some(bucket(0, 0)) }, 0);
        assert_eq!(limiter.config(), bytes_only(bucket(100, 1000)));
        limiter.update(bytes_only(bucket(7, 1000)), 0);
        assert_eq!(limiter.config(), bytes_only(bucket(7, 1000)));
        limiter.update(bytes_only(bucket(7, 0)), 0);
        assert!(limiter.is_unlimited());
        assert!(limiter.try_take(u64::MAX, 0));
    }

    #[test]
    fn a_clock_that_steps_back_gives_nothing_and_takes_nothing() {
        let mut limiter = RateLimiter::new(bytes_only(bucket(100, 1000)), 10 * SECOND);
        assert!(limiter.try_take(100, 10 * SECOND));
        assert!(!limiter.try_take(1, 0));
        assert!(!limiter.try_take(100, 10 * SECOND));
        assert!(limiter.try_take(100, 11 * SECOND));
    }

    /// A simple reference bucket with exact fractions.
    struct Model {
        config: BucketConfig,
        burst: i128,
        /// Tokens times the refill time.
        level: i128,
        at: i128,
        /// When the last refused request could have passed.
        due: Option<i128>,
    }

    impl Model {
        fn unit(&self) -> i128 {
            i128::from(self.config.refill_time_ms) * i128::from(MS)
        }

        fn try_take(&mut self, tokens: u64, now: Nanos) -> bool {
            let (now, size, tokens) = (i128::from(now), i128::from(self.config.size), i128::from(tokens));
            let full = size * self.unit();
            // Up to `most`, or not at all if it holds more already.
            let flow = |level: i128, time: i128, most: i128| level + (time * size).min((most - level).max(0));
            if let Some(due) = self.due.filter(|due| *due <= now) {
                self.level = flow(self.level, due - self.at, full);
                let late = (now - due).min(LATENESS.into());
                self.level = flow(self.level, now - due, full.max(self.level + late * size));
                self.due = None;
            } else {
                self.level = flow(self.level, now - self.at, full);
            }
            self.at = now;
            let rest = (tokens - self.burst).max(0);
            let needed = if rest > size { 0 } else { rest };
            let missing = needed * self.unit() - self.level;
            if rest > 0 && missing > 0 {
                self.due = Some(now + (missing + size - 1) / size);
                return false;
            }
            self.due = None;
            self.burst -= tokens - rest;
            self.level -= rest * self.unit();
            true
        }
    }

    fn any_bucket() -> impl Strategy<Value = BucketConfig> {
        (1u64..10_000_000, 1u64..10_000, prop_oneof![Just(0), 0u64..1_000_000]).prop_map(
            |(size, refill_time_ms, one_time_burst)| BucketConfig { size, refill_time_ms, one_time_burst },
        )
    }

    proptest! {
        #[test]
        fn it_does_what_the_plain_model_does_also_across_saves(
            config in any_bucket(),
            steps in prop::collection::vec((0u64..20_000_000, 0u64..3 * SECOND, any::<bool>()), 1..60),
        ) {
            let mut limiter = RateLimiter::new(bytes_only(config), 0);
            let mut model = Model {
                config,
                burst: config.one_time_burst.into(),
                level: i128::from(config.size) * i128::from(config.refill_time_ms) * i128::from(MS),
                at: 0,
                due: None,
            };
            let mut now = 0;
            for (tokens, wait, save) in steps {
                now += wait;
                if save {
                    limiter = RateLimiter::restore(&limiter.save(now), now);
                    model.try_take(0, now);
                    model.level = model.level.min(i128::from(config.size) * model.unit());
                    model.due = None;
                }
                let next = limiter.next_allowed_at(tokens, now);
                let taken = limiter.try_take(tokens, now);
                prop_assert_eq!(taken, model.try_take(tokens, now));
                prop_assert_eq!(taken, next.is_none());
                if let Some(at) = next {
                    prop_assert!(!limiter.try_take(tokens, at - 1) && !model.try_take(tokens, at - 1));
                    // Asking for the time refills too.
                    prop_assert!(limiter.next_allowed_at(tokens, at).is_none());
                    model.try_take(0, at);
                    now = at;
                }
            }
        }

        #[test]
        fn no_numbers_overflow(
            size: u64, refill_time_ms: u64, one_time_burst: u64,
            tokens: u64, debt: u64, fraction: u64, burst: u64,
            takes in prop::collection::vec((any::<u64>(), any::<u64>()), 0..8),
        ) {
            let config = BucketConfig { size, refill_time_ms, one_time_burst };
            let state = BucketState { config, burst, tokens, debt, fraction };
            let mut limiter = RateLimiter::restore(
                &RateLimiterState { bandwidth: Some(state), ops: Some(state) }, 0);
            for (bytes, now) in takes {
                let _ = limiter.try_take(bytes, now);
                let _ = limiter.save(now);
            }
        }

        #[test]
        fn a_saved_limiter_comes_back_the_same(config in any_bucket(), tokens in 0u64..20_000_000, at in 0u64..SECOND) {
            let mut limiter = RateLimiter::new(bytes_only(config), 0);
            limiter.try_take(tokens, 0);
            let state = limiter.save(at);
            prop_assert_eq!(RateLimiter::restore(&state, 77).save(77), state);
        }
    }
}
