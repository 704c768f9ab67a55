//! A kernel and an initrd in guest memory.

use std::ops::Range;

use super::setup_header::SetupHeader;

/// A kernel in guest memory.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct LoadedKernel {
    /// How the kernel is entered.
    pub(super) entry: Entry,
    /// The memory that the kernel occupies or needs at its entry.
    pub(super) used: Vec<Range<u64>>,
    /// End of the kernel in the first region of guest memory, where an initrd goes.
    pub(super) end: u64,
    /// The highest end address of an initrd.
    pub(super) initrd_limit: u64,
}

/// How a kernel is entered.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Entry {
    /// By the PVH protocol, at this address.
    Pvh(u64),
    /// By the Linux 64-bit protocol, at this address, with the header of a `bzImage`.
    Linux64 { address: u64, header: Option<SetupHeader> },
}

/// An initrd in guest memory.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Initrd {
    pub(super) start: u64,
    pub(super) len: u64,
}
