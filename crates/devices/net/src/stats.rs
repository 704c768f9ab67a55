//! Counters of a network device.

use sync::{Counter, Latency};

/// Counters that only grow, summed over all queues.
#[derive(Debug, Default)]
pub struct NetStats {
    /// Frames that the guest received.
    pub rx_packets_count: Counter,
    /// Bytes of these frames.
    pub rx_bytes_count: Counter,
    /// Frames for the guest that were dropped because they did not fit in its receive buffers.
    pub rx_fails: Counter,
    /// Frames for the guest that were dropped because a rate limit would deliver them too late.
    pub rx_late_frames: Counter,
    /// Times that the guest had no receive buffers left.
    pub no_rx_avail_buffer: Counter,
    /// Kicks of receive queues.
    pub rx_queue_event_count: Counter,
    /// Times that a backend became readable.
    pub rx_tap_event_count: Counter,
    /// Times that the rate limiter delayed a frame for the guest.
    pub rx_rate_limiter_throttled: Counter,
    /// Reads of a backend that failed.
    pub tap_read_fails: Counter,

    /// Frames that the guest sent to the network.
    pub tx_packets_count: Counter,
    /// Bytes of these frames.
    pub tx_bytes_count: Counter,
    /// Frames from the guest that the backend did not accept.
    pub tap_write_fails: Counter,
    /// Frames from the guest that were too short, too long, or in too many buffers.
    pub tx_malformed_frames: Counter,
    /// Frames from the guest that were dropped because their source MAC is not the guest's.
    pub tx_spoofed_mac_count: Counter,
    /// Kicks of transmit queues.
    pub tx_queue_event_count: Counter,
    /// Times that the rate limiter delayed a frame from the guest.
    pub tx_rate_limiter_throttled: Counter,
    /// Frames from the guest that the [interceptor](crate::FrameInterceptor) took.
    pub intercepted_tx_count: Counter,
    /// Frames of the interceptor that the guest received.
    pub intercepted_rx_count: Counter,

    /// Control commands that failed.
    pub ctrl_fails: Counter,
    /// Times that a delay of a frame for the guest by the rate limiter ended.
    pub rx_rate_limiter_event_count: Counter,
    /// Times that a delay of a frame from the guest by the rate limiter ended.
    pub tx_rate_limiter_event_count: Counter,
    /// Kicks of transmit queues that turned out to be empty.
    pub no_tx_avail_buffer: Counter,
    /// Frames that were left in a transmit queue each time that a frame had to wait.
    pub tx_remaining_reqs_count: Counter,
    /// Time to pass a frame on, averaged over the frames that were sent in one go.
    pub tap_write_latency: Latency,
    /// Changes of the rate limits.
    pub update_count: Counter,
    /// Activations that failed.
    pub activate_fails: Counter,
}
