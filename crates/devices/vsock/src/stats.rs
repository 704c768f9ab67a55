//! What a socket device counts.

use std::sync::atomic::{AtomicU64, Ordering};

/// Counters that only grow.
#[derive(Debug, Default)]
pub struct VsockStats {
    /// Activations that failed.
    pub activate_fails: Counter,
    /// Kicks of the queue to the guest.
    pub rx_queue_event_count: Counter,
    /// Kicks of the queue from the guest.
    pub tx_queue_event_count: Counter,
    /// Bytes of data to the guest.
    pub rx_bytes_count: Counter,
    /// Bytes of data from the guest.
    pub tx_bytes_count: Counter,
    /// Packets to the guest.
    pub rx_packets_count: Counter,
    /// Packets from the guest.
    pub tx_packets_count: Counter,
    /// Connections that were opened, from either side.
    pub conns_added: Counter,
    /// Connections that were reset because a side broke the rules, was too slow or went away.
    pub conns_killed: Counter,
    /// Connections that are gone, however they ended.
    pub conns_removed: Counter,
    /// Connections that were refused: there was no room for them, or nobody on the host who serves them.
    pub conns_refused: Counter,
    /// Packets and buffers of the guest that made no sense.
    pub malformed_count: Counter,
    /// Writes to host sockets that failed.
    pub tx_write_fails: Counter,
    /// Reads from host sockets that failed.
    pub rx_read_fails: Counter,
}

/// A number that threads add to.
#[derive(Debug, Default)]
pub struct Counter(AtomicU64);

impl Counter {
    /// Its value.
    pub fn get(&self) -> u64 {
        self.0.load(Ordering::Relaxed)
    }

    pub(super) fn add(&self, count: u64) {
        self.0.fetch_add(count, Ordering::Relaxed);
    }
}
