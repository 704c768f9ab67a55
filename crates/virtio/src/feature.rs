//! Feature bits of the ring and the transport (chapter 6).

/// `VIRTIO_F_INDIRECT_DESC`: the driver may use indirect descriptors.
pub const RING_INDIRECT_DESC: u64 = 1 << 28;
/// `VIRTIO_F_EVENT_IDX`: each side sets the index at which it wants a notification.
pub const RING_EVENT_IDX: u64 = 1 << 29;
/// `VIRTIO_F_VERSION_1`. Always offered. A driver that does not accept it is served in the same
/// way.
pub const VERSION_1: u64 = 1 << 32;
