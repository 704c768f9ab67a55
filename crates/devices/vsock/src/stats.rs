//! Statistics of the device.

use sync::Counter;

/// Counters that only grow. They are not saved.
#[derive(Debug, Default)]
pub struct VsockStats {
    /// Activations that failed.
    pub activate_fails: Counter,
    /// Kicks of the RX queue (host to guest).
    pub rx_queue_event_count: Counter,
    /// Kicks of the TX queue (guest to host).
    pub tx_queue_event_count: Counter,
    /// Bytes of data sent to the guest.
    pub rx_bytes_count: Counter,
    /// Bytes of data received from the guest.
    pub tx_bytes_count: Counter,
    /// Packets sent to the guest.
    pub rx_packets_count: Counter,
    /// Packets received from the guest.
    pub tx_packets_count: Counter,
    /// Connections that were added, from either side.
    pub conns_added: Counter,
    /// Connections that were reset because of an error, a timeout or a peer that went away.
    pub conns_killed: Counter,
    /// Connections that were removed, for whatever reason.
    pub conns_removed: Counter,
    /// Connections that were refused: a limit was reached, or no host process serves the port.
    pub conns_refused: Counter,
    /// Malformed packets of the guest, and buffers that were too small for a packet.
    pub malformed_count: Counter,
    /// Failed writes to host sockets.
    pub tx_write_fails: Counter,
    /// Failed reads from host sockets.
    pub rx_read_fails: Counter,
}
