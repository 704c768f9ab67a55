//! Budget of a device's ioctls that take the host kernel's RTNL lock.
//!
//! The whole host shares that lock: `ip`, the set-up of every other monitor, the host's own
//! routing. A driver causes such ioctls by control commands, by resets, and by starting with other
//! features than before. Without a bound it could keep the lock busy in a loop. One device makes
//! at most [`BURST`] of these ioctls at once, and [`BURST`] in each [`REFILL_MS`] after that. Later
//! ones are delayed: a command completes when it is carried out, and a device that starts serves
//! its queues when its tap has the driver's settings.

use virtio::rate_limiter::{BucketConfig, RateLimiter, RateLimiterConfig};
use virtio::worker::Nanos;

/// Most ioctls at once. A change of all queues of the largest device needs fewer.
pub(crate) const BURST: u64 = 128;
/// Time in which an empty budget refills, in milliseconds.
pub(crate) const REFILL_MS: u64 = 2000;

/// Number of ioctls under RTNL that a device may make.
#[derive(Debug)]
pub(crate) struct RtnlBudget {
    limiter: RateLimiter,
}

impl RtnlBudget {
    /// A full budget.
    pub(crate) fn new(now: Nanos) -> Self {
        let bucket = BucketConfig { size: BURST, refill_time_ms: REFILL_MS, one_time_burst: 0 };
        // The limiter counts each ioctl as a byte.
        let config = RateLimiterConfig { bandwidth: Some(bucket), ops: None };
        RtnlBudget { limiter: RateLimiter::new(config, now) }
    }

    /// Takes `ioctls` from the budget. The error is the time at which to try again.
    pub(crate) fn take(&mut self, ioctls: u32, now: Nanos) -> Result<(), Nanos> {
        if ioctls == 0 || self.limiter.try_take(ioctls.into(), now) {
            return Ok(());
        }
        self.limiter.next_allowed_at(ioctls.into(), now).map_or(Ok(()), Err)
    }
}
