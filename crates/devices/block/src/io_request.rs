//! Requests for a disk, and the tags of the transfers that carry them out.

use std::ops::RangeInclusive;

use memory::iovec::GuestIoVec;

/// An operation on a disk.
#[derive(Debug)]
pub enum Request {
    /// Fill the buffers from the offset on.
    Read(GuestIoVec),
    /// Write the buffers from the offset on.
    Write(GuestIoVec),
    /// The range is not needed any more. It reads as zeros where its space can be given back.
    Discard {
        /// Length in bytes.
        len: u64,
    },
    /// The range reads as zeros.
    WriteZeroes {
        /// Length in bytes.
        len: u64,
        /// Whether the space of the range may be given back.
        unmap: bool,
    },
    /// What was written becomes durable. No effect where flushes do not wait for the disk.
    Flush,
}

/// Identifies a request to the caller.
pub type Token = u32;

/// What a transfer is for.
#[derive(Debug)]
pub(crate) enum Tag {
    /// A whole request.
    Whole(Token),
    /// A whole write. An active overlay then has these sectors allocated.
    Write { token: Token, sector: u64, count: u64 },
    /// A discard. If the disk does not support it, the request still succeeds.
    Discard { token: Token, offset: u64, len: u64 },
    /// A write-zeroes by the file system. If it does not support that, zeros are written.
    Zero { token: Token, offset: u64, len: u64 },
    /// A part of a request, by its index.
    Part(u32),
    /// The start of write-back.
    WriteBack,
    /// A step of the start of an overlay's session.
    SessionStart,
    /// A step of a flush.
    Flush,
    /// The write that marks an overlay's contents as unknown. If it fails, the commit map is
    /// cleared instead.
    MarkUnknown,
    /// The clearing of the commit map.
    ClearCommitMap,
    /// A write to an overlay's commit map.
    CommitMap { page: u64, words: RangeInclusive<u16> },
}
