//! The guest's requests that the disk works on.

use std::fmt;

use rustix::io::Errno;

use crate::io_request::Token as DiskToken;
use crate::request::Range;
use crate::slab::Slab;
use virtio::queue::GuestBuffer;
use virtio::worker::Nanos;

/// Requests in flight, by token.
#[derive(Default)]
pub(crate) struct InFlight {
    requests: Slab<InFlightRequest>,
    bytes: u64,
}

/// One request in flight.
#[derive(Debug)]
pub(crate) struct InFlightRequest {
    pub(crate) ring: u16,
    pub(crate) head: u16,
    /// Device-writable bytes before the status byte.
    pub(crate) data_len: u32,
    pub(crate) status: GuestBuffer,
    pub(crate) kind: RequestKind,
    /// When it was taken from its queue.
    pub(crate) started: Nanos,
    /// Bytes reserved in the backlog: those that the disk may have to move.
    pub(crate) bytes: u64,
    /// Completions of the disk that are still to come.
    pub(crate) left: u32,
    /// Ranges of a discard that are not enqueued yet, the last one first.
    pub(crate) later: Vec<Range>,
    pub(crate) error: Option<Errno>,
    /// The request is done, and the flush that makes it durable is in flight. Only where the driver
    /// did not negotiate `VIRTIO_BLK_F_FLUSH`.
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
    /// A discard or a write-zeroes.
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
    /// Whether the request changes what the disk holds, so that there is something to make durable.
    pub(crate) fn changes_disk(self) -> bool {
        matches!(self, RequestKind::Write { .. } | RequestKind::Discard)
    }
}

impl InFlight {
    /// Adds a request and returns its token.
    pub(crate) fn add(&mut self, request: InFlightRequest) -> DiskToken {
        self.bytes += request.bytes;
        self.requests.add(request)
    }

    /// The request with this token.
    pub(crate) fn get(&mut self, token: DiskToken) -> &mut InFlightRequest {
        self.requests.get_mut(token).expect("the disk completes requests that it has")
    }

    /// Takes the request with this token out.
    pub(crate) fn remove(&mut self, token: DiskToken) -> InFlightRequest {
        let request = self.requests.remove(token).expect("the disk completes requests that it has");
        self.bytes -= request.bytes;
        request
    }

    /// Removes all requests. Returns the bytes that they have reserved in the backlog.
    pub(crate) fn clear(&mut self) -> u64 {
        self.requests.clear();
        std::mem::take(&mut self.bytes)
    }
}
