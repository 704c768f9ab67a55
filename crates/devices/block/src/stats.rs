//! Counters of a block device.

use sync::Counter;

use crate::in_flight::RequestKind;

/// Counters; they only grow.
#[derive(Debug, Default)]
pub struct BlockStats {
    /// Reads that succeeded.
    pub read_count: Counter,
    /// Bytes read.
    pub read_bytes: Counter,
    /// Writes that succeeded.
    pub write_count: Counter,
    /// Bytes written.
    pub write_bytes: Counter,
    /// Flushes that succeeded.
    pub flush_count: Counter,
    /// Discards and write-zeroes that succeeded.
    pub discard_count: Counter,
    /// Requests that the disk failed.
    pub execute_fails: Counter,
    /// Requests that were malformed or unsupported.
    pub invalid_reqs_count: Counter,
    /// Kicks of the queues.
    pub queue_event_count: Counter,
    /// Times that the rate limiter held a request back.
    pub rate_limiter_throttled_events: Counter,
    /// Times that the rate limiter's timer expired.
    pub rate_limiter_event_count: Counter,
    /// Changes of the disk or the limits.
    pub update_count: Counter,
    /// Activations that failed.
    pub activate_fails: Counter,
}

impl BlockStats {
    /// Counts a request that succeeded.
    pub(crate) fn count(&self, kind: RequestKind) {
        match kind {
            RequestKind::Read { bytes } => {
                self.read_count.add(1);
                self.read_bytes.add(bytes);
            }
            RequestKind::Write { bytes } => {
                self.write_count.add(1);
                self.write_bytes.add(bytes);
            }
            RequestKind::Flush => {
                self.flush_count.add(1);
            }
            RequestKind::Discard => {
                self.discard_count.add(1);
            }
        }
    }
}
