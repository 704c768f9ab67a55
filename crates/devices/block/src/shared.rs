//! State that the device, its tasks and its control share.

use std::fmt;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex};

use sync::locked;
use virtio::device::Interrupt;
use virtio::rate_limiter::RateLimiter;
use virtio::worker::{Context, Nanos};

use crate::disk::Disk;
use crate::request::SERIAL_LEN;
use crate::stats::BlockStats;

/// State that the device, its tasks and its control share.
#[derive(Debug)]
pub(crate) struct Shared {
    pub(crate) id: String,
    pub(crate) serial: [u8; SERIAL_LEN as usize],
    pub(crate) stats: Arc<BlockStats>,
    pub(crate) limits: Mutex<Limits>,
    /// Whether there is a limit; spares the lock where there is none.
    pub(crate) limited: AtomicBool,
    /// The configuration space differs from what the guest saw before it was saved. Raises an
    /// interrupt when the device is restored.
    pub(crate) config_changed: AtomicBool,
    pub(crate) live: Mutex<LiveState>,
}

#[derive(Debug)]
pub(crate) struct Limits {
    pub(crate) limiter: RateLimiter,
    /// The time of the last use.
    pub(crate) now: Nanos,
}

/// The state that a disk swap, an activation or a reset changes.
pub(crate) struct LiveState {
    pub(crate) disk: Disk,
    pub(crate) generation: u32,
    pub(crate) interrupt: Option<Arc<dyn Interrupt>>,
}

impl Shared {
    /// Whether the rate limits let a request of `bytes` pass. If not, sets the timer to when they
    /// will.
    pub(crate) fn allow(&self, cx: &mut Context<'_>, bytes: u64) -> bool {
        if !self.limited.load(Ordering::Acquire) {
            return true;
        }
        let now = cx.now();
        let mut limits = locked(&self.limits);
        limits.now = now;
        if limits.limiter.try_take(bytes, now) {
            return true;
        }
        if let Some(at) = limits.limiter.next_allowed_at(bytes, now) {
            cx.set_timer(at);
        }
        false
    }
}

impl fmt::Debug for LiveState {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("LiveState").field("disk", &self.disk).finish_non_exhaustive()
    }
}
