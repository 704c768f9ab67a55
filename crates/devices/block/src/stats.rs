//! Counters of a block device.

use sync::{Counter, Latency};

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
    /// Changes of the disk that failed.
    pub update_fails: Counter,
    /// Activations that failed.
    pub activate_fails: Counter,
    /// Kicks of queues that turned out to be empty.
    pub no_avail_buffer: Counter,
    /// Times that the disk had too much in flight to take a request.
    pub engine_throttled_events: Counter,
    /// Requests that were left in a queue each time that a request was held back.
    pub remaining_reqs_count: Counter,
    /// Time from when a read was taken from its queue until it was complete.
    pub read_latency: Latency,
    /// The same of writes.
    pub write_latency: Latency,
}

impl BlockStats {
    /// Counts a request that succeeded after `ns` nanoseconds.
    pub(crate) fn count(&self, kind: RequestKind, ns: u64) {
        match kind {
            RequestKind::Read { bytes } => {
                self.read_count.add(1);
                self.read_bytes.add(bytes);
                self.read_latency.record(ns);
            }
            RequestKind::Write { bytes } => {
                self.write_count.add(1);
                self.write_bytes.add(bytes);
                self.write_latency.record(ns);
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
