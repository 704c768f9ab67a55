//! The transmit queue: takes frames out of the guest's buffers and sends them without a copy.
//!
//! The bytes that are checked (the source address, and what an interceptor sees) are copied once,
//! and the copy is what is sent. A guest that changes a frame meanwhile cannot evade a check.

use memory::GuestRam;
use memory::iovec::{Access, GuestIoVec};
use rustix::io::Errno;

use super::guest_io::{self, MAX_BUFFERS};
use crate::backend::Link;
use crate::header::{ETHERNET_LEN, HEADER_LEN, MAX_LEN, source_mac};
use crate::interceptor::HEAD_LEN;
use virtio::queue::{Chain, Queue, QueueError};

/// The transmit queue, and the frame that was popped from it.
#[derive(Debug)]
pub(super) struct TxQueue {
    pub(super) queue: Queue,
    chain: Chain,
    /// Copy of the header and the first bytes of the frame. Empty if they are not checked.
    head: [u8; HEADER_LEN + HEAD_LEN],
    head_len: usize,
    /// The bytes after the head.
    rest: GuestIoVec,
    /// Buffer for a whole frame, for the interceptor.
    whole: Vec<u8>,
    /// Bytes that the rate limiter has counted for the next frame. None: the limiter was not asked.
    charged: Option<usize>,
}

/// What a chain holds.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum TxFrame {
    /// A frame of this length, without the header.
    Frame(usize),
    /// No frame: too short, too long, or in too many buffers.
    Malformed,
}

impl TxQueue {
    pub(super) fn new(queue: Queue) -> Self {
        TxQueue {
            queue,
            chain: Chain::new(),
            head: [0; HEADER_LEN + HEAD_LEN],
            head_len: 0,
            rest: GuestIoVec::new(),
            whole: Vec::new(),
            charged: None,
        }
    }

    /// Pops the next chain. False: the queue is empty.
    pub(super) fn pop(&mut self) -> Result<bool, QueueError> {
        self.queue.pop(&mut self.chain)
    }

    /// Loads the frame of the popped chain, with a copy of its head if `copy_head` is set.
    pub(super) fn load(&mut self, ram: &GuestRam, copy_head: bool) -> Result<TxFrame, QueueError> {
        let buffers = self.chain.readable();
        let len = buffers.len() as usize;
        if !(HEADER_LEN + ETHERNET_LEN..=MAX_LEN).contains(&len) {
            return Ok(TxFrame::Malformed);
        }
        self.rest.clear();
        self.head_len = if copy_head { len.min(self.head.len()) } else { 0 };
        let split = buffers.split_at(self.head_len as u32);
        let Some((first, rest)) = split else { return Ok(TxFrame::Malformed) };
        first.read(ram, &mut self.head[..self.head_len])?;
        guest_io::push(&mut self.rest, ram, &rest, Access::Read)?;
        if self.rest.entries().len() > MAX_BUFFERS {
            return Ok(TxFrame::Malformed);
        }
        Ok(TxFrame::Frame(len - HEADER_LEN))
    }

    /// The first bytes of the frame, if its head was copied.
    pub(super) fn head(&self) -> &[u8] {
        self.head[..self.head_len].get(HEADER_LEN..).unwrap_or_default()
    }

    /// The source address of the frame, if its head was copied.
    pub(super) fn source_mac(&self) -> Option<[u8; 6]> {
        source_mac(self.head())
    }

    /// A copy of the whole frame. Its head must have been copied.
    pub(super) fn whole_frame(&mut self) -> &[u8] {
        self.whole.clear();
        let head = self.head[..self.head_len].get(HEADER_LEN..).unwrap_or_default();
        self.whole.extend_from_slice(head);
        self.rest.copy_out(0, &mut self.whole);
        &self.whole
    }

    /// Bytes that the rate limiter has counted for this frame, which may have been shorter then.
    pub(super) fn charged(&self) -> Option<usize> {
        self.charged
    }

    pub(super) fn set_charged(&mut self, len: usize) {
        self.charged = Some(len);
    }

    pub(super) fn send(&mut self, link: &mut Link) -> Result<(), Errno> {
        link.send(&self.head[..self.head_len], &mut self.rest)
    }

    /// Puts the popped chain back, to be popped again later.
    pub(super) fn rewind(&mut self) -> Result<(), QueueError> {
        self.queue.rewind(&self.chain)
    }

    /// Completes the popped chain: its frame was sent or dropped.
    pub(super) fn complete(&mut self) -> Result<(), QueueError> {
        self.charged = None;
        self.queue.add_used(self.chain.head(), 0)
    }
}
