//! The configuration space (5.1.4), and the feature bits of a network device (5.1.3).

use zerocopy::little_endian::U16;
use zerocopy::{Immutable, IntoBytes, KnownLayout};

use virtio::device::ConfigField;

/// Feature bits of a network device (5.1.3).
pub(crate) mod feature {
    /// The driver may leave checksums to the device.
    pub(crate) const CSUM: u64 = 1 << 0;
    /// The device may leave checksums to the driver.
    pub(crate) const GUEST_CSUM: u64 = 1 << 1;
    /// The driver may change the `GUEST_` offloads at run time.
    pub(crate) const CTRL_GUEST_OFFLOADS: u64 = 1 << 2;
    /// The field `mtu` is valid.
    pub(crate) const MTU: u64 = 1 << 3;
    /// The field `mac` is valid.
    pub(crate) const MAC: u64 = 1 << 5;
    /// The driver accepts unsegmented TCP over IPv4.
    pub(crate) const GUEST_TSO4: u64 = 1 << 7;
    /// The driver accepts unsegmented TCP over IPv6.
    pub(crate) const GUEST_TSO6: u64 = 1 << 8;
    /// The driver accepts unsegmented TCP with explicit congestion notification.
    pub(crate) const GUEST_ECN: u64 = 1 << 9;
    /// The driver accepts unfragmented UDP.
    pub(crate) const GUEST_UFO: u64 = 1 << 10;
    /// The device accepts unsegmented TCP over IPv4.
    pub(crate) const HOST_TSO4: u64 = 1 << 11;
    /// The device accepts unsegmented TCP over IPv6.
    pub(crate) const HOST_TSO6: u64 = 1 << 12;
    /// The device accepts unsegmented TCP with explicit congestion notification.
    pub(crate) const HOST_ECN: u64 = 1 << 13;
    /// The device accepts unfragmented UDP.
    pub(crate) const HOST_UFO: u64 = 1 << 14;
    /// A received frame may fill several buffers.
    pub(crate) const MRG_RXBUF: u64 = 1 << 15;
    /// The field `status` is valid.
    pub(crate) const STATUS: u64 = 1 << 16;
    /// There is a control queue.
    pub(crate) const CTRL_VQ: u64 = 1 << 17;
    /// The device can ask the guest to announce itself to the network.
    pub(crate) const GUEST_ANNOUNCE: u64 = 1 << 21;
    /// The device has several queue pairs.
    pub(crate) const MQ: u64 = 1 << 22;
    /// The driver accepts unsegmented UDP over IPv4.
    pub(crate) const GUEST_USO4: u64 = 1 << 54;
    /// The driver accepts unsegmented UDP over IPv6.
    pub(crate) const GUEST_USO6: u64 = 1 << 55;
    /// The device accepts unsegmented UDP.
    pub(crate) const HOST_USO: u64 = 1 << 56;

    /// Offloads that the driver may switch off and on (5.1.6.5.6).
    pub(crate) const GUEST_OFFLOADS: u64 =
        GUEST_CSUM | GUEST_TSO4 | GUEST_TSO6 | GUEST_ECN | GUEST_UFO | GUEST_USO4 | GUEST_USO6;
    /// Offloads with which received frames may be larger than the MTU.
    pub(crate) const GUEST_LARGE: u64 = GUEST_TSO4 | GUEST_TSO6 | GUEST_UFO | GUEST_USO4 | GUEST_USO6;
    /// Offloads that the taps of all supported kernels have.
    pub(crate) const OFFLOADS: u64 = CSUM
        | GUEST_CSUM
        | GUEST_TSO4
        | GUEST_TSO6
        | GUEST_ECN
        | GUEST_UFO
        | HOST_TSO4
        | HOST_TSO6
        | HOST_ECN
        | HOST_UFO;
}

/// `VIRTIO_NET_S_LINK_UP`
pub(crate) const LINK_UP: u16 = 1;
/// `VIRTIO_NET_S_ANNOUNCE`: the guest must announce itself to the network.
pub(crate) const ANNOUNCE: u16 = 2;

/// `struct virtio_net_config` up to the last field that the device uses.
#[derive(Debug, Clone, Copy, IntoBytes, Immutable, KnownLayout)]
#[repr(C)]
pub(crate) struct ConfigSpace {
    pub(crate) mac: [u8; 6],
    pub(crate) status: U16,
    pub(crate) max_virtqueue_pairs: U16,
    pub(crate) mtu: U16,
}

/// The fields that exist only with a feature. The device always shows `mac`.
pub(crate) const FIELDS: [ConfigField; 3] = [
    ConfigField::new(6..8, feature::STATUS),
    ConfigField::new(8..10, feature::MQ),
    ConfigField::new(10..12, feature::MTU),
];

#[cfg(test)]
mod tests {
    use super::*;
    use std::mem::offset_of;

    #[test]
    fn field_offsets_match_the_specification() {
        assert_eq!(offset_of!(ConfigSpace, status), 6);
        assert_eq!(offset_of!(ConfigSpace, max_virtqueue_pairs), 8);
        assert_eq!(offset_of!(ConfigSpace, mtu), 10);
        assert_eq!(size_of::<ConfigSpace>(), 12);
    }
}
