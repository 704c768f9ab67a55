//! Bounds of queues and chains.

/// The largest queue that a device may offer.
pub const MAX_QUEUE_SIZE: u16 = 1024;

/// The most descriptors of a chain, those of an indirect table included.
///
/// A driver must not exceed the size of the queue (2.7.5.3.1). This is the largest size, for
/// drivers that count an indirect table as one descriptor.
pub const MAX_CHAIN_LEN: usize = MAX_QUEUE_SIZE as usize;
