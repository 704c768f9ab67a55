//! What a network device counts.

use sync::Counter;

/// Counters that only grow, over all queues.
#[derive(Debug, Default)]
pub struct NetStats {
    /// Frames that the guest received.
    pub rx_packets_count: Counter,
    /// Their bytes.
    pub rx_bytes_count: Counter,
    /// Frames for the guest that were dropped: too large for its buffers, or it gave none for too long.
    pub rx_fails: Counter,
    /// Frames for the guest that were dropped: a limit would have delivered them too late.
    pub rx_late_frames: Counter,
    /// Times that the guest had no receive buffers left.
    pub no_rx_avail_buffer: Counter,
    /// Kicks of receive queues.
    pub rx_queue_event_count: Counter,
    /// Times that the network had frames.
    pub rx_tap_event_count: Counter,
    /// Times that the limiter held a frame for the guest back.
    pub rx_rate_limiter_throttled: Counter,
    /// Frames that could not be read.
    pub tap_read_fails: Counter,

    /// Frames that the guest sent to the network.
    pub tx_packets_count: Counter,
    /// Their bytes.
    pub tx_bytes_count: Counter,
    /// Frames that the network did not take.
    pub tap_write_fails: Counter,
    /// Frames that are none: too short or too long.
    pub tx_malformed_frames: Counter,
    /// Frames that were dropped because their sender's address is not the guest's.
    pub tx_spoofed_mac_count: Counter,
    /// Kicks of transmit queues.
    pub tx_queue_event_count: Counter,
    /// Times that the limiter held a frame of the guest back.
    pub tx_rate_limiter_throttled: Counter,
    /// Frames that a [interceptor](super::FrameInterceptor) took.
    pub detour_tx_count: Counter,
    /// Frames from it that the guest received.
    pub detour_rx_count: Counter,

    /// Commands of the driver that made no sense.
    pub ctrl_fails: Counter,
    /// Times that the limiter's timer came.
    pub rate_limiter_event_count: Counter,
    /// Limits that were replaced.
    pub update_count: Counter,
    /// Activations that failed.
    pub activate_fails: Counter,
}
