//! What a network device is connected to.

use std::os::fd::BorrowedFd;
use std::sync::Arc;

use rustix::io::Errno;

use super::config_space::feature;
use super::header::HEADER_LEN;
use super::segments::Segments;
use super::stream::Stream;
use super::tap::Tap;
use super::vhost::{Vhost, VhostError};

/// The network's end of a device.
#[derive(Debug)]
pub struct NetBackend {
    pub(super) kind: Kind,
}

#[derive(Debug)]
pub(super) enum Kind {
    /// A tap that the io workers read and write.
    Tap(Arc<Tap>),
    /// A tap that the kernel reads and writes.
    Vhost(Arc<Tap>, Vec<Vhost>),
    /// A connection to a network in another process.
    Stream(Box<Stream>),
}

impl NetBackend {
    /// A tap, served by the io workers.
    pub fn tap(tap: Tap) -> Self {
        NetBackend { kind: Kind::Tap(Arc::new(tap)) }
    }

    /// A tap, served by the kernel's vhost-net, which has to be there.
    pub fn vhost(tap: Tap) -> Result<Self, VhostError> {
        let vhosts = (0..tap.queues()).map(|_| Vhost::open()).collect::<Result<_, _>>()?;
        Ok(NetBackend { kind: Kind::Vhost(Arc::new(tap), vhosts) })
    }

    /// A connection to a network in another process.
    pub fn stream(stream: Stream) -> Self {
        NetBackend { kind: Kind::Stream(Box::new(stream)) }
    }

    /// How many pairs of queues it can serve.
    pub fn pairs(&self) -> usize {
        match &self.kind {
            Kind::Tap(tap) | Kind::Vhost(tap, _) => tap.queues(),
            Kind::Stream(_) => 1,
        }
    }

    /// Whether the kernel moves the frames, and nothing here sees them.
    pub fn is_vhost(&self) -> bool {
        matches!(self.kind, Kind::Vhost(..))
    }

    /// Features that a device has because of it.
    pub(super) fn features(&self) -> u64 {
        match &self.kind {
            Kind::Tap(tap) => tap.features(),
            Kind::Vhost(tap, vhosts) => {
                let all = |features, vhost: &Vhost| features & vhost.features();
                let kernel = vhosts.iter().fold(u64::MAX, all);
                tap.features() & (kernel | !feature::MRG_RXBUF)
            }
            Kind::Stream(_) => feature::MRG_RXBUF,
        }
    }
}

/// What one pair of queues is connected to.
#[derive(Debug)]
pub(super) enum Link {
    /// A queue of a tap.
    Tap(Arc<Tap>, usize),
    /// A connection.
    Stream(Box<Stream>),
}

impl Link {
    pub(super) fn fd(&self) -> BorrowedFd<'_> {
        match self {
            Link::Tap(tap, queue) => tap.queue(*queue),
            Link::Stream(stream) => stream.fd(),
        }
    }

    pub(super) fn name(&self) -> &str {
        match self {
            Link::Tap(tap, _) => tap.name(),
            Link::Stream(stream) => stream.name(),
        }
    }

    /// Sends a frame: what `head` has of header and frame, and after it the segments.
    ///
    /// [`Errno::AGAIN`]: not now; the descriptor will be writable.
    pub(super) fn send(&mut self, head: &[u8], rest: &mut Segments) -> Result<(), Errno> {
        match self {
            Link::Tap(tap, queue) => {
                rustix::io::retry_on_intr(|| rest.write_to(tap.queue(*queue), head)).map(drop)
            }
            Link::Stream(stream) => {
                // The header stays here: without offloads there is nothing in it.
                let skip = HEADER_LEN.saturating_sub(head.len());
                stream.send(head.get(HEADER_LEN..).unwrap_or_default(), rest, skip)
            }
        }
    }

    /// Lets go what was gathered.
    pub(super) fn flush(&mut self) -> Result<(), Errno> {
        match self {
            Link::Tap(..) => Ok(()),
            Link::Stream(stream) => stream.flush(),
        }
    }

    /// Whether something waits until the descriptor is writable.
    pub(super) fn has_unsent(&self) -> bool {
        match self {
            Link::Tap(..) => false,
            Link::Stream(stream) => stream.has_unsent(),
        }
    }
}
