//! Errors of a virtqueue.

use memory::iovec::OutsideRam;

use super::limits::MAX_CHAIN_LEN;

/// How the driver broke the rules of a queue (2.7). The queue is dead from then on.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum QueueError {
    /// The size is not a power of two, or larger than the device offers.
    #[error("invalid queue size: {size}; a power of two from 1 to {max}")]
    Size {
        /// The driver's size.
        size: u16,
        /// The largest size.
        max: u16,
    },
    /// A ring or table is not aligned (2.7).
    #[error("{area}: unaligned address: {addr:#x}; a multiple of {align}")]
    Unaligned {
        /// The area: descriptor table, available ring or used ring.
        area: &'static str,
        /// Guest address of the area.
        addr: u64,
        /// The alignment in bytes.
        align: u64,
    },
    /// A ring or table is not in RAM, or in several regions.
    #[error("{area}: not in guest memory: {len} bytes at {addr:#x}")]
    RingOutsideRam {
        /// The area: descriptor table, available ring or used ring.
        area: &'static str,
        /// Guest address of the area.
        addr: u64,
        /// Its length in bytes.
        len: u64,
    },
    /// More chains were made available than the queue has descriptors.
    #[error("invalid available index: {to}, after {from}; the queue has {size} descriptors")]
    AvailableIndex {
        /// The device's index.
        from: u16,
        /// The driver's index.
        to: u16,
        /// Size of the queue.
        size: u16,
    },
    /// A chain was made available again before it was used.
    #[error("chain {0}: made available while in flight")]
    InFlight(u16),
    /// A descriptor's index is not in its table.
    #[error("invalid descriptor index: {index}; the table has {len} entries")]
    DescriptorIndex {
        /// The index.
        index: u32,
        /// Entries in the table.
        len: u32,
    },
    /// A chain has a loop, or too many descriptors.
    #[error("a chain has a loop, or more than {max} descriptors", max = MAX_CHAIN_LEN)]
    ChainTooLong,
    /// A chain has 2^32 bytes or more.
    #[error("a chain has 2^32 bytes or more")]
    ChainTooLarge,
    /// A readable descriptor follows a writable one (2.7.4.2).
    #[error("a readable descriptor follows a writable one")]
    ReadableAfterWritable,
    /// A buffer is not in RAM, or in several regions.
    #[error("a buffer is not in guest memory: {len} bytes at {addr:#x}")]
    BufferOutsideRam {
        /// Its guest-physical address.
        addr: u64,
        /// Its length in bytes.
        len: u32,
    },
    /// An indirect table is not allowed, has an invalid size, or is not in RAM.
    #[error("indirect table: {0}")]
    Indirect(&'static str),
    /// The device used a chain that is not in flight: a fault of the device, not of the driver.
    #[error("chain {0}: used while not in flight")]
    NotInFlight(u16),
}

impl From<OutsideRam> for QueueError {
    fn from(OutsideRam { addr, len }: OutsideRam) -> Self {
        // The length of a queue's buffer has 32 bits.
        QueueError::BufferOutsideRam { addr, len: u32::try_from(len).unwrap_or(u32::MAX) }
    }
}
