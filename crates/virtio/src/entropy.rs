//! Virtio entropy (5.4).

use serde::{Deserialize, Serialize};

use crate::rate_limiter::RateLimiterState;

/// What a source of entropy saves.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct EntropyState {
    /// How far its limits are used up.
    pub limiter: RateLimiterState,
}
