//! Counters of an entropy device.

use sync::Counter;

/// Counters that only grow. They are not saved.
#[derive(Debug, Default)]
pub struct EntropyStats {
    /// Activations that failed.
    pub activate_fails: Counter,
    /// Times that the queue could not be served any further, after which the device needs a reset.
    pub entropy_event_fails: Counter,
    /// Requests that were served.
    pub entropy_event_count: Counter,
    /// Random bytes that the guest got.
    pub entropy_bytes: Counter,
    /// Times that the host's kernel had no random bytes.
    pub host_rng_fails: Counter,
    /// Times that the rate limiter held a request back.
    pub entropy_rate_limiter_throttled: Counter,
    /// Times that a delay by the rate limiter ended.
    pub rate_limiter_event_count: Counter,
}
