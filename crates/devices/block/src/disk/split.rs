//! Requests that are worked off in parts, a few at a time, so that none keeps a worker to itself.

use rustix::io::Errno;

use super::layered::LayeredDisk;
use crate::buffers::{BufferPool, GuestBuffers};
use crate::engine::{MAX_ZEROS, Transfer};
use crate::io_request::{Tag, Token};
use crate::overlay::ActiveState;

/// Largest part of a request that is worked off at once, in bytes.
pub(crate) const PART: u64 = 1 << 20;
/// Most parts of one request in flight at a time.
const MAX_PARTS: u32 = 4;
/// Largest part of a discard, in bytes. Where the file allows it, parts end at multiples of it.
pub(crate) const DISCARD_PART: u64 = 4 << 20;
/// Most bytes of one discard that the disk works on at a time.
pub(crate) const DISCARD_AT_A_TIME: u64 = MAX_PARTS as u64 * DISCARD_PART;
/// A request that is worked off in parts.
#[derive(Debug)]
pub(crate) struct SplitRequest {
    pub(crate) token: Token,
    pub(crate) what: SplitKind,
    /// Where on the disk it begins, in bytes.
    pub(crate) offset: u64,
    /// Length in bytes.
    pub(crate) len: u64,
    /// Bytes for which a part was started.
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

    /// The transfer of the next part, of the request with this `index`. `None` if there is none, or none
    /// may be in flight now. `state` is that of the active overlay of `layers`.
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
                // A part that ends in the middle of a block gives back none of it.
                let to_boundary = DISCARD_PART - (target_start + offset) % DISCARD_PART;
                let len = (self.len - self.started).min(to_boundary);
                (Transfer::zero(target, target_start + offset, len, false, tag), len)
            }
        };
        self.started += len;
        self.parts += 1;
        Some(transfer)
    }

    /// Takes in the end of a part. True if no other is in flight.
    pub(crate) fn part_ended(&mut self, result: Result<(), Errno>) -> bool {
        self.parts -= 1;
        if let Err(errno) = result {
            self.error.get_or_insert(errno);
        }
        self.parts == 0
    }

    /// Whether no part is started any more.
    pub(crate) fn is_started(&self, draining: bool) -> bool {
        let dropped = draining && matches!(self.what, SplitKind::Discard);
        self.started == self.len || self.error.is_some() || dropped
    }
}

#[derive(Debug)]
pub(crate) enum SplitKind {
    Read(GuestBuffers),
    Write(GuestBuffers),
    Zeros,
    Discard,
}

/// The requests in parts of one queue, by index.
#[derive(Debug, Default)]
pub(crate) struct SplitTable {
    slots: Vec<Option<SplitRequest>>,
    free: Vec<u32>,
}

impl SplitTable {
    /// Adds a request; its index is one that no other has.
    pub(crate) fn add(&mut self, split: SplitRequest) -> u32 {
        if let Some(index) = self.free.pop() {
            self.slots[index as usize] = Some(split);
            index
        } else {
            self.slots.push(Some(split));
            (self.slots.len() - 1) as u32
        }
    }

    /// A request that was added.
    pub(crate) fn get(&mut self, index: u32) -> Option<&mut SplitRequest> {
        self.slots[index as usize].as_mut()
    }

    /// Takes a request out.
    pub(crate) fn remove(&mut self, index: u32) -> Option<SplitRequest> {
        let split = self.slots[index as usize].take()?;
        self.free.push(index);
        Some(split)
    }
}
