//! What can be wrong with a queue.

use super::MAX_CHAIN_LEN;

/// How the driver broke the rules of a queue. The queue is dead from then on.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum QueueError {
    /// The size is not a power of two from 1 to what the device offers.
    #[error("queue size {size} is not a power of two from 1 to {max}")]
    Size {
        /// What the driver chose.
        size: u16,
        /// What the device offers.
        max: u16,
    },
    /// A ring or table is not aligned as 2.7 demands.
    #[error("the {area} is at {addr:#x}, which is not a multiple of {align}")]
    Unaligned {
        /// Which one.
        area: &'static str,
        /// Where the driver put it.
        addr: u64,
        /// What it must be a multiple of.
        align: u64,
    },
    /// A ring or table is not all in RAM.
    #[error("the {area} at {addr:#x} ({len} bytes) is not in guest memory")]
    RingOutsideRam {
        /// Which one.
        area: &'static str,
        /// Where the driver put it.
        addr: u64,
        /// How long it is.
        len: u64,
    },
    /// More chains were made available than the queue has room for.
    #[error("the available index jumped from {from} to {to} in a queue of {size}")]
    AvailableIndex {
        /// Where the device was.
        from: u16,
        /// What the driver wrote.
        to: u16,
        /// Size of the queue.
        size: u16,
    },
    /// A chain was made available again before it was used.
    #[error("chain {0} was made available while it is in flight")]
    InFlight(u16),
    /// A descriptor's index is not in its table.
    #[error("descriptor {index} is outside its table of {len}")]
    DescriptorIndex {
        /// The index.
        index: u32,
        /// Entries in the table.
        len: u32,
    },
    /// A chain is longer than any may be, most likely because it goes in circles.
    #[error("a chain is longer than {max} descriptors, or goes in circles", max = MAX_CHAIN_LEN)]
    ChainTooLong,
    /// A chain describes 2^32 bytes or more.
    #[error("a chain describes 2^32 bytes or more")]
    ChainTooLarge,
    /// A readable descriptor follows a writable one (2.7.4.2).
    #[error("a readable descriptor follows a writable one")]
    ReadableAfterWritable,
    /// A buffer is not all in one region of RAM.
    #[error("the buffer at {addr:#x} ({len} bytes) is not in guest memory")]
    BufferOutsideRam {
        /// Where.
        addr: u64,
        /// How long.
        len: u32,
    },
    /// An indirect table where none may be, or of a wrong size, or not in RAM.
    #[error("an indirect table {0}")]
    Indirect(&'static str),
    /// A device used a chain that is not in flight. The device's mistake, not the driver's.
    #[error("chain {0} was used, but is not in flight")]
    NotInFlight(u16),
}
