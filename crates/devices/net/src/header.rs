//! What stands before a frame in a buffer: `struct virtio_net_hdr_v1` (5.1.6), and the few fields of Ethernet that the device reads.

/// Bytes of the header. With version 1 of the specification `num_buffers` is always there.
pub(super) const HEADER_LEN: usize = 12;
/// Where `num_buffers` stands: the number of buffers that a received frame fills.
pub(super) const NUM_BUFFERS: usize = 10;

/// Bytes of an Ethernet header.
pub(super) const ETHERNET_LEN: usize = 14;

/// The most bytes of header and frame in one. A tap takes and gives packets of IP's greatest length with a VLAN tag.
pub(super) const MAX_LEN: usize = HEADER_LEN + super::interceptor::MAX_FRAME;

/// The sender's address in a frame that begins with `head`.
pub(super) fn source_mac(head: &[u8]) -> Option<[u8; 6]> {
    head.get(6..12)?.try_into().ok()
}
