//! State that the entropy device shares with its task and with
//! [`EntropyControl`](crate::EntropyControl).

use std::sync::{Arc, Mutex, MutexGuard};

use crate::stats::EntropyStats;
use sync::EventFd;
use sync::locked;
use virtio::rate_limiter::RateLimiter;
use virtio::worker::Nanos;

/// State that the device, its task and its control share.
#[derive(Debug)]
pub(crate) struct Shared {
    limits: Mutex<Limits>,
    pub(crate) stats: Arc<EntropyStats>,
}

/// The rate limiter of the device.
#[derive(Debug)]
pub(crate) struct Limits {
    pub(crate) limiter: RateLimiter,
    /// The latest time that a caller passed. The state is saved as of this time.
    pub(crate) now: Nanos,
    /// Kick of the queue, to wake the task. None: no driver uses the device.
    pub(crate) kick: Option<Arc<EventFd>>,
}

impl Shared {
    pub(crate) fn new(limiter: RateLimiter, now: Nanos) -> Self {
        Shared { limits: Mutex::new(Limits { limiter, now, kick: None }), stats: Arc::default() }
    }

    pub(crate) fn limits(&self) -> MutexGuard<'_, Limits> {
        locked(&self.limits)
    }
}
