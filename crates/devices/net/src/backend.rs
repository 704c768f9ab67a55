//! What a network device is connected to.

use std::os::fd::{AsRawFd, BorrowedFd, RawFd};
use std::path::Path;
use std::sync::Arc;

use config::{NetBackendKind, NetworkInterface};
use rustix::io::Errno;

use super::config_space::feature;
use super::header::HEADER_LEN;
use super::segments::Segments;
use super::stream::{Stream, StreamError};
use super::tap::{self, Tap, TapError, TapSource};
use super::vhost::{Vhost, VhostError};

/// Why an interface has no network.
#[derive(Debug, thiserror::Error)]
#[error("network interface {id}: {source}")]
pub struct OpenError {
    /// Which interface.
    pub id: String,
    /// What failed.
    pub source: OpenErrorKind,
}

/// What cannot be opened.
#[derive(Debug, thiserror::Error)]
pub enum OpenErrorKind {
    /// Its tap.
    #[error(transparent)]
    Tap(#[from] TapError),
    /// The kernel's vhost-net.
    #[error(transparent)]
    Vhost(#[from] VhostError),
    /// Its connection.
    #[error(transparent)]
    Stream(#[from] StreamError),
}

/// The network's end of a device. Clones are the same end, of which one device may use one: for an owner that tries again when a machine
/// could not be started.
#[derive(Debug, Clone)]
pub struct NetBackend {
    pub(super) kind: Kind,
}

#[derive(Debug, Clone)]
pub(super) enum Kind {
    /// A tap that the io workers read and write.
    Tap(Arc<Tap>),
    /// A tap that the kernel reads and writes.
    Vhost(Arc<Tap>, Vec<Arc<Vhost>>),
    /// A connection to a network in another process.
    Stream(Box<Stream>),
    /// Nothing: the link is down. So many pairs.
    Unplugged(u16),
}

impl NetBackend {
    /// Opens what `network`, which was checked, names. A tap that does not exist is made, where the user may.
    pub fn open(network: &NetworkInterface) -> Result<Self, OpenError> {
        Self::try_open(network).map_err(|source| OpenError { id: network.iface_id.clone(), source })
    }

    /// Opens what `network` names and is there: the network of a guest that goes on is no new one that leads nowhere. Where it names
    /// nothing, there is none.
    pub fn open_existing(network: &NetworkInterface) -> Result<Self, OpenError> {
        if !network.has_host_endpoint() {
            return Ok(Self::unplugged(network.num_queues()));
        }
        if let (Some(name), None) = (&network.host_dev_name, &network.fds)
            && let TapSource::Name(name) = TapSource::of(name)
        {
            let failed = |source: TapError| OpenError { id: network.iface_id.clone(), source: source.into() };
            if !tap::exists(name).map_err(failed)? {
                return Err(failed(TapError::Missing { name: name.to_owned() }));
            }
        }
        Self::open(network)
    }

    fn try_open(network: &NetworkInterface) -> Result<Self, OpenErrorKind> {
        if network.backend == NetBackendKind::Passt {
            let socket = network.socket.as_deref().unwrap_or(Path::new(""));
            return Ok(Self::stream(Stream::connect(socket)?));
        }
        let source = match (&network.fds, &network.host_dev_name) {
            (Some(fds), _) => TapSource::Descriptors(fds),
            (None, name) => TapSource::of(name.as_deref().unwrap_or_default()),
        };
        let tap = Tap::open(source, network.num_queues())?;
        Ok(if network.backend == NetBackendKind::Vhost { Self::vhost(tap)? } else { Self::tap(tap) })
    }

    /// A tap, served by the io workers.
    pub fn tap(tap: Tap) -> Self {
        NetBackend { kind: Kind::Tap(Arc::new(tap)) }
    }

    /// A tap, served by the kernel's vhost-net, which has to be there.
    pub fn vhost(tap: Tap) -> Result<Self, VhostError> {
        let vhosts = (0..tap.queues()).map(|_| Vhost::open().map(Arc::new)).collect::<Result<_, _>>()?;
        Ok(NetBackend { kind: Kind::Vhost(Arc::new(tap), vhosts) })
    }

    /// A connection to a network in another process.
    pub fn stream(stream: Stream) -> Self {
        NetBackend { kind: Kind::Stream(Box::new(stream)) }
    }

    /// No network, for an interface of a restored guest that has none here: its link is down.
    pub fn unplugged(pairs: u16) -> Self {
        NetBackend { kind: Kind::Unplugged(pairs) }
    }

    /// Whether the other end is still there, as far as can be seen.
    pub fn is_there(&self) -> bool {
        match &self.kind {
            Kind::Tap(tap) | Kind::Vhost(tap, _) => tap.look().is_ok(),
            Kind::Stream(stream) => stream.is_there(),
            Kind::Unplugged(_) => true,
        }
    }

    /// Its descriptors: what a process keeps that is to have it.
    pub fn descriptors(&self) -> Vec<RawFd> {
        match &self.kind {
            Kind::Tap(tap) => tap.descriptors().collect(),
            Kind::Vhost(tap, vhosts) => {
                tap.descriptors().chain(vhosts.iter().map(|vhost| vhost.descriptor())).collect()
            }
            Kind::Stream(stream) => vec![stream.fd().as_raw_fd()],
            Kind::Unplugged(_) => Vec::new(),
        }
    }

    /// How many pairs of queues it can serve.
    pub fn pairs(&self) -> usize {
        match &self.kind {
            Kind::Tap(tap) | Kind::Vhost(tap, _) => tap.queues(),
            Kind::Stream(_) => 1,
            Kind::Unplugged(pairs) => usize::from(*pairs),
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
                let all = |features, vhost: &Arc<Vhost>| features & vhost.features();
                let kernel = vhosts.iter().fold(u64::MAX, all);
                tap.features() & (kernel | !feature::MRG_RXBUF)
            }
            Kind::Stream(_) => feature::MRG_RXBUF,
            // What comes from nowhere lacks nothing.
            Kind::Unplugged(_) => {
                feature::OFFLOADS
                    | feature::MRG_RXBUF
                    | feature::HOST_USO
                    | feature::GUEST_USO4
                    | feature::GUEST_USO6
            }
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

    /// Takes the next frame from the network and drops it. [`Errno::AGAIN`]: there is none.
    pub(super) fn discard(&mut self) -> Result<(), Errno> {
        match self {
            Link::Tap(tap, queue) => {
                // The kernel drops what the buffer has no room for.
                let mut head = [0; 64];
                match rustix::io::retry_on_intr(|| rustix::io::read(tap.queue(*queue), &mut head[..]))? {
                    // No tap gives that: it is the end of something else.
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

    /// Lets go what was gathered.
    pub(super) fn flush(&mut self) -> Result<(), Errno> {
        match self {
            Link::Tap(..) => Ok(()),
            Link::Stream(stream) => stream.flush(),
        }
    }

    /// It is of no use any more, and whoever is at the other end hears of it.
    pub(super) fn close(self) {
        if let Link::Stream(stream) = self {
            stream.hang_up();
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
