//! The receive queue: reads frames from the network into the guest's buffers without a copy.
//!
//! Chains are popped ahead of the frames that will fill them, as many as the largest frame so far
//! needed, and one system call reads into all of them. Chains that a frame leaves unused are kept
//! for the next one. A spill buffer of the monitor takes what does not fit in the chains, so that
//! the size of a frame is always known.
//!
//! # A frame that does not fit
//!
//! With mergeable buffers, a frame waits for more buffers of the guest, for [`BUFFER_TIMEOUT`] at
//! most: a slow driver adds more within that time, and one that has added all it has does not.
//! Without mergeable buffers each frame has one chain, and a frame that does not fit is dropped.
//! Both kinds of dropped frames are counted.

use std::collections::VecDeque;
use std::os::fd::BorrowedFd;

use memory::GuestRam;
use memory::iovec::{Access, GuestIoVec, IoVec};
use rustix::io::Errno;

use super::guest_io::{self, MAX_BUFFERS};
use crate::header::{HEADER_LEN, MAX_LEN, NUM_BUFFERS};
use virtio::queue::{Chain, Queue, QueueError};
use virtio::worker::Nanos;

/// How long a frame waits for more receive buffers.
pub(crate) const BUFFER_TIMEOUT: Nanos = 10_000_000;

/// The receive queue, and the chains that were popped from it ahead.
#[derive(Debug)]
pub(super) struct RxQueue {
    pub(super) queue: Queue,
    mergeable: bool,
    /// Bytes of buffers to gather before a frame is read: the size of the largest frame so far.
    gather_len: usize,
    chain: Chain,
    /// Chains that are popped and not filled, in order. `iovec` is their buffers.
    chains: VecDeque<PoppedChain>,
    iovec: GuestIoVec,
    spill: Vec<u8>,
    /// A frame that was read and does not fit in the chains.
    partial: Option<PartialFrame>,
}

#[derive(Debug)]
struct PoppedChain {
    head: u16,
    /// Number of its buffers.
    buffers: usize,
    len: usize,
}

#[derive(Debug, Clone, Copy)]
struct PartialFrame {
    /// Its length with the header.
    total: usize,
    /// Bytes of it in the guest's buffers. The rest is in the spill buffer.
    placed: usize,
}

/// Outcome of an attempt to receive a frame.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Received {
    /// The guest has a frame of this length, without the header.
    Frame(usize),
    /// The frame was larger than the guest's buffer, and is dropped.
    TooLarge,
    /// The network has no frame.
    Nothing,
    /// The guest has too few receive buffers, or none.
    NoBuffers,
    /// The frame could not be read.
    Failed(Errno),
}

impl RxQueue {
    /// `large`: frames of maximum size are expected from the start.
    pub(super) fn new(queue: Queue, mergeable: bool, large: bool) -> Self {
        RxQueue {
            queue,
            mergeable,
            gather_len: if large { MAX_LEN } else { HEADER_LEN + 18 + 1500 },
            chain: Chain::new(),
            chains: VecDeque::new(),
            iovec: GuestIoVec::new(),
            spill: Vec::new(),
            partial: None,
        }
    }

    /// Whether a frame waits for more receive buffers.
    pub(super) fn has_partial(&self) -> bool {
        self.partial.is_some()
    }

    /// Whether any popped chain is not filled yet.
    pub(super) fn has_buffers(&self) -> bool {
        !self.chains.is_empty()
    }

    /// Drops the frame that waits for more receive buffers. False: there is none.
    pub(super) fn drop_partial(&mut self) -> bool {
        self.partial.take().is_some()
    }

    /// Reads a frame from a tap.
    pub(super) fn receive(&mut self, ram: &GuestRam, tap: BorrowedFd<'_>) -> Result<Received, QueueError> {
        if let Some(partial) = self.partial {
            return self.place(ram, partial);
        }
        self.gather(ram, self.gather_len, MAX_BUFFERS)?;
        let Some(first) = self.chains.front() else { return Ok(Received::NoBuffers) };
        // Without mergeable buffers a frame has one chain, with them all chains.
        let reach = if self.mergeable { self.iovec.entries().len() } else { first.buffers };
        let count = reach.min(MAX_BUFFERS);
        let space = if count == self.iovec.entries().len() {
            self.iovec.len() as usize
        } else {
            self.iovec.entries()[..count].iter().map(IoVec::len).sum()
        };
        let missing = MAX_LEN.saturating_sub(space);
        if self.spill.len() < missing {
            self.spill.resize(MAX_LEN, 0);
        }
        let total = match self.iovec.read_from(tap, count, &mut self.spill[..missing]) {
            Ok(total) => total,
            Err(Errno::AGAIN | Errno::INTR) => return Ok(Received::Nothing),
            Err(error) => return Ok(Received::Failed(error)),
        };
        if total <= HEADER_LEN {
            // A tap never returns an empty frame. This is the end of another file.
            return Ok(Received::Failed(Errno::NOTCONN));
        }
        self.gather_len = self.gather_len.max(total);
        if total <= space {
            return self.complete(total).map(Received::Frame);
        }
        self.place(ram, PartialFrame { total, placed: space })
    }

    /// Gathers buffers for the rest of a frame, and copies it if they suffice.
    fn place(&mut self, ram: &GuestRam, partial: PartialFrame) -> Result<Received, QueueError> {
        let PartialFrame { total, placed } = partial;
        self.gather(ram, total, usize::MAX)?;
        if self.space() < total {
            if !self.mergeable {
                self.partial = None;
                return Ok(Received::TooLarge);
            }
            self.partial = Some(partial);
            return Ok(Received::NoBuffers);
        }
        self.iovec.copy_in(placed, &self.spill[..total - placed]);
        self.partial = None;
        self.complete(total).map(Received::Frame)
    }

    /// Copies a frame to the guest, with an empty header.
    pub(super) fn deliver(&mut self, ram: &GuestRam, frame: &[u8]) -> Result<Received, QueueError> {
        if self.partial.is_some() {
            return Ok(Received::NoBuffers);
        }
        let total = HEADER_LEN + frame.len();
        self.gather(ram, total, usize::MAX)?;
        if self.chains.is_empty() || (self.mergeable && self.space() < total) {
            return Ok(Received::NoBuffers);
        }
        if self.space() < total {
            return Ok(Received::TooLarge);
        }
        self.iovec.copy_in(0, &[0; HEADER_LEN]);
        self.iovec.copy_in(HEADER_LEN, frame);
        self.complete(total).map(Received::Frame)
    }

    /// Bytes of buffers that the next frame may fill.
    fn space(&self) -> usize {
        if self.mergeable {
            self.iovec.len() as usize
        } else {
            self.chains.front().map_or(0, |chain| chain.len)
        }
    }

    /// Pops chains until they have `want` bytes or `most` buffers. Without mergeable buffers it
    /// pops one chain.
    fn gather(&mut self, ram: &GuestRam, want: usize, most: usize) -> Result<(), QueueError> {
        let lacks = |iovec: &GuestIoVec| (iovec.len() as usize) < want && iovec.entries().len() < most;
        while if self.mergeable { lacks(&self.iovec) } else { self.chains.is_empty() } {
            if !self.queue.pop(&mut self.chain)? {
                break;
            }
            let (before, len) = (self.iovec.entries().len(), self.iovec.len() as usize);
            guest_io::push(&mut self.iovec, ram, &self.chain.writable(), Access::Write)?;
            self.chains.push_back(PoppedChain {
                head: self.chain.head(),
                buffers: self.iovec.entries().len() - before,
                len: self.iovec.len() as usize - len,
            });
        }
        Ok(())
    }

    /// Completes the chains that a frame of `total` bytes, header included, fills. Returns its
    /// length without the header.
    fn complete(&mut self, total: usize) -> Result<usize, QueueError> {
        let (mut filled, mut count) = (0, 0u16);
        for chain in &self.chains {
            if count > 0 && filled >= total {
                break;
            }
            filled += chain.len;
            count += 1;
        }
        self.iovec.copy_in(NUM_BUFFERS, &count.to_le_bytes());
        let mut left = total;
        let mut buffers = 0;
        for chain in self.chains.drain(..usize::from(count)) {
            let written = chain.len.min(left);
            left -= written;
            buffers += chain.buffers;
            self.queue.add_used(chain.head, written as u32)?;
        }
        self.iovec.drop_front(buffers);
        Ok(total - HEADER_LEN)
    }

    /// Puts all popped chains back into the queue. True: a frame that waited for more buffers was
    /// dropped.
    pub(super) fn unpop_all(&mut self) -> Result<bool, QueueError> {
        let dropped = self.drop_partial();
        self.iovec.clear();
        while let Some(chain) = self.chains.pop_back() {
            self.queue.unpop(chain.head)?;
        }
        Ok(dropped)
    }
}
