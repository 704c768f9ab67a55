//! Counters of the metadata service, named as in Firecracker's metrics.

use sync::Counter;

/// Counters of one microVM's metadata service, summed over its interfaces.
#[derive(Debug, Default)]
pub struct Stats {
    /// Frames to the service with a valid Ethernet header.
    pub rx_accepted: Counter,
    /// Accepted frames that were malformed, or arrived while the queue to the guest was full;
    /// dropped.
    pub rx_accepted_err: Counter,
    /// Accepted frames that were well-formed and unexpected: fragments, segments to other ports.
    pub rx_accepted_unusual: Counter,
    /// Frames that were too short for Ethernet.
    pub rx_bad_eth: Counter,
    /// Requests with an invalid or expired token.
    pub rx_invalid_token: Counter,
    /// Requests without a token.
    pub rx_no_token: Counter,
    /// Frames that the guest sent to the service.
    pub rx_count: Counter,
    /// Bytes of frames to the guest.
    pub tx_bytes: Counter,
    /// Frames to the guest: TCP segments and ARP replies.
    pub tx_frames: Counter,
    /// Frames to the guest that were dropped because the neighbor table no longer had the receiver.
    pub tx_errors: Counter,
    /// Times that a poll of the TCP stack left frames for the guest.
    pub tx_count: Counter,
    /// Connections accepted.
    pub connections_created: Counter,
    /// Connections ended.
    pub connections_destroyed: Counter,
}
