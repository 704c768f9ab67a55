//! Network backends: what a network device is connected to.
//!
//! | module      | what it is                                                              |
//! |-------------|-------------------------------------------------------------------------|
//! | [`tap`]     | a tap or macvtap of the host                                            |
//! | [`vhost`]   | the kernel's vhost-net, which moves the frames of a tap                 |
//! | [`stream`]  | a Unix stream socket of another process, as `passt` serves it           |
//! | `link`      | the network end of one queue pair that an io worker serves              |
//! | `rtnetlink` | looks up a network interface of the host by name                        |

mod link;
mod rtnetlink;
pub mod stream;
pub mod tap;
pub mod vhost;

use std::os::fd::{AsRawFd, RawFd};
use std::path::Path;
use std::sync::Arc;

use config::{NetBackendKind, NetworkInterface};

use crate::config_space::feature;
pub(crate) use link::Link;
use stream::{Stream, StreamError};
use tap::{Tap, TapError, TapSource};
use vhost::{Vhost, VhostError};

/// Why the backend of a network interface cannot be opened.
#[derive(Debug, thiserror::Error)]
#[error("network interface {id}: {source}")]
pub struct OpenError {
    /// Id of the interface.
    pub id: String,
    /// The error of its backend.
    pub source: OpenErrorKind,
}

/// The error of a backend.
#[derive(Debug, thiserror::Error)]
pub enum OpenErrorKind {
    /// The tap cannot be used.
    #[error(transparent)]
    Tap(#[from] TapError),
    /// The kernel's vhost-net cannot be used.
    #[error(transparent)]
    Vhost(#[from] VhostError),
    /// The server's socket cannot be used.
    #[error(transparent)]
    Stream(#[from] StreamError),
}

/// The backend of a network device.
///
/// Clones share the descriptors, and only one device may use them. A caller keeps a clone to try
/// again after a machine could not be started.
#[derive(Debug, Clone)]
pub struct NetBackend {
    pub(crate) kind: BackendKind,
}

#[derive(Debug, Clone)]
pub(crate) enum BackendKind {
    /// A tap that the io workers read and write.
    Tap(Arc<Tap>),
    /// A tap that the kernel's vhost-net reads and writes, with one instance for each queue pair.
    Vhost(Arc<Tap>, Vec<Arc<Vhost>>),
    /// A connection to another process.
    Stream(Box<Stream>),
    /// No network, for this number of queue pairs: the link is down.
    Unplugged(u16),
}

impl NetBackend {
    /// Opens the backend of `network`, which was validated. A tap that does not exist is created
    /// if this user may do so.
    pub fn open(network: &NetworkInterface) -> Result<Self, OpenError> {
        Self::try_open(network).map_err(|source| OpenError { id: network.iface_id.clone(), source })
    }

    /// Opens the backend of an interface of a restored or forked guest.
    ///
    /// A missing tap is an error; it is never created, because a new tap would lead nowhere. An
    /// interface that names no network gets [`NetBackend::unplugged`].
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

    /// A tap that the io workers serve.
    pub fn tap(tap: Tap) -> Self {
        NetBackend { kind: BackendKind::Tap(Arc::new(tap)) }
    }

    /// A tap that the kernel's vhost-net serves. Opens one instance for each queue pair.
    pub fn vhost(tap: Tap) -> Result<Self, VhostError> {
        let vhosts = (0..tap.queues()).map(|_| Vhost::open().map(Arc::new)).collect::<Result<_, _>>()?;
        Ok(NetBackend { kind: BackendKind::Vhost(Arc::new(tap), vhosts) })
    }

    /// A connection to another process.
    pub fn stream(stream: Stream) -> Self {
        NetBackend { kind: BackendKind::Stream(Box::new(stream)) }
    }

    /// No network: the link of the interface is down.
    pub fn unplugged(pairs: u16) -> Self {
        NetBackend { kind: BackendKind::Unplugged(pairs) }
    }

    /// Whether the tap still exists or the peer is still connected, as far as the host tells.
    pub fn is_there(&self) -> bool {
        match &self.kind {
            BackendKind::Tap(tap) | BackendKind::Vhost(tap, _) => tap.probe().is_ok(),
            BackendKind::Stream(stream) => stream.is_there(),
            BackendKind::Unplugged(_) => true,
        }
    }

    /// Descriptors of the backend, which a forked child must keep open.
    pub fn descriptors(&self) -> Vec<RawFd> {
        match &self.kind {
            BackendKind::Tap(tap) => tap.descriptors().collect(),
            BackendKind::Vhost(tap, vhosts) => {
                tap.descriptors().chain(vhosts.iter().map(|vhost| vhost.descriptor())).collect()
            }
            BackendKind::Stream(stream) => vec![stream.fd().as_raw_fd()],
            BackendKind::Unplugged(_) => Vec::new(),
        }
    }

    /// Number of queue pairs that the backend serves.
    pub fn pairs(&self) -> usize {
        match &self.kind {
            BackendKind::Tap(tap) | BackendKind::Vhost(tap, _) => tap.queues(),
            BackendKind::Stream(_) => 1,
            BackendKind::Unplugged(pairs) => usize::from(*pairs),
        }
    }

    /// Whether the kernel moves the frames, so that the monitor sees none of them.
    pub fn is_vhost(&self) -> bool {
        matches!(self.kind, BackendKind::Vhost(..))
    }

    /// Device features that the backend supports.
    pub(crate) fn features(&self) -> u64 {
        match &self.kind {
            BackendKind::Tap(tap) => tap.features(),
            BackendKind::Vhost(tap, vhosts) => {
                let all = |features, vhost: &Arc<Vhost>| features & vhost.features();
                let kernel = vhosts.iter().fold(u64::MAX, all);
                tap.features() & (kernel | !feature::MRG_RXBUF)
            }
            BackendKind::Stream(_) => feature::MRG_RXBUF,
            // No frame ever passes, so any feature of the saved guest is supported.
            BackendKind::Unplugged(_) => {
                feature::OFFLOADS
                    | feature::MRG_RXBUF
                    | feature::HOST_USO
                    | feature::GUEST_USO4
                    | feature::GUEST_USO6
            }
        }
    }
}
