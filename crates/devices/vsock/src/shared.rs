//! State that the device, its task and its control share.

use std::sync::atomic::{AtomicBool, AtomicU32};
use std::sync::{Arc, Mutex};

use sync::EventFd;

use crate::host_sockets::HostSockets;
use crate::stats::VsockStats;

/// State that the device, its task and its control share.
#[derive(Debug)]
pub(crate) struct Shared {
    /// The host sockets, unless the task of an active device has them.
    pub(crate) sockets: Mutex<Option<HostSockets>>,
    /// All connections are to be reset.
    pub(crate) reset_wanted: AtomicBool,
    /// Wakes the task of an active device.
    pub(crate) waker: Mutex<Option<Arc<EventFd>>>,
    /// Saved as `VsockState::next_port`. Only the task changes it.
    pub(crate) next_port: AtomicU32,
    pub(crate) stats: Arc<VsockStats>,
}
