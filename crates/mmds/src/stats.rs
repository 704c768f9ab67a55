//! What a metadata service counts, under the names that Firecracker's metrics have.

use std::sync::atomic::{AtomicU64, Ordering};

/// A count that only grows.
#[derive(Debug, Default)]
pub struct Counter(AtomicU64);

impl Counter {
    /// So many more.
    pub fn add(&self, count: u64) {
        self.0.fetch_add(count, Ordering::Relaxed);
    }

    /// How many so far.
    pub fn get(&self) -> u64 {
        self.0.load(Ordering::Relaxed)
    }
}

/// The counts of a microVM's metadata service, all its interfaces together.
#[derive(Debug, Default)]
pub struct Stats {
    /// Frames of guests that were for the service and were used.
    pub rx_accepted: Counter,
    /// Of these, the ones that were broken in some way and dropped.
    pub rx_accepted_err: Counter,
    /// Of these, the ones that were whole and unexpected: fragments, segments to other ports.
    pub rx_accepted_unusual: Counter,
    /// Frames that were not even Ethernet.
    pub rx_bad_eth: Counter,
    /// Requests with a token that is none or is over.
    pub rx_invalid_token: Counter,
    /// Requests without a token.
    pub rx_no_token: Counter,
    /// Frames that guests sent to the service.
    pub rx_count: Counter,
    /// Bytes of frames to guests.
    pub tx_bytes: Counter,
    /// Frames to guests: TCP segments and ARP replies.
    pub tx_frames: Counter,
    /// Frames to guests that could not be sent: their receiver is not known any more.
    pub tx_errors: Counter,
    /// Times that the service had something to send.
    pub tx_count: Counter,
    /// Connections accepted.
    pub connections_created: Counter,
    /// Connections that are no more.
    pub connections_destroyed: Counter,
}
