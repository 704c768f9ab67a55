//! The requests that are with the disk.

use std::fmt;

use rustix::io::Errno;

use crate::io_request::Token as DiskToken;
use crate::request::Range;
use virtio::queue::GuestBuffer;

/// Requests that are with the disk, by token.
#[derive(Default)]
pub(crate) struct InFlight {
    slots: Vec<Option<InFlightRequest>>,
    free: Vec<DiskToken>,
    bytes: u64,
}

/// One request that is with the disk.
#[derive(Debug)]
pub(crate) struct InFlightRequest {
    pub(crate) ring: u16,
    pub(crate) head: u16,
    /// Device-writable bytes before the status.
    pub(crate) data_len: u32,
    pub(crate) status: GuestBuffer,
    pub(crate) kind: RequestKind,
    /// Bytes that the disk may have to move for it: kind is reserved in the backlog.
    pub(crate) bytes: u64,
    /// How many answers of the disk are to come for kind it was asked.
    pub(crate) left: u32,
    /// Ranges of a discard that the disk is asked for later, the last one first.
    pub(crate) later: Vec<Range>,
    pub(crate) error: Option<Errno>,
    /// The request is done, and the flush that makes it durable is with the disk: the driver does not flush itself.
    pub(crate) syncing: bool,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum RequestKind {
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

impl fmt::Display for RequestKind {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            RequestKind::Read { .. } => "read",
            RequestKind::Write { .. } => "write",
            RequestKind::Flush => "flush",
            RequestKind::Discard => "discard",
        })
    }
}

impl RequestKind {
    /// Whether the request changes kind the disk holds, so that it has something to make durable.
    pub(crate) fn changes_disk(self) -> bool {
        matches!(self, RequestKind::Write { .. } | RequestKind::Discard)
    }
}

impl InFlight {
    /// Adds a request; its token is one that no other has.
    pub(crate) fn add(&mut self, request: InFlightRequest) -> DiskToken {
        self.bytes += request.bytes;
        if let Some(token) = self.free.pop() {
            self.slots[token as usize] = Some(request);
            token
        } else {
            self.slots.push(Some(request));
            (self.slots.len() - 1) as DiskToken
        }
    }

    /// A request that was added.
    pub(crate) fn get(&mut self, token: DiskToken) -> &mut InFlightRequest {
        self.slots[token as usize].as_mut().expect("the disk answers requests that it has")
    }

    /// Takes a request out.
    pub(crate) fn remove(&mut self, token: DiskToken) -> InFlightRequest {
        self.free.push(token);
        let request = self.slots[token as usize].take().expect("the disk answers requests that it has");
        self.bytes -= request.bytes;
        request
    }

    /// Forgets all requests. Returns the bytes that the disk may have to move for them.
    pub(crate) fn clear(&mut self) -> u64 {
        self.slots.clear();
        self.free.clear();
        std::mem::take(&mut self.bytes)
    }
}
