//! The socket device (5.10): connections between programs in the guest and programs on the host, without a network.
//!
//! # The host's side
//!
//! ```text
//!  host client --> {uds_path}: "CONNECT port\n" --> guest's port        answered by "OK hostport\n" once the guest accepts
//!  guest       --> CID 2, port P              --> {uds_path}_P          served by any program that listens there
//! ```
//!
//! Each connection is one Unix socket, of the same kind as the guest's: a stream, or a sequence of messages (`SOCK_SEQPACKET`).
//! Half-closes travel both ways as `shutdown(2)` and `VIRTIO_VSOCK_OP_SHUTDOWN`. Where nobody listens, or the guest refuses, the
//! other side learns it at once: a reset here, a closed socket there.
//!
//! # How it works
//!
//! One task on one io worker has all three queues. Descriptors are watched edge-triggered, so that a connection costs one `epoll_ctl`
//! when it begins and one whenever its host socket is full.
//!
//! - [`packet`]: the header. [`credit`]: who may send how much. [`connect_request`]: what host clients say first. [`socket`]: Unix sockets.
//! - [`connection`]: one connection, and what goes on between it and its socket. [`tx_buf`]: what its socket has not taken yet.
//! - [`table`]: all connections: by ports, by deadline, and the line of those that have something for the guest.
//! - [`muxer`]: all of it together, and how connections begin and end. [`from_guest`], [`from_host`]: what packets and events do to them.
//! - [`to_guest`]: filling the guest's buffers.
//! - [`task`]: the queues, and the order of work.
//!
//! Data is not copied on its way: a host socket is read straight into the guest's buffers (as many of them at once as the guest has
//! credit for), and the guest's packets are written straight to the socket. Only what a socket does not take at once is kept, at most as
//! much as the guest was promised credit for. (Messages are copied once: they have to be whole.)
//!
//! # Invariants
//!
//! - Memory is bounded: [`MAX_CONNECTIONS`], [`MAX_BUFFERED`] bytes of data for all of them together, and a bounded number of
//!   resets that wait to be told.
//! - No connection waits for another: those with something for the guest take turns of at most [`to_guest::QUANTUM`] bytes; the guest's packets are
//!   taken whether or not the guest takes ours (5.10.6.1).
//! - A connection that ends is forgotten on both sides, or has a deadline after which it is.
//!
//! # Errors
//!
//! A packet that makes no sense, or that breaks the rules of credit, resets the connection that it names and is counted. A broken queue makes the device
//! need a reset. A host peer that dies or never reads ends or stalls its own connection only.
//!
//! # Save and restore
//!
//! Connections are not saved: the host's ends belong to this process. A restored device tells its
//! driver so (`VIRTIO_VSOCK_EVENT_TRANSPORT_RESET`), on which the driver resets its sockets and
//! reads its CID again. [`VsockControl::reset_connections`] does the same to a running device.
//!
//! The driver also resets a connection that it accepts before it handles the event, and tells
//! nobody. So host clients wait until it has, which it shows by giving the event's buffer back, but
//! for 250 ms at most: a busy guest could stretch it. From then on the guest is asked for their
//! connections, and an acceptance that comes before the driver has handled the event is not passed on
//! to the client: that connection is reset, and the guest is asked for another one, of a fresh
//! port, when the driver has handled the event. No data is lost: the client's is still in its
//! socket. A driver that never gives the buffer back lets its first clients wait for 10 seconds.

#![deny(unsafe_code)]

mod tx_buf;
mod connection;
mod credit;
mod from_guest;
mod from_host;
#[cfg(any(test, feature = "testing"))]
pub mod fuzz;
mod connect_request;
mod guest_io;
mod packet;
mod listener;
mod stats;
mod muxer;
mod table;
mod task;
#[cfg(test)]
mod tests;
mod to_guest;

use std::sync::atomic::{AtomicBool, AtomicU32, Ordering};
use std::sync::{Arc, Mutex};

use serde::{Deserialize, Serialize};

use sync::EventFd;
use sync::locked;
use task::VsockTask;
use virtio::device::{ActivateError, Activation, Device, DeviceData, DeviceKind, DeviceState, read_bytes};
use virtio::worker::Task;

pub use packet::SocketKind;
pub use listener::{
    BindError, HostSockets, Listener, MAX_PATH_LEN, Occupant, SocketFile, is_possible as socket_is_possible,
};
pub use stats::{Counter, VsockStats};
pub use table::{MAX_CONNECTIONS, MAX_BUFFERED};

/// Descriptors in each queue.
const QUEUE_SIZE: u16 = 256;
const QUEUE_SIZES: [u16; 3] = [QUEUE_SIZE; 3];

/// Packets to the guest.
const RX: u16 = 0;
/// Packets from the guest.
const TX: u16 = 1;
/// Events.
const EVENT: u16 = 2;

/// `VIRTIO_VSOCK_F_STREAM`.
const F_STREAM: u64 = 1 << 0;
/// `VIRTIO_VSOCK_F_SEQPACKET`.
const F_SEQPACKET: u64 = 1 << 1;

/// What the device saves.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct VsockState {
    /// The guest's context id.
    pub guest_cid: u32,
    /// Which port a host client gets next, of those that they get in turn. A guest goes on knowing a connection that was reset until its
    /// program has closed it, and would refuse another one of the same ports.
    #[serde(default)]
    pub next_port: u32,
}

impl DeviceData for VsockState {
    const NAME: &'static str = "Vsock";
}

/// What the front, its task and its control share.
#[derive(Debug)]
struct Shared {
    /// Here while the device is not active.
    sockets: Mutex<Option<HostSockets>>,
    /// All connections are to be reset.
    reset_wanted: AtomicBool,
    /// Wakes the task, if there is one.
    waker: Mutex<Option<Arc<EventFd>>>,
    /// [`VsockState::next_port`], which only the task changes.
    next_port: AtomicU32,
    stats: VsockStats,
}

/// The front of the device.
#[derive(Debug)]
pub struct Vsock {
    guest_cid: u32,
    shared: Arc<Shared>,
}

/// What can be done to the device while it works.
#[derive(Debug, Clone)]
pub struct VsockControl {
    shared: Arc<Shared>,
}

impl Vsock {
    /// A device whose guest has this CID (any will do).
    pub fn new(guest_cid: u32, sockets: HostSockets) -> (Self, VsockControl) {
        Self::with(guest_cid, 0, sockets, false)
    }

    /// The device as it was saved, but for its connections, which its driver will hear are gone. A new CID may be given to it.
    pub fn restore(state: &VsockState, new_cid: Option<u32>, sockets: HostSockets) -> (Self, VsockControl) {
        Self::with(new_cid.unwrap_or(state.guest_cid), state.next_port, sockets, true)
    }

    fn with(guest_cid: u32, next_port: u32, sockets: HostSockets, reset: bool) -> (Self, VsockControl) {
        let shared = Arc::new(Shared {
            sockets: Mutex::new(Some(sockets)),
            reset_wanted: AtomicBool::new(reset),
            waker: Mutex::default(),
            next_port: AtomicU32::new(next_port),
            stats: VsockStats::default(),
        });
        (Vsock { guest_cid, shared: Arc::clone(&shared) }, VsockControl { shared })
    }
}

impl VsockControl {
    /// Ends all connections, on the host at once and in the guest as soon as its driver hears of it. Of a paused device, when it goes on.
    pub fn reset_connections(&self) {
        self.shared.reset_wanted.store(true, Ordering::Release);
        if let Some(waker) = &*locked(&self.shared.waker) {
            waker.signal();
        }
    }

    /// What the device counted.
    pub fn stats(&self) -> &VsockStats {
        &self.shared.stats
    }
}

impl Device for Vsock {
    fn kind(&self) -> DeviceKind {
        DeviceKind::Vsock
    }

    fn features(&self) -> u64 {
        F_STREAM | F_SEQPACKET
    }

    fn queue_sizes(&self) -> &[u16] {
        &QUEUE_SIZES
    }

    fn read_config(&self, offset: u64, data: &mut [u8]) {
        read_bytes(&u64::from(self.guest_cid).to_le_bytes(), offset, data);
    }

    fn activate(&mut self, mut activation: Activation) -> Result<Vec<Box<dyn Task>>, ActivateError> {
        let mut take =
            |index| activation.take_queue(index).inspect_err(|_| self.shared.stats.activate_fails.add(1));
        let (rx, tx, event) = (take(RX)?, take(TX)?, take(EVENT)?);
        let sockets = locked(&self.shared.sockets).take();
        let Some(sockets) = sockets else {
            self.shared.stats.activate_fails.add(1);
            let source = std::io::ErrorKind::ResourceBusy.into();
            return Err(ActivateError::Host { doing: "take the host's sockets", source });
        };
        *locked(&self.shared.waker) = Some(Arc::clone(&event.kick));
        let seqpacket = activation.features & F_SEQPACKET != 0;
        let task = VsockTask::new(
            [rx, tx, event],
            task::VsockContext {
                memory: activation.memory,
                interrupt: activation.interrupt,
                shared: Arc::clone(&self.shared),
                sockets,
                guest_cid: self.guest_cid,
                seqpacket,
            },
        );
        Ok(vec![Box::new(task)])
    }

    fn reset(&mut self) {
        *locked(&self.shared.waker) = None;
        // A driver that starts anew has no connections to hear about.
        self.shared.reset_wanted.store(false, Ordering::Relaxed);
    }

    fn save(&self) -> DeviceState {
        let next_port = self.shared.next_port.load(Ordering::Relaxed);
        DeviceState::of(&VsockState { guest_cid: self.guest_cid, next_port })
    }
}
