//! Saved state of the entropy device.

use serde::{Deserialize, Serialize};

use virtio::device::DeviceData;
use virtio::rate_limiter::RateLimiterState;

/// Saved state of the entropy device.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct EntropyState {
    /// State of its rate limiter.
    pub limiter: RateLimiterState,
}

impl DeviceData for EntropyState {
    const NAME: &'static str = "Entropy";
}
