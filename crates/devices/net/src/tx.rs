//! Frames from the guest: out of its buffers, right into the network.
//!
//! What is looked at (the sender's address, what a interceptor wants to see) is copied once, and the copy is what is sent: a guest that
//! changes a frame in between changes nothing of what was checked.

use memory::GuestRam;
use rustix::io::Errno;

use super::backend::Link;
use super::header::{ETHERNET_LEN, HEADER_LEN, MAX_LEN, source_mac};
use super::interceptor::HEAD_LEN;
use super::segments::{Access, Segments};
use virtio::queue::{Chain, Queue, QueueError};

/// The transmit queue, and the frame that was taken from it.
#[derive(Debug)]
pub(super) struct Tx {
    pub(super) queue: Queue,
    pub(super) chain: Chain,
    /// Header and first bytes of the frame, if they were looked at.
    head: [u8; HEADER_LEN + HEAD_LEN],
    head_len: usize,
    /// What follows the head.
    rest: Segments,
    /// A whole frame, for the interceptor.
    whole: Vec<u8>,
    /// Bytes that the limiter has let pass of the frame that is to be popped next; None if it was not asked.
    paid: Option<usize>,
}

/// What a chain holds.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Outgoing {
    /// A frame of so many bytes.
    Frame(usize),
    /// No frame.
    Malformed,
}

impl Tx {
    pub(super) fn new(queue: Queue) -> Self {
        Tx {
            queue,
            chain: Chain::new(),
            head: [0; HEADER_LEN + HEAD_LEN],
            head_len: 0,
            rest: Segments::new(),
            whole: Vec::new(),
            paid: None,
        }
    }

    /// Takes in the chain that was popped. With `closely` its head can be looked at.
    pub(super) fn look(&mut self, ram: &GuestRam, closely: bool) -> Result<Outgoing, QueueError> {
        let buffers = self.chain.readable();
        let len = buffers.len() as usize;
        if !(HEADER_LEN + ETHERNET_LEN..=MAX_LEN).contains(&len) {
            return Ok(Outgoing::Malformed);
        }
        self.rest.clear();
        self.head_len = if closely { len.min(self.head.len()) } else { 0 };
        let split = buffers.split_at(self.head_len as u32);
        let Some((first, rest)) = split else { return Ok(Outgoing::Malformed) };
        first.read(ram, &mut self.head[..self.head_len])?;
        self.rest.push(ram, &rest, Access::Read)?;
        if self.rest.count() > super::segments::MAX_SEGMENTS {
            // More pieces than the kernel takes, each of a byte or so.
            return Ok(Outgoing::Malformed);
        }
        Ok(Outgoing::Frame(len - HEADER_LEN))
    }

    /// The first bytes of the frame, after a close look.
    pub(super) fn head(&self) -> &[u8] {
        self.head[..self.head_len].get(HEADER_LEN..).unwrap_or_default()
    }

    /// Its sender, after a close look.
    pub(super) fn source_mac(&self) -> Option<[u8; 6]> {
        source_mac(self.head())
    }

    /// All of the frame, after a close look.
    pub(super) fn whole_frame(&mut self) -> &[u8] {
        self.whole.clear();
        let head = self.head[..self.head_len].get(HEADER_LEN..).unwrap_or_default();
        self.whole.extend_from_slice(head);
        self.rest.copy_out(0, &mut self.whole);
        &self.whole
    }

    /// How much of it the limiter has let pass already: it may have been shorter then.
    pub(super) fn paid(&self) -> Option<usize> {
        self.paid
    }

    pub(super) fn set_paid(&mut self, len: usize) {
        self.paid = Some(len);
    }

    pub(super) fn send_on(&mut self, link: &mut Link) -> Result<(), Errno> {
        link.send(&self.head[..self.head_len], &mut self.rest)
    }

    /// The frame waits for better times.
    pub(super) fn hold(&mut self) -> Result<(), QueueError> {
        self.queue.rewind(&self.chain)
    }

    /// The frame is gone, one way or the other.
    pub(super) fn done(&mut self) -> Result<(), QueueError> {
        self.paid = None;
        self.queue.add_used(self.chain.head(), 0)
    }
}
