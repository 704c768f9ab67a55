//! The header before a frame, `struct virtio_net_hdr_v1` (5.1.6), and the fields of Ethernet that
//! the device reads.

/// Size of the header in bytes. It always has `num_buffers`, also for a driver without `VERSION_1`.
pub(crate) const HEADER_LEN: usize = 12;
/// Offset of `num_buffers`, the number of buffers that a received frame fills.
pub(crate) const NUM_BUFFERS: usize = 10;

/// Size of an Ethernet header in bytes.
pub(crate) const ETHERNET_LEN: usize = 14;

/// Most bytes of a header and its frame. A tap passes IP packets of any length, with a VLAN tag.
pub(crate) const MAX_LEN: usize = HEADER_LEN + crate::interceptor::MAX_FRAME;

/// Source address of a frame that begins with `head`.
pub(crate) fn source_mac(head: &[u8]) -> Option<[u8; 6]> {
    head.get(6..12)?.try_into().ok()
}
