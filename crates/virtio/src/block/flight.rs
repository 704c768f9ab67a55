//! The requests that are with the disk.

use rustix::io::Errno;

use super::queue::Token as DiskToken;
use crate::queue::GuestBuffer;

/// Requests that are with the disk, by token.
#[derive(Default)]
pub(super) struct Flying {
    slots: Vec<Flight>,
    free: Vec<DiskToken>,
    bytes: u64,
}

/// One request that is with the disk.
#[derive(Debug, Clone, Copy)]
pub(super) struct Flight {
    pub(super) ring: u16,
    pub(super) head: u16,
    /// Device-writable bytes before the status.
    pub(super) data_len: u32,
    pub(super) status: GuestBuffer,
    pub(super) what: What,
    /// Bytes that the disk may have to move for it.
    pub(super) bytes: u64,
    /// How many answers of the disk are to come.
    pub(super) left: u32,
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
            self.slots[token as usize] = flight;
            token
        } else {
            self.slots.push(flight);
            (self.slots.len() - 1) as DiskToken
        }
    }

    /// Bytes that the disk may have to move for all of them.
    pub(super) fn bytes(&self) -> u64 {
        self.bytes
    }

    /// A request that was added.
    pub(super) fn get(&mut self, token: DiskToken) -> &mut Flight {
        &mut self.slots[token as usize]
    }

    /// Takes a request out.
    pub(super) fn remove(&mut self, token: DiskToken) -> Flight {
        self.free.push(token);
        let flight = self.slots[token as usize];
        self.bytes -= flight.bytes;
        flight
    }
}
