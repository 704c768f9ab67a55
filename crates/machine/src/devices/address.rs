//! Where the guest finds virtio devices.
//!
//! Addresses are given out before the guest's ACPI tables are written. Both transports number
//! devices in the order of the [device table](super::table).

use virtio::transport::mmio::{self, IRQ_LINES, WINDOW_SIZE};
use virtio::transport::pci::{self, BAR_SIZE};

use super::error::DeviceError;
use crate::layout;

/// The addresses of all devices of a machine.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum DeviceAddresses {
    /// On virtio-mmio, each device has a window and an interrupt line of its own.
    Mmio(Vec<MmioWindow>),
    /// On virtio-pci, this many devices are in the slots of bus 0, from slot 1 on.
    Pci(usize),
}

/// The registers of a device on virtio-mmio.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct MmioWindow {
    /// Guest-physical address of the window; it is 4 KiB long.
    pub(crate) addr: u64,
    /// The device's interrupt line (GSI).
    pub(crate) irq: u32,
}

impl DeviceAddresses {
    /// Addresses for `count` devices.
    pub(super) fn new(count: usize, pci: bool) -> Result<Self, DeviceError> {
        let (max, of) = if pci {
            (pci::MAX_DEVICES, "PCI slot")
        } else {
            (mmio::MAX_DEVICES, "interrupt line (with --enable-pci there are more)")
        };
        if count > max {
            return Err(DeviceError::TooMany { count, max, of });
        }
        if pci {
            return Ok(DeviceAddresses::Pci(count));
        }
        let window = |(n, irq)| MmioWindow { addr: layout::VIRTIO_MMIO + n * WINDOW_SIZE, irq };
        Ok(DeviceAddresses::Mmio((0..count as u64).zip(IRQ_LINES).map(window).collect()))
    }

    /// Kernel arguments by which a kernel without ACPI finds the devices. (It finds a PCI bus by
    /// probing.)
    pub(super) fn boot_args(&self) -> Vec<String> {
        match self {
            DeviceAddresses::Mmio(windows) => std::iter::once("pci=off".to_owned())
                .chain(windows.iter().map(|w| format!("virtio_mmio.device=4K@{:#x}:{}", w.addr, w.irq)))
                .collect(),
            DeviceAddresses::Pci(_) => Vec::new(),
        }
    }
}

/// The address of the BAR of the device in `slot` until the guest moves it.
pub(super) fn first_bar(slot: u8) -> u64 {
    layout::PCI_BARS.start + (u64::from(slot) - 1) * BAR_SIZE
}
