//! The entropy device (5.4): random bytes from the host's kernel.
//!
//! One queue. A request is a chain of writable buffers; it gets up to [`MAX_REQUEST`] bytes. How fast is up to a rate limiter; how
//! long the worker stays with one guest's requests before others get their turn is bounded, too.
//!
//! # Errors
//!
//! A driver that breaks the rules of the queue, or a kernel without random numbers (which none is), makes the device need a reset.

#![forbid(unsafe_code)]

#[cfg(any(test, feature = "testing"))]
pub mod fuzz;
mod task;
#[cfg(test)]
mod tests;

use std::sync::{Arc, Mutex};

use serde::{Deserialize, Serialize};

use sync::EventFd;
use sync::locked;
use task::EntropyTask;
use virtio::device::{ActivateError, Activation, Device, DeviceData, DeviceKind, DeviceState};
use virtio::rate_limiter::{RateLimiter, RateLimiterConfig, RateLimiterState, RateLimiterUpdate};
use virtio::worker::{Nanos, Task};

/// Descriptors in the queue.
const QUEUE_SIZE: u16 = 256;

/// The most bytes that one request gets.
pub const MAX_REQUEST: u32 = 64 << 10;

/// What the device saves.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct EntropyState {
    /// How far its limits are used up.
    pub limiter: RateLimiterState,
}

impl DeviceData for EntropyState {
    const NAME: &'static str = "Entropy";
}

/// What the front, its task and its control share.
#[derive(Debug)]
struct Shared {
    limits: Mutex<Limits>,
}

#[derive(Debug)]
struct Limits {
    limiter: RateLimiter,
    /// The last time that anybody told.
    now: Nanos,
    /// Wakes the task, if there is one.
    kick: Option<Arc<EventFd>>,
}

/// The front of the device.
#[derive(Debug)]
pub struct Entropy {
    shared: Arc<Shared>,
}

/// Changes the device while it works.
#[derive(Debug, Clone)]
pub struct EntropyControl {
    shared: Arc<Shared>,
}

impl Entropy {
    /// A device with these limits at the time `now`.
    pub fn new(limits: RateLimiterConfig, now: Nanos) -> (Self, EntropyControl) {
        Self::with(RateLimiter::new(limits, now), now)
    }

    /// The device as it was saved, at the time `now`.
    pub fn restore(state: &EntropyState, now: Nanos) -> (Self, EntropyControl) {
        Self::with(RateLimiter::restore(&state.limiter, now), now)
    }

    fn with(limiter: RateLimiter, now: Nanos) -> (Self, EntropyControl) {
        let shared = Arc::new(Shared { limits: Mutex::new(Limits { limiter, now, kick: None }) });
        (Entropy { shared: Arc::clone(&shared) }, EntropyControl { shared })
    }
}

impl EntropyControl {
    /// The limits in force.
    pub fn limits(&self) -> RateLimiterConfig {
        locked(&self.shared.limits).limiter.config()
    }

    /// Changes limits at the time `now`. Requests that wait are looked at again.
    pub fn update(&self, update: RateLimiterUpdate, now: Nanos) {
        let mut limits = locked(&self.shared.limits);
        limits.limiter.update(update, now);
        limits.now = now;
        if let Some(kick) = &limits.kick {
            kick.signal();
        }
    }
}

impl Device for Entropy {
    fn kind(&self) -> DeviceKind {
        DeviceKind::Entropy
    }

    fn features(&self) -> u64 {
        0
    }

    fn queue_sizes(&self) -> &[u16] {
        &[QUEUE_SIZE]
    }

    fn read_config(&self, _offset: u64, data: &mut [u8]) {
        // There is no configuration space.
        data.fill(0);
    }

    fn activate(&mut self, mut activation: Activation) -> Result<Vec<Box<dyn Task>>, ActivateError> {
        let queue = activation.take_queue(0)?;
        locked(&self.shared.limits).kick = Some(Arc::clone(&queue.kick));
        Ok(vec![Box::new(EntropyTask::new(queue, activation.interrupt, Arc::clone(&self.shared)))])
    }

    fn reset(&mut self) {
        locked(&self.shared.limits).kick = None;
    }

    fn save(&self) -> DeviceState {
        let limits = locked(&self.shared.limits);
        DeviceState::of(&EntropyState { limiter: limits.limiter.save(limits.now) })
    }
}
