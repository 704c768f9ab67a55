//! The socket device: the `vsock` crate.

use vsock::{HostSockets, Vsock, VsockControl, VsockState};

use crate::devices::adapter::{BuildContext, BuildError, Built, DeviceAdapter, IoWorkers};

/// What the socket device is built from.
#[derive(Debug)]
pub struct VsockSetup {
    /// The guest's context ID.
    pub guest_cid: u32,
    /// The device's sockets on the host.
    pub sockets: HostSockets,
}

/// Adapts the socket device.
pub(crate) struct VsockAdapter;

impl DeviceAdapter for VsockAdapter {
    const NOUN: &'static str = "vsock";
    type Setup = VsockSetup;
    type State = VsockState;
    type Control = VsockControl;

    fn id(_setup: &VsockSetup) -> Option<&str> {
        None
    }

    fn io_workers(_setup: &VsockSetup, _state: Option<&VsockState>) -> Result<IoWorkers, BuildError> {
        Ok(IoWorkers::Shared(1))
    }

    fn new(setup: VsockSetup, _context: BuildContext<'_>) -> Built<VsockControl> {
        let (device, control) = Vsock::new(setup.guest_cid, setup.sockets);
        Ok((Box::new(device), control))
    }

    fn restore(setup: VsockSetup, state: &VsockState, _context: BuildContext<'_>) -> Built<VsockControl> {
        // The CID may differ from the saved one: a fork has its own.
        let (device, control) = Vsock::restore(state, Some(setup.guest_cid), setup.sockets);
        Ok((Box::new(device), control))
    }
}
