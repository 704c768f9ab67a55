//! The saved state of the device.

use serde::{Deserialize, Serialize};
use virtio::device::DeviceData;

/// The state that the device saves. Connections are not part of it.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct VsockState {
    /// The guest's context ID.
    pub guest_cid: u32,
    /// Index of the next host port for a host client, counted from the first dynamic port.
    ///
    /// A guest remembers a connection that was reset until its program has closed the socket. Until
    /// then it would refuse another connection with the same pair of ports.
    #[serde(default)]
    pub next_port: u32,
}

impl DeviceData for VsockState {
    const NAME: &'static str = "Vsock";
}
