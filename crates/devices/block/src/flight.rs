//! The requests that are with the disk.

use rustix::io::Errno;

use super::queue::Token as DiskToken;
use super::request::Range;
use virtio::queue::GuestBuffer;

/// Requests that are with the disk, by token.
#[derive(Default)]
pub(super) struct Flying {
    slots: Vec<Option<Flight>>,
    free: Vec<DiskToken>,
    bytes: u64,
}

/// One request that is with the disk.
#[derive(Debug)]
pub(super) struct Flight {
    pub(super) ring: u16,
    pub(super) head: u16,
    /// Device-writable bytes before the status.
    pub(super) data_len: u32,
    pub(super) status: GuestBuffer,
    pub(super) what: What,
    /// Bytes that the disk may have to move for it: what is reserved in the backlog.
    pub(super) bytes: u64,
    /// How many answers of the disk are to come for what it was asked.
    pub(super) left: u32,
    /// Ranges of a discard that the disk is asked for later, the last one first.
    pub(super) later: Vec<Range>,
    pub(super) error: Option<Errno>,
    /// The request is done, and the flush that makes it durable is with the disk: the driver does not flush itself.
    pub(super) syncing: bool,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum What {
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

impl What {
    /// Whether the request changes what the disk holds, so that it has something to make durable.
    pub(super) fn changes_disk(self) -> bool {
        matches!(self, What::Write { .. } | What::Discard)
    }
}

impl Flying {
    /// Adds a request; its token is one that no other has.
    pub(super) fn add(&mut self, flight: Flight) -> DiskToken {
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
    pub(super) fn get(&mut self, token: DiskToken) -> &mut Flight {
        self.slots[token as usize].as_mut().expect("the disk answers requests that it has")
    }

    /// Takes a request out.
    pub(super) fn remove(&mut self, token: DiskToken) -> Flight {
        self.free.push(token);
        let flight = self.slots[token as usize].take().expect("the disk answers requests that it has");
        self.bytes -= flight.bytes;
        flight
    }

    /// Forgets all requests. Returns the bytes that the disk may have to move for them.
    pub(super) fn clear(&mut self) -> u64 {
        self.slots.clear();
        self.free.clear();
        std::mem::take(&mut self.bytes)
    }
}
