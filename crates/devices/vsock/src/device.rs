//! The virtio device: features, configuration space, activation, save and restore.

use std::sync::atomic::{AtomicBool, AtomicU32, Ordering};
use std::sync::{Arc, Mutex};

use sync::locked;
use virtio::device::{ActivateError, Activation, Device, DeviceKind, DeviceState, read_bytes};
use virtio::worker::Task;

use crate::host_sockets::HostSockets;
use crate::shared::Shared;
use crate::state::VsockState;
use crate::stats::VsockStats;
use crate::task::{EVENT, RX, TX, VsockContext, VsockTask};

/// Maximum size of each queue, in descriptors.
const QUEUE_SIZE: u16 = 256;
const QUEUE_SIZES: [u16; 3] = [QUEUE_SIZE; 3];

/// `VIRTIO_VSOCK_F_STREAM`.
const F_STREAM: u64 = 1 << 0;
/// `VIRTIO_VSOCK_F_SEQPACKET`.
const F_SEQPACKET: u64 = 1 << 1;

/// The socket device.
#[derive(Debug)]
pub struct Vsock {
    guest_cid: u32,
    shared: Arc<Shared>,
}

/// Access to a running device: its statistics, and the reset of all connections.
#[derive(Debug, Clone)]
pub struct VsockControl {
    shared: Arc<Shared>,
}

impl Vsock {
    /// A new device with this guest CID. The CID is not checked.
    pub fn new(guest_cid: u32, sockets: HostSockets) -> (Self, VsockControl) {
        Self::with(guest_cid, 0, sockets, false)
    }

    /// A device with the saved state, with `new_cid` instead of the saved CID if given. It has no
    /// connections, and sends its driver a transport reset.
    pub fn restore(state: &VsockState, new_cid: Option<u32>, sockets: HostSockets) -> (Self, VsockControl) {
        Self::with(new_cid.unwrap_or(state.guest_cid), state.next_port, sockets, true)
    }

    fn with(guest_cid: u32, next_port: u32, sockets: HostSockets, reset: bool) -> (Self, VsockControl) {
        let shared = Arc::new(Shared {
            sockets: Mutex::new(Some(sockets)),
            reset_wanted: AtomicBool::new(reset),
            waker: Mutex::default(),
            next_port: AtomicU32::new(next_port),
            stats: Arc::default(),
        });
        (Vsock { guest_cid, shared: Arc::clone(&shared) }, VsockControl { shared })
    }
}

impl VsockControl {
    /// Resets all connections: on the host at once, in the guest as soon as its driver handles the
    /// event. A paused device does it when it is resumed.
    pub fn reset_connections(&self) {
        self.shared.reset_wanted.store(true, Ordering::Release);
        if let Some(waker) = &*locked(&self.shared.waker) {
            waker.signal();
        }
    }

    /// The device's statistics.
    pub fn stats(&self) -> &Arc<VsockStats> {
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
        // `struct virtio_vsock_config` has one field, `guest_cid`.
        read_bytes(&u64::from(self.guest_cid).to_le_bytes(), offset, data);
    }

    fn activate(&mut self, mut activation: Activation) -> Result<Vec<Box<dyn Task>>, ActivateError> {
        let mut take = |index| {
            activation.take_queue(index).inspect_err(|_| {
                self.shared.stats.activate_fails.add(1);
            })
        };
        let (rx, tx, event) = (take(RX)?, take(TX)?, take(EVENT)?);
        let sockets = locked(&self.shared.sockets).take();
        let Some(sockets) = sockets else {
            self.shared.stats.activate_fails.add(1);
            let source = std::io::ErrorKind::ResourceBusy.into();
            return Err(ActivateError::Host { doing: "take the host sockets", source });
        };
        *locked(&self.shared.waker) = Some(Arc::clone(&event.kick));
        let seqpacket = activation.features & F_SEQPACKET != 0;
        let task = VsockTask::new(
            [rx, tx, event],
            VsockContext {
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
        // A driver that starts again has no connections to reset.
        self.shared.reset_wanted.store(false, Ordering::Relaxed);
    }

    fn save(&self) -> DeviceState {
        let next_port = self.shared.next_port.load(Ordering::Relaxed);
        DeviceState::of(&VsockState { guest_cid: self.guest_cid, next_port })
    }
}
