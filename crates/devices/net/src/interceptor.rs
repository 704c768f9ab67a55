//! The interceptor of frames: a service that takes some of a guest's frames and replies to them.
//!
//! A service such as the metadata service sits between the guest and the network. The device asks
//! it about each frame that the guest sends. A frame that it takes does not reach the network. Its
//! replies reach the guest through the receive queue, as if they came from the network. The rate
//! limits of the interface apply to neither.
//!
//! # Threads
//!
//! Only the task of the interface's first queue pair calls the interceptor, from an io worker, one
//! call at a time. No method may block. The device calls [`FrameInterceptor::reset`] while no task
//! uses it.
//!
//! # Frames
//!
//! Frames are whole Ethernet frames without a header before them and without a check sequence after
//! them. What the guest sends is not trusted: any bytes, of any length up to [`MAX_FRAME`]. The
//! checksum of a TCP or UDP header may be missing, because the guest leaves it to the device. A TCP
//! segment may be larger than the connection's MSS. Replies must have their checksums and fit in
//! the MTU of the interface.

use virtio::worker::Nanos;

/// Most bytes of a frame that [`FrameInterceptor::wants`] gets: the headers of Ethernet, and of ARP
/// or of IPv4 with its addresses.
pub const HEAD_LEN: usize = 64;

/// Most bytes of a frame: an Ethernet header with a VLAN tag, and an IP packet of maximum length.
pub const MAX_FRAME: usize = 18 + 65535;

/// Takes some of a guest's frames and replies to them. See the module.
pub trait FrameInterceptor: Send {
    /// Whether it takes the frame that begins with `head`. Other frames go to the network.
    ///
    /// `head` has the first [`HEAD_LEN`] bytes of the frame, or all of a shorter one. The source
    /// address of the frame is not checked yet.
    fn wants(&self, head: &[u8]) -> bool;

    /// Takes a frame that it wants, sent at `now`. It drops the frame if its buffers are full, as a
    /// network would.
    fn push(&mut self, frame: &[u8], now: Nanos);

    /// Appends the next frame for the guest to `frame`, which is empty. False: there is none.
    ///
    /// The device calls it until it returns false: after each [`push`](FrameInterceptor::push), at
    /// the [`deadline`](FrameInterceptor::deadline), and when the guest adds receive buffers after
    /// it had none. While the guest has no receive buffers, the device keeps one frame and does not
    /// call it again.
    fn pop(&mut self, frame: &mut Vec<u8>, now: Nanos) -> bool;

    /// When the device must call [`pop`](FrameInterceptor::pop) even if nothing else happens, such
    /// as for a retransmission. None: never. The device asks each time after
    /// [`pop`](FrameInterceptor::pop) has returned false.
    fn deadline(&mut self, now: Nanos) -> Option<Nanos>;

    /// Drops all connections: the guest's driver has reset the device.
    fn reset(&mut self);
}
