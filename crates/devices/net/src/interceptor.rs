//! Frames that never reach the network: what serves them instead.
//!
//! A service that answers the guest itself (the metadata service) stands in the way of what the guest sends. It is asked first for each
//! frame; one that it takes goes no further. What it wants to say to the guest comes back through the receive queue, as if it had come
//! from the network. Neither counts for the interface's limits.
//!
//! # Who calls
//!
//! The task that serves the interface's first pair of queues, and nobody else: one call at a time, always from an io worker. No method may
//! wait for anything. Between [`FrameInterceptor::push`] and the guest's reading of the answer no other thread is involved.
//!
//! # Frames
//!
//! Whole Ethernet frames without any header before them and without a check sequence behind. What the guest sends is the guest's
//! word: anything, of any length up to [`MAX_FRAME`]. The checksum of its TCP or UDP header may be missing (the guest leaves it
//! to the device), and a TCP segment may be larger than the connection's MSS; both only say that they never were on a wire. What goes to the
//! guest has its checksums and fits in the interface's MTU.

use virtio::worker::Nanos;

/// Bytes of a frame that [`FrameInterceptor::wants`] is shown, as far as the frame has them: the headers of Ethernet, and of ARP or of IPv4
/// with its addresses.
pub const HEAD_LEN: usize = 64;

/// The longest frame in bytes: an Ethernet header with a VLAN tag, and an IP packet of the greatest length.
pub const MAX_FRAME: usize = 18 + 65535;

/// Something that takes some of a guest's frames and answers them. See the module.
pub trait FrameInterceptor: Send {
    /// Whether the frame that begins with `head` is for it. The others go to the network.
    ///
    /// It is asked with the first [`HEAD_LEN`] bytes, before the source address of the frame is checked.
    fn wants(&self, head: &[u8]) -> bool;

    /// Takes a frame that it wants, sent at `now`. One that it has no room for it drops, as a network would.
    fn push(&mut self, frame: &[u8], now: Nanos);

    /// Writes the next frame for the guest to `frame`, which is empty, and says whether there was one.
    ///
    /// Called until it says no, after each [`push`](FrameInterceptor::push), when [`deadline`](FrameInterceptor::deadline) has come, and when the guest has
    /// given new receive buffers after it had none. While the guest has no room nothing is asked for.
    fn pop(&mut self, frame: &mut Vec<u8>, now: Nanos) -> bool;

    /// When [`pop`](FrameInterceptor::pop) is to be called even if nothing happens before: a retransmission, a time limit. None: not at all.
    /// Asked each time after [`pop`](FrameInterceptor::pop) said no.
    fn deadline(&mut self, now: Nanos) -> Option<Nanos>;

    /// The guest's driver has begun anew, or another guest goes on from a saved state: its connections are gone.
    fn reset(&mut self);
}
