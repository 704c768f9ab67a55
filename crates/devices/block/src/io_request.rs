//! Requests of a disk, and the tags of the transfers that carry them out.

use std::ops::RangeInclusive;

use crate::buffers::GuestBuffers;

/// What is to be done.
#[derive(Debug)]
pub enum Request {
    /// Fill the buffers from `offset` on.
    Read(GuestBuffers),
    /// Write the buffers from `offset` on.
    Write(GuestBuffers),
    /// The `len` bytes are not needed any more; they read as zeros where the disk can give their space back.
    Discard {
        /// Length in bytes.
        len: u64,
    },
    /// The `len` bytes read as zeros.
    WriteZeroes {
        /// Length in bytes.
        len: u64,
        /// Whether their space may be given back.
        unmap: bool,
    },
    /// What was written becomes durable. Nothing is done where flushes do not wait for the disk.
    Flush,
}

/// How the caller tells its requests apart.
pub type Token = u32;

/// What a transfer is for.
#[derive(Debug)]
pub(crate) enum Tag {
    /// A whole request.
    Whole(Token),
    /// A whole write; an overlay holds these sectors afterwards.
    Write { token: Token, sector: u64, count: u64 },
    /// A discard: one that the disk cannot do is done.
    Discard { token: Token, offset: u64, len: u64 },
    /// Zeroing of a range, by the file system; where it cannot, zeros are written.
    Zero { token: Token, offset: u64, len: u64 },
    /// A part of a request.
    Part(u32),
    /// The start of write-back.
    WriteBack,
    /// A step of the session_start of an overlay's session.
    Begin,
    /// A step of a flush.
    Flush,
    /// An overlay's file is to say that its contents are unknown; where it cannot, its map B is cleared.
    MarkUnknown,
    /// The clearing of map B.
    ClearCommitMap,
    /// A stretch of an overlay's map B.
    CommitMap { page: u64, words: RangeInclusive<u16> },
}
