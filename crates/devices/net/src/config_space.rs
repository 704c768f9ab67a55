//! The configuration space (5.1.4) and the features that say which of its fields count.

use zerocopy::little_endian::U16;
use zerocopy::{Immutable, IntoBytes, KnownLayout};

use virtio::device::ConfigField;

/// Feature bits of a network device (5.1.3).
pub(super) mod feature {
    /// The guest may leave checksums to the device.
    pub(crate) const CSUM: u64 = 1 << 0;
    /// The device may leave checksums to the guest.
    pub(crate) const GUEST_CSUM: u64 = 1 << 1;
    /// What the device may leave to the guest can be changed.
    pub(crate) const CTRL_GUEST_OFFLOADS: u64 = 1 << 2;
    /// `mtu` counts.
    pub(crate) const MTU: u64 = 1 << 3;
    /// `mac` counts.
    pub(crate) const MAC: u64 = 1 << 5;
    /// The guest takes TCP over IPv4 unsegmented.
    pub(crate) const GUEST_TSO4: u64 = 1 << 7;
    /// The guest takes TCP over IPv6 unsegmented.
    pub(crate) const GUEST_TSO6: u64 = 1 << 8;
    /// The guest takes unsegmented TCP with explicit congestion notification.
    pub(crate) const GUEST_ECN: u64 = 1 << 9;
    /// The guest takes UDP unfragmented.
    pub(crate) const GUEST_UFO: u64 = 1 << 10;
    /// The device takes TCP over IPv4 unsegmented.
    pub(crate) const HOST_TSO4: u64 = 1 << 11;
    /// The device takes TCP over IPv6 unsegmented.
    pub(crate) const HOST_TSO6: u64 = 1 << 12;
    /// The device takes unsegmented TCP with explicit congestion notification.
    pub(crate) const HOST_ECN: u64 = 1 << 13;
    /// The device takes UDP unfragmented.
    pub(crate) const HOST_UFO: u64 = 1 << 14;
    /// A received frame may fill several buffers.
    pub(crate) const MRG_RXBUF: u64 = 1 << 15;
    /// `status` counts.
    pub(crate) const STATUS: u64 = 1 << 16;
    /// There is a control queue.
    pub(crate) const CTRL_VQ: u64 = 1 << 17;
    /// The guest can be asked to announce itself.
    pub(crate) const GUEST_ANNOUNCE: u64 = 1 << 21;
    /// There are several pairs of queues.
    pub(crate) const MQ: u64 = 1 << 22;
    /// The guest takes UDP over IPv4 unsegmented.
    pub(crate) const GUEST_USO4: u64 = 1 << 54;
    /// The guest takes UDP over IPv6 unsegmented.
    pub(crate) const GUEST_USO6: u64 = 1 << 55;
    /// The device takes UDP unsegmented.
    pub(crate) const HOST_USO: u64 = 1 << 56;

    /// What the driver may switch off and on again (5.1.6.5.6).
    pub(crate) const GUEST_OFFLOADS: u64 =
        GUEST_CSUM | GUEST_TSO4 | GUEST_TSO6 | GUEST_ECN | GUEST_UFO | GUEST_USO4 | GUEST_USO6;
    /// What makes frames larger than the MTU.
    pub(crate) const GUEST_LARGE: u64 = GUEST_TSO4 | GUEST_TSO6 | GUEST_UFO | GUEST_USO4 | GUEST_USO6;
    /// What any kernel's tap does.
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
pub(super) const LINK_UP: u16 = 1;
/// `VIRTIO_NET_S_ANNOUNCE`: the guest is to announce itself.
pub(super) const ANNOUNCE: u16 = 2;

/// `struct virtio_net_config`, as far as the device has any use for it.
#[derive(Debug, Clone, Copy, IntoBytes, Immutable, KnownLayout)]
#[repr(C)]
pub(super) struct ConfigSpace {
    pub(super) mac: [u8; 6],
    pub(super) status: U16,
    pub(super) max_virtqueue_pairs: U16,
    pub(super) mtu: U16,
}

/// The fields that exist only with a feature. `mac` always exists.
pub(super) const FIELDS: [ConfigField; 3] = [
    ConfigField::new(6..8, feature::STATUS),
    ConfigField::new(8..10, feature::MQ),
    ConfigField::new(10..12, feature::MTU),
];

#[cfg(test)]
mod tests {
    use super::*;
    use std::mem::offset_of;

    #[test]
    fn fields_stand_where_the_specification_puts_them() {
        assert_eq!(offset_of!(ConfigSpace, status), 6);
        assert_eq!(offset_of!(ConfigSpace, max_virtqueue_pairs), 8);
        assert_eq!(offset_of!(ConfigSpace, mtu), 10);
        assert_eq!(size_of::<ConfigSpace>(), 12);
    }
}
