//! Bounds of configuration fields. Each is inclusive.

/// Longest kernel command line in bytes, with its final NUL.
pub const MAX_BOOT_ARGS_LEN: usize = 2048;

/// Most vCPUs of one microVM.
pub const MAX_VCPU_COUNT: u8 = 128;
/// Most memory of one microVM in MiB: 1 TiB.
pub const MAX_MEM_SIZE_MIB: u32 = 1 << 20;

/// Longest `drive_id` in bytes.
pub const MAX_DRIVE_ID_LEN: usize = 64;
/// Most queues of one drive.
pub const MAX_DRIVE_QUEUES: u16 = 32;
/// Smallest queue of a drive, in descriptors.
pub const MIN_DRIVE_QUEUE_SIZE: u16 = 16;
/// Largest queue of a drive, in descriptors.
pub const MAX_DRIVE_QUEUE_SIZE: u16 = 1024;
/// Most layers between the disk of a drive and the overlay that receives its writes.
pub const MAX_OVERLAY_LAYERS: usize = 32;
/// Largest disk of an overlay in MiB: 16 TiB.
pub(crate) const MAX_OVERLAY_SIZE_MIB: u64 = 16 << 20;

/// Longest `iface_id` in bytes.
pub const MAX_IFACE_ID_LEN: usize = 64;
/// Longest name of a tap in bytes: the kernel's `IFNAMSIZ` less the final NUL.
pub const MAX_TAP_NAME_LEN: usize = 15;
/// Smallest `mtu` of a network interface.
pub const MIN_MTU: u16 = 68;
/// Most queue pairs of one network interface.
pub const MAX_QUEUE_PAIRS: u16 = 32;
/// Smallest queue of a network interface, in descriptors.
pub const MIN_NET_QUEUE_SIZE: u16 = 64;
/// Largest queue of a network interface, in descriptors.
pub const MAX_NET_QUEUE_SIZE: u16 = 1024;

/// Longest path of a Unix socket in bytes.
pub const MAX_SOCKET_PATH_LEN: usize = 107;

/// Longest refill time of a token bucket in milliseconds: the most that fits in 64 bits of
/// nanoseconds (584 years).
pub const MAX_REFILL_TIME_MS: u64 = u64::MAX / 1_000_000;

/// Most children of one `PUT /fork`.
pub const MAX_CHILDREN: usize = 1000;

/// Most entries of each list of a CPU template.
pub const MAX_TEMPLATE_ENTRIES: usize = 1024;
