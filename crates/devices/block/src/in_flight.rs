//! The requests that are with the disk.

use std::fmt;

use rustix::io::Errno;

use crate::io_request::Token as DiskToken;
use crate::request::Range;
use virtio::queue::GuestBuffer;

/// Requests that are with the disk, by token.
#[derive(Default)]
pub(crate) struct Flying {
    slots: Vec<Option<Flight>>,
    free: Vec<DiskToken>,
    bytes: u64,
}

/// One request that is with the disk.
#[derive(Debug)]
pub(crate) struct Flight {
    pub(crate) ring: u16,
    pub(crate) head: u16,
    /// Device-writable bytes before the status.
    pub(crate) data_len: u32,
    pub(crate) status: GuestBuffer,
    pub(crate) what: What,
    /// Bytes that the disk may have to move for it: what is reserved in the backlog.
    pub(crate) bytes: u64,
    /// How many answers of the disk are to come for what it was asked.
    pub(crate) left: u32,
    /// Ranges of a discard that the disk is asked for later, the last one first.
    pub(crate) later: Vec<Range>,
    pub(crate) error: Option<Errno>,
    /// The request is done, and the flush that makes it durable is with the disk: the driver does not flush itself.
    pub(crate) syncing: bool,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum What {
    Read {
        bytes: u64,
    },
    Write {
        bytes: u64,
    },
    Flush,
    /// A discard or a zeroing.
    Discard,
}

impl fmt::Display for What {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            What::Read { .. } => "read",
            What::Write { .. } => "write",
            What::Flush => "flush",
            What::Discard => "discard",
        })
    }
}

impl What {
    /// Whether the request changes what the disk holds, so that it has something to make durable.
    pub(crate) fn changes_disk(self) -> bool {
        matches!(self, What::Write { .. } | What::Discard)
    }
}

impl Flying {
    /// Adds a request; its token is one that no other has.
    pub(crate) fn add(&mut self, flight: Flight) -> DiskToken {
        self.bytes += flight.bytes;
        if let Some(token) = self.free.pop() {
            self.slots[token as usize] = Some(flight);
            token
        } else {
            self.slots.push(Some(flight));
            (self.slots.len() - 1) as DiskToken
        }
    }

    /// A request that was added.
    pub(crate) fn get(&mut self, token: DiskToken) -> &mut Flight {
        self.slots[token as usize].as_mut().expect("the disk answers requests that it has")
    }

    /// Takes a request out.
    pub(crate) fn remove(&mut self, token: DiskToken) -> Flight {
        self.free.push(token);
        let flight = self.slots[token as usize].take().expect("the disk answers requests that it has");
        self.bytes -= flight.bytes;
        flight
    }

    /// Forgets all requests. Returns the bytes that the disk may have to move for them.
    pub(crate) fn clear(&mut self) -> u64 {
        self.slots.clear();
        self.free.clear();
        std::mem::take(&mut self.bytes)
    }
}
