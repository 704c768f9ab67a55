//! Large requests, split into parts of which a few are in flight at a time.

use memory::iovec::GuestIoVec;
use rustix::io::Errno;

use super::buffer_pool::BufferPool;
use super::layered::LayeredDisk;
use crate::engine::{MAX_ZEROS, Transfer};
use crate::io_request::{Tag, Token};
use crate::overlay::ActiveState;

/// Largest part of a read or write, in bytes.
pub(crate) const PART: u64 = 1 << 20;
/// Most parts of one request in flight.
const MAX_PARTS: u32 = 4;
/// Largest part of a discard, in bytes. Parts end at multiples of it.
pub(crate) const DISCARD_PART: u64 = 4 << 20;
/// Most bytes of one discard in flight.
pub(crate) const DISCARD_AT_A_TIME: u64 = MAX_PARTS as u64 * DISCARD_PART;
/// A request in parts.
#[derive(Debug)]
pub(crate) struct SplitRequest {
    pub(crate) token: Token,
    pub(crate) what: SplitKind,
    /// Offset on the disk, in bytes.
    pub(crate) offset: u64,
    /// Length in bytes.
    pub(crate) len: u64,
    /// Bytes whose parts were started.
    pub(crate) started: u64,
    /// Parts in flight.
    parts: u32,
    /// The first error of a part.
    pub(crate) error: Option<Errno>,
}

impl SplitRequest {
    pub(crate) fn new(token: Token, offset: u64, len: u64, what: SplitKind) -> Self {
        SplitRequest { token, what, offset, len, started: 0, parts: 0, error: None }
    }

    /// Starts the next part of the request with this `index`. `None` if all parts are started, or
    /// as many as may be are in flight. `state` is that of the active overlay of `layers`.
    pub(crate) fn next_part(
        &mut self,
        index: u32,
        (layers, state): (&LayeredDisk, Option<&ActiveState>),
        pool: &mut BufferPool,
        draining: bool,
    ) -> Option<Transfer<Tag>> {
        if self.parts == MAX_PARTS || self.is_started(draining) {
            return None;
        }
        let (target, target_start) = layers.write_target();
        let tag = Tag::Part(index);
        let offset = self.offset + self.started;
        let left = (self.len - self.started).min(PART);
        let (transfer, len) = match &self.what {
            SplitKind::Read(all) => {
                let place = layers.locate(state, offset, left);
                let mut buffers = pool.take();
                buffers.push_part(all, self.started, place.len);
                (Transfer::read(place.file, place.offset, buffers, tag), place.len)
            }
            SplitKind::Write(all) => {
                let mut buffers = pool.take();
                buffers.push_part(all, self.started, left);
                (Transfer::write(target, target_start + offset, buffers, tag), left)
            }
            SplitKind::Zeros => {
                let left = left.min(MAX_ZEROS);
                (Transfer::write_zeros(target, target_start + offset, left, tag), left)
            }
            SplitKind::Discard => {
                // A hole that ends in the middle of a block does not free the block.
                let to_boundary = DISCARD_PART - (target_start + offset) % DISCARD_PART;
                let len = (self.len - self.started).min(to_boundary);
                (Transfer::zero(target, target_start + offset, len, false, tag), len)
            }
        };
        self.started += len;
        self.parts += 1;
        Some(transfer)
    }

    /// Handles the end of a part. True if no other part is in flight.
    pub(crate) fn part_ended(&mut self, result: Result<(), Errno>) -> bool {
        self.parts -= 1;
        if let Err(errno) = result {
            self.error.get_or_insert(errno);
        }
        self.parts == 0
    }

    /// Whether no more parts will be started.
    pub(crate) fn is_started(&self, draining: bool) -> bool {
        let dropped = draining && matches!(self.what, SplitKind::Discard);
        self.started == self.len || self.error.is_some() || dropped
    }
}

#[derive(Debug)]
pub(crate) enum SplitKind {
    Read(GuestIoVec),
    Write(GuestIoVec),
    Zeros,
    Discard,
}
