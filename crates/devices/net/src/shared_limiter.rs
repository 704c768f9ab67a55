//! The rate limiter of one direction, which the tasks of all queue pairs share.

use std::sync::Mutex;
use std::sync::atomic::{AtomicBool, Ordering};

use sync::locked;
use virtio::rate_limiter::{RateLimiter, RateLimiterConfig, RateLimiterState, RateLimiterUpdate};
use virtio::worker::Nanos;

/// A rate limiter that several tasks use.
#[derive(Debug)]
pub(crate) struct SharedLimiter {
    /// Whether any limit is set. Without one, the tasks take no lock.
    limited: AtomicBool,
    inner: Mutex<Inner>,
}

#[derive(Debug)]
struct Inner {
    limiter: RateLimiter,
    /// The latest time that a caller passed. The state is saved as of this time.
    now: Nanos,
}

impl SharedLimiter {
    pub(crate) fn new(limiter: RateLimiter, now: Nanos) -> Self {
        SharedLimiter {
            limited: AtomicBool::new(!limiter.is_unlimited()),
            inner: Mutex::new(Inner { limiter, now }),
        }
    }

    /// Whether any limit is set.
    pub(crate) fn is_limited(&self) -> bool {
        self.limited.load(Ordering::Acquire)
    }

    /// Takes tokens for a frame of `bytes`. The error is the time at which to try again.
    pub(crate) fn take(&self, bytes: usize, now: Nanos) -> Result<(), Nanos> {
        let mut inner = locked(&self.inner);
        inner.now = now;
        if inner.limiter.try_take(bytes as u64, now) {
            return Ok(());
        }
        inner.limiter.next_allowed_at(bytes as u64, now).map_or(Ok(()), Err)
    }

    /// Whether a frame of unknown size may pass. The error is the time at which to try again.
    ///
    /// Takes no tokens: [`SharedLimiter::charge`] does, when the size is known.
    pub(crate) fn check(&self, now: Nanos) -> Result<(), Nanos> {
        let mut inner = locked(&self.inner);
        inner.now = now;
        inner.limiter.next_allowed_at(1, now).map_or(Ok(()), Err)
    }

    /// Takes tokens for a frame of `bytes` that has passed. Missing tokens become a debt.
    pub(crate) fn charge(&self, bytes: usize) {
        locked(&self.inner).limiter.charge(bytes as u64);
    }

    /// Sets the time as of which the state is saved.
    pub(crate) fn set_time(&self, now: Nanos) {
        locked(&self.inner).now = now;
    }

    pub(crate) fn config(&self) -> RateLimiterConfig {
        locked(&self.inner).limiter.config()
    }

    pub(crate) fn update(&self, update: RateLimiterUpdate, now: Nanos) {
        let mut inner = locked(&self.inner);
        inner.limiter.update(update, now);
        inner.now = now;
        self.limited.store(!inner.limiter.is_unlimited(), Ordering::Release);
    }

    pub(crate) fn save(&self) -> RateLimiterState {
        let inner = locked(&self.inner);
        inner.limiter.save(inner.now)
    }
}
