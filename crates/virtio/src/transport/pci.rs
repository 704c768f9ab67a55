//! virtio over PCI, modern (4.1): a type-0 function with its registers in one 64-bit BAR, and
//! MSI-X.
//!
//! # The BAR
//!
//! | offset  | contents                                         |
//! |---------|--------------------------------------------------|
//! | 0x00000 | common configuration (4.1.4.3)                   |
//! | 0x02000 | ISR status (4.1.4.5)                             |
//! | 0x04000 | device-specific configuration (4.1.4.6)          |
//! | 0x06000 | notifications (4.1.4.4), 4 bytes for each queue  |
//! | 0x08000 | MSI-X table                                      |
//! | 0x48000 | MSI-X pending bits                               |
//!
//! # Interrupts
//!
//! There is one MSI-X vector for each queue and one for configuration changes. The driver maps
//! them. There are no pin interrupts: a driver without MSI-X must poll.
//!
//! # The address of the BAR
//!
//! The guest may move the BAR within the machine's window for 64-bit BARs. It is decoded while the
//! command register enables memory accesses. The doorbells stay registered at the address where the
//! BAR was last decoded, until another function decodes that address (`doorbells`).

mod capabilities;
mod config_space;
mod doorbells;
mod function;
mod msix;
mod root;
#[cfg(test)]
mod tests;
mod vector_mask;

pub use config_space::ConfigState;
pub use function::{PciState, PciTransport};
pub use msix::{MsiMessage, MsiVectors, MsixState};
pub use root::{CONFIG_ADDRESS, ECAM_SIZE, MAX_DEVICES, PciRoot, PciRootState, SlotError};

use std::ops::Range;

use crate::device::DeviceKind;

/// The size and the alignment of a device's BAR 0 in bytes.
pub const BAR_SIZE: u64 = 512 << 10;

/// The areas of the BAR.
mod layout {
    pub(super) const COMMON: u32 = 0x0000;
    pub(super) const ISR: u32 = 0x2000;
    pub(super) const DEVICE: u32 = 0x4000;
    pub(super) const NOTIFY: u32 = 0x6000;
    /// The size of each of the four areas above.
    pub(super) const PART: u32 = 0x1000;
    /// Bytes of the notification area for each queue.
    pub(super) const NOTIFY_MULTIPLIER: u32 = 4;
    pub(super) const MSIX_TABLE: u32 = 0x8000;
    pub(super) const MSIX_PBA: u32 = 0x48000;
    /// The most vectors of an MSI-X table.
    pub(super) const MAX_VECTORS: usize = 2048;
}

/// The PCI ids of virtio devices: Red Hat's vendor id, and 0x1040 plus the device id.
const VENDOR: u16 = 0x1af4;
const DEVICE_BASE: u16 = 0x1040;

/// The class code of a device: class, subclass, interface.
fn class_code(kind: DeviceKind) -> u32 {
    match kind {
        DeviceKind::Net => 0x02_00_00,
        // Mass storage, other.
        DeviceKind::Block | DeviceKind::Fs => 0x01_80_00,
        // Simple communication, other.
        DeviceKind::Console => 0x07_80_00,
        // Unassigned class.
        DeviceKind::Entropy
        | DeviceKind::Balloon
        | DeviceKind::Vsock
        | DeviceKind::Mem
        | DeviceKind::Pmem => 0xff_00_00,
    }
}

/// The guest-physical window for BARs.
pub type BarWindow = Range<u64>;
