//! The network end of one queue pair: a queue of a tap, or a stream.

use std::os::fd::BorrowedFd;
use std::sync::Arc;

use memory::iovec::GuestIoVec;
use rustix::io::Errno;

use super::stream::Stream;
use super::tap::Tap;
use crate::header::HEADER_LEN;

/// The network end of one queue pair.
#[derive(Debug)]
pub(crate) enum Link {
    /// The tap's queue of this index.
    Tap(Arc<Tap>, usize),
    /// A connection to another process.
    Stream(Box<Stream>),
}

impl Link {
    pub(crate) fn fd(&self) -> BorrowedFd<'_> {
        match self {
            Link::Tap(tap, queue) => tap.queue(*queue),
            Link::Stream(stream) => stream.fd(),
        }
    }

    pub(crate) fn name(&self) -> &str {
        match self {
            Link::Tap(tap, _) => tap.name(),
            Link::Stream(stream) => stream.name(),
        }
    }

    /// Sends a header and a frame: their first bytes are `head`, the others `rest`.
    ///
    /// [`Errno::AGAIN`]: the network is full. The descriptor becomes writable when it takes more.
    pub(crate) fn send(&mut self, head: &[u8], rest: &mut GuestIoVec) -> Result<(), Errno> {
        match self {
            Link::Tap(tap, queue) => {
                rustix::io::retry_on_intr(|| rest.write_to(tap.queue(*queue), head)).map(drop)
            }
            Link::Stream(stream) => {
                // The header is not sent: without offloads it says nothing.
                let skip = HEADER_LEN.saturating_sub(head.len());
                stream.send(head.get(HEADER_LEN..).unwrap_or_default(), rest, skip)
            }
        }
    }

    /// Takes the next frame from the network and drops it. [`Errno::AGAIN`]: there is none.
    pub(crate) fn discard(&mut self) -> Result<(), Errno> {
        match self {
            Link::Tap(tap, queue) => {
                // The kernel drops what does not fit in the buffer.
                let mut head = [0; 64];
                match rustix::io::retry_on_intr(|| rustix::io::read(tap.queue(*queue), &mut head[..]))? {
                    // A tap never returns an empty frame. This is the end of another file.
                    0 => Err(Errno::NOTCONN),
                    _ => Ok(()),
                }
            }
            Link::Stream(stream) => {
                stream.frame()?;
                stream.consume();
                Ok(())
            }
        }
    }

    /// Writes out the frames that [`Link::send`] has buffered.
    pub(crate) fn flush(&mut self) -> Result<(), Errno> {
        match self {
            Link::Tap(..) => Ok(()),
            Link::Stream(stream) => stream.flush(),
        }
    }

    /// Closes the link. The peer of a stream sees the end of the connection.
    pub(crate) fn close(self) {
        if let Link::Stream(stream) = self {
            stream.shutdown();
        }
    }

    /// Whether buffered frames wait until the descriptor is writable.
    pub(crate) fn has_unsent(&self) -> bool {
        match self {
            Link::Tap(..) => false,
            Link::Stream(stream) => stream.has_unsent(),
        }
    }
}
