//! All virtio devices of a machine as plain data.
//!
//! A device is known by its name, `drive rootfs` for example. The same names in the same order are
//! the same devices.

use serde::{Deserialize, Serialize};
use virtio::device::DeviceState;
use virtio::transport::mmio::MmioState;
use virtio::transport::pci::{PciRootState, PciState};

/// All virtio devices of a machine, as saved.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct DevicesState {
    /// The PCI bus; `None` on virtio-mmio.
    pub pci: Option<PciRootState>,
    /// The devices, in order of their addresses.
    pub devices: Vec<SavedDevice>,
}

/// A device, as saved.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct SavedDevice {
    /// The device's name.
    pub name: String,
    /// The transport's state, which contains the device's.
    pub transport: SavedTransport,
}

/// A transport with its device, as saved.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub enum SavedTransport {
    /// On virtio-mmio.
    Mmio(MmioState),
    /// On virtio-pci.
    Pci(PciState),
}

impl SavedDevice {
    /// The device's own state.
    pub fn device(&self) -> &DeviceState {
        match &self.transport {
            SavedTransport::Mmio(state) => &state.common.device,
            SavedTransport::Pci(state) => &state.common.device,
        }
    }
}

impl DevicesState {
    /// The state of the device called `name`.
    pub fn device(&self, name: &str) -> Option<&DeviceState> {
        self.devices.iter().find(|saved| saved.name == name).map(SavedDevice::device)
    }
}
