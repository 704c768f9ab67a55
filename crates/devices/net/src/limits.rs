//! The limits of one direction, which the tasks of all queues share.

use std::sync::Mutex;
use std::sync::atomic::{AtomicBool, Ordering};

use sync::locked;
use virtio::rate_limiter::{RateLimiter, RateLimiterConfig, RateLimiterState, RateLimiterUpdate};
use virtio::worker::Nanos;

#[derive(Debug)]
pub(super) struct Limits {
    /// Whether there are any: spares the lock where there are none.
    limited: AtomicBool,
    inner: Mutex<Inner>,
}

#[derive(Debug)]
struct Inner {
    limiter: RateLimiter,
    /// The last time that anybody told.
    now: Nanos,
}

impl Limits {
    pub(super) fn new(limiter: RateLimiter, now: Nanos) -> Self {
        Limits {
            limited: AtomicBool::new(!limiter.is_unlimited()),
            inner: Mutex::new(Inner { limiter, now }),
        }
    }

    /// Whether there is any limit.
    pub(super) fn are_set(&self) -> bool {
        self.limited.load(Ordering::Acquire)
    }

    /// Lets a frame of `bytes` pass, or says when to ask again.
    pub(super) fn take(&self, bytes: usize, now: Nanos) -> Result<(), Nanos> {
        let mut inner = locked(&self.inner);
        inner.now = now;
        if inner.limiter.try_take(bytes as u64, now) {
            return Ok(());
        }
        inner.limiter.next_allowed_at(bytes as u64, now).map_or(Ok(()), Err)
    }

    /// Whether a frame may come whose size nobody knows yet, or when to ask again.
    pub(super) fn may_come(&self, now: Nanos) -> Result<(), Nanos> {
        let mut inner = locked(&self.inner);
        inner.now = now;
        inner.limiter.next_allowed_at(1, now).map_or(Ok(()), Err)
    }

    /// `bytes` have passed in a frame, whether there was enough left for it or not: what is missing is owed.
    pub(super) fn owe(&self, bytes: usize) {
        locked(&self.inner).limiter.charge(bytes as u64);
    }

    /// What is saved from now on is as of `now`.
    pub(super) fn hold(&self, now: Nanos) {
        locked(&self.inner).now = now;
    }

    pub(super) fn config(&self) -> RateLimiterConfig {
        locked(&self.inner).limiter.config()
    }

    pub(super) fn update(&self, update: RateLimiterUpdate, now: Nanos) {
        let mut inner = locked(&self.inner);
        inner.limiter.update(update, now);
        inner.now = now;
        self.limited.store(!inner.limiter.is_unlimited(), Ordering::Release);
    }

    pub(super) fn save(&self) -> RateLimiterState {
        let inner = locked(&self.inner);
        inner.limiter.save(inner.now)
    }
}
