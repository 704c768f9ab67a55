//! The entropy device as its transport sees it: its queue, activation, state.

use std::sync::Arc;

use crate::shared::Shared;
use crate::state::EntropyState;
use crate::stats::EntropyStats;
use crate::task::EntropyTask;
use virtio::device::{ActivateError, Activation, Device, DeviceKind, DeviceState};
use virtio::rate_limiter::{RateLimiter, RateLimiterConfig, RateLimiterUpdate};
use virtio::worker::{Nanos, Task};

/// Descriptors in the queue.
const QUEUE_SIZE: u16 = 256;

/// An entropy device.
#[derive(Debug)]
pub struct Entropy {
    shared: Arc<Shared>,
}

/// Changes the rate limits of a running entropy device.
#[derive(Debug, Clone)]
pub struct EntropyControl {
    shared: Arc<Shared>,
}

impl Entropy {
    /// Creates a device with these rate limits. `now` is the current time.
    pub fn new(limits: RateLimiterConfig, now: Nanos) -> (Self, EntropyControl) {
        Self::with(RateLimiter::new(limits, now), now)
    }

    /// Restores a device from its saved state. `now` is the current time.
    pub fn restore(state: &EntropyState, now: Nanos) -> (Self, EntropyControl) {
        Self::with(RateLimiter::restore(&state.limiter, now), now)
    }

    fn with(limiter: RateLimiter, now: Nanos) -> (Self, EntropyControl) {
        let shared = Arc::new(Shared::new(limiter, now));
        (Entropy { shared: Arc::clone(&shared) }, EntropyControl { shared })
    }
}

impl EntropyControl {
    /// The device's counters.
    pub fn stats(&self) -> &Arc<EntropyStats> {
        &self.shared.stats
    }

    /// The current rate limits.
    pub fn limits(&self) -> RateLimiterConfig {
        self.shared.limits().limiter.config()
    }

    /// Changes the rate limits at the time `now`. Delayed requests are checked against the new
    /// limits.
    pub fn update(&self, update: RateLimiterUpdate, now: Nanos) {
        let mut limits = self.shared.limits();
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
        // The device has no configuration space.
        data.fill(0);
    }

    fn activate(&mut self, mut activation: Activation) -> Result<Vec<Box<dyn Task>>, ActivateError> {
        let queue = activation.take_queue(0).inspect_err(|_| {
            self.shared.stats.activate_fails.add(1);
        })?;
        self.shared.limits().kick = Some(Arc::clone(&queue.kick));
        Ok(vec![Box::new(EntropyTask::new(queue, activation.interrupt, Arc::clone(&self.shared)))])
    }

    fn reset(&mut self) {
        self.shared.limits().kick = None;
    }

    fn save(&self) -> DeviceState {
        let limits = self.shared.limits();
        DeviceState::of(&EntropyState { limiter: limits.limiter.save(limits.now) })
    }
}
