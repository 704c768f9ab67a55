//! Budget of a device's ioctls that take the host kernel's RTNL lock.
//!
//! The whole host shares that lock: `ip`, every other monitor's set-up, the host's own routing. A
//! driver causes such ioctls by control commands, by resets, and by starting with other features
//! than before. Without a bound it could keep the lock busy in a loop. Here one device makes
//! [`BURST`] of them at once and [`BURST`] in each [`REFILL_MS`] after that. What comes later waits
//! for its time: a command is answered when it is carried out, and a device that starts serves its
//! queues when its tap has its settings.

use virtio::rate_limiter::{BucketConfig, RateLimiter, RateLimiterConfig};
use virtio::worker::Nanos;

/// Ioctls at once. More than one change of the largest number of queues.
pub(super) const BURST: u64 = 128;
/// Time in which the budget refills, in milliseconds.
pub(super) const REFILL_MS: u64 = 2000;

/// Ioctls that a device may make.
#[derive(Debug)]
pub(super) struct CallBudget {
    limiter: RateLimiter,
}

impl CallBudget {
    /// A full budget.
    pub(super) fn new(now: Nanos) -> Self {
        let bucket = BucketConfig { size: BURST, refill_time_ms: REFILL_MS, one_time_burst: 0 };
        // Each ioctl is a byte to the limiter.
        let config = RateLimiterConfig { bandwidth: Some(bucket), ops: None };
        CallBudget { limiter: RateLimiter::new(config, now) }
    }

    /// Takes `calls` from the budget, or says when to ask again.
    pub(super) fn take(&mut self, calls: u32, now: Nanos) -> Result<(), Nanos> {
        if calls == 0 || self.limiter.try_take(calls.into(), now) {
            return Ok(());
        }
        self.limiter.next_allowed_at(calls.into(), now).map_or(Ok(()), Err)
    }
}
