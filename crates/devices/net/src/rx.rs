//! Frames to the guest: out of the network, right into the guest's buffers.
//!
//! Chains are taken from the queue ahead of the frames that will fill them, as many as the largest frame may need, and one system call
//! reads into all of them. What one frame leaves of them is there for the next. Where they are fewer, the call's end goes
//! to a spill of our own, so that the size of what came is always known.
//!
//! # A frame that does not fit
//!
//! With mergeable buffers a frame waits for the guest to give more, for [`PATIENCE`] at most: a guest that is behind will, one that has
//! given all it has will not. Without them each frame has one chain, and what does not fit is dropped. Both are counted.

use std::collections::VecDeque;
use std::os::fd::BorrowedFd;

use memory::GuestRam;
use rustix::io::Errno;

use super::header::{HEADER_LEN, MAX_LEN, NUM_BUFFERS};
use super::segments::{Access, MAX_SEGMENTS, Segments};
use virtio::queue::{Chain, Queue, QueueError};
use virtio::worker::Nanos;

/// How long a frame waits for room.
pub(super) const PATIENCE: Nanos = 10_000_000;

/// The receive queue, and what was taken from it.
#[derive(Debug)]
pub(super) struct Rx {
    pub(super) queue: Queue,
    mergeable: bool,
    /// Bytes of buffers that are gathered before a frame is read: what the largest so far took.
    expect: usize,
    chain: Chain,
    /// Chains that were taken and not filled, in order, and their segments.
    chains: VecDeque<Taken>,
    segments: Segments,
    spill: Vec<u8>,
    /// A frame that was read and does not fit.
    waiting: Option<Waiting>,
}

#[derive(Debug)]
struct Taken {
    head: u16,
    segments: usize,
    len: usize,
}

#[derive(Debug, Clone, Copy)]
struct Waiting {
    /// Its length with the header.
    total: usize,
    /// How much of it stands in the guest's buffers; the rest is in the spill.
    placed: usize,
}

/// What came of a frame.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Received {
    /// The guest has it; its length without the header.
    Frame(usize),
    /// It was larger than the guest's buffer.
    TooLarge,
    /// There is none.
    Nothing,
    /// The guest has no room for it, or for any.
    NoRoom,
    /// It could not be read.
    Failed(Errno),
}

impl Rx {
    /// `large` frames are expected right away.
    pub(super) fn new(queue: Queue, mergeable: bool, large: bool) -> Self {
        Rx {
            queue,
            mergeable,
            expect: if large { MAX_LEN } else { HEADER_LEN + 18 + 1500 },
            chain: Chain::new(),
            chains: VecDeque::new(),
            segments: Segments::new(),
            spill: Vec::new(),
            waiting: None,
        }
    }

    /// Whether a frame waits for room.
    pub(super) fn has_waiting(&self) -> bool {
        self.waiting.is_some()
    }

    /// Whether the guest has given anything that is not filled yet.
    pub(super) fn has_room(&self) -> bool {
        !self.chains.is_empty()
    }

    /// Lets go of the frame that waits. True if there was one.
    pub(super) fn drop_waiting(&mut self) -> bool {
        self.waiting.take().is_some()
    }

    /// Reads a frame from a tap.
    pub(super) fn receive(&mut self, ram: &GuestRam, tap: BorrowedFd<'_>) -> Result<Received, QueueError> {
        if let Some(waiting) = self.waiting {
            return self.place(ram, waiting);
        }
        self.gather(ram, self.expect, MAX_SEGMENTS)?;
        let Some(first) = self.chains.front() else { return Ok(Received::NoRoom) };
        // One chain for a frame, or all there are.
        let reach = if self.mergeable { self.segments.count() } else { first.segments };
        let count = reach.min(MAX_SEGMENTS);
        let room = if count == self.segments.count() {
            self.segments.len()
        } else {
            (0..count).map(|index| self.segments.len_of(index)).sum()
        };
        let missing = MAX_LEN.saturating_sub(room);
        if self.spill.len() < missing {
            self.spill.resize(MAX_LEN, 0);
        }
        let total = match self.segments.read_from(tap, count, &mut self.spill[..missing]) {
            Ok(total) => total,
            Err(Errno::AGAIN | Errno::INTR) => return Ok(Received::Nothing),
            Err(error) => return Ok(Received::Failed(error)),
        };
        if total <= HEADER_LEN {
            // No tap gives that: it is the end of something else.
            return Ok(Received::Failed(Errno::NOTCONN));
        }
        self.expect = self.expect.max(total);
        if total <= room {
            return self.complete(total).map(Received::Frame);
        }
        self.place(ram, Waiting { total, placed: room })
    }

    /// Finds room for the rest of a frame.
    fn place(&mut self, ram: &GuestRam, waiting: Waiting) -> Result<Received, QueueError> {
        let Waiting { total, placed } = waiting;
        self.gather(ram, total, usize::MAX)?;
        let room = self.room();
        if room < total {
            if !self.mergeable {
                self.waiting = None;
                return Ok(Received::TooLarge);
            }
            self.waiting = Some(waiting);
            return Ok(Received::NoRoom);
        }
        self.segments.copy_in(placed, &self.spill[..total - placed]);
        self.waiting = None;
        self.complete(total).map(Received::Frame)
    }

    /// Gives the guest a frame that is here already, with an empty header.
    pub(super) fn deliver(&mut self, ram: &GuestRam, frame: &[u8]) -> Result<Received, QueueError> {
        if self.waiting.is_some() {
            return Ok(Received::NoRoom);
        }
        let total = HEADER_LEN + frame.len();
        self.gather(ram, total, usize::MAX)?;
        if self.chains.is_empty() || (self.mergeable && self.room() < total) {
            return Ok(Received::NoRoom);
        }
        if self.room() < total {
            return Ok(Received::TooLarge);
        }
        self.segments.copy_in(0, &[0; HEADER_LEN]);
        self.segments.copy_in(HEADER_LEN, frame);
        self.complete(total).map(Received::Frame)
    }

    /// Bytes that the next frame may take.
    fn room(&self) -> usize {
        if self.mergeable { self.segments.len() } else { self.chains.front().map_or(0, |chain| chain.len) }
    }

    /// Takes chains until there are `want` bytes or `most` segments, or, without mergeable buffers, one chain.
    fn gather(&mut self, ram: &GuestRam, want: usize, most: usize) -> Result<(), QueueError> {
        let lacks = |segments: &Segments| segments.len() < want && segments.count() < most;
        while if self.mergeable { lacks(&self.segments) } else { self.chains.is_empty() } {
            if !self.queue.pop(&mut self.chain)? {
                break;
            }
            let (before, len) = (self.segments.count(), self.segments.len());
            self.segments.push(ram, &self.chain.writable(), Access::Write)?;
            self.chains.push_back(Taken {
                head: self.chain.head(),
                segments: self.segments.count() - before,
                len: self.segments.len() - len,
            });
        }
        Ok(())
    }

    /// A frame of `total` bytes, header included, stands in the first chains: the guest may have them. Returns its length without
    /// the header.
    fn complete(&mut self, total: usize) -> Result<usize, QueueError> {
        let (mut filled, mut count) = (0, 0u16);
        for chain in &self.chains {
            if count > 0 && filled >= total {
                break;
            }
            filled += chain.len;
            count += 1;
        }
        self.segments.copy_in(NUM_BUFFERS, &count.to_le_bytes());
        let mut left = total;
        let mut segments = 0;
        for chain in self.chains.drain(..usize::from(count)) {
            let written = chain.len.min(left);
            left -= written;
            segments += chain.segments;
            self.queue.add_used(chain.head, written as u32)?;
        }
        self.segments.drop_front(segments);
        Ok(total - HEADER_LEN)
    }

    /// Gives back what was taken ahead. True if a frame was lost that waited.
    pub(super) fn give_back(&mut self) -> Result<bool, QueueError> {
        let lost = self.drop_waiting();
        self.segments.clear();
        while let Some(chain) = self.chains.pop_back() {
            self.queue.unpop(chain.head)?;
        }
        Ok(lost)
    }
}
