//! Where in the guest devices lie, and how a guest is told.
//!
//! Places are given out before the guest's tables are written: both transports number devices in the order of the table in
//! [`super`].

use virtio::transport::mmio::{self, IRQ_LINES, WINDOW_SIZE};
use virtio::transport::pci::{self, BAR_SIZE};

use super::DeviceError;
use crate::layout;

/// Where all devices of a machine lie.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum Places {
    /// Each has a window and an interrupt line of its own.
    Mmio(Vec<Window>),
    /// They are on PCI bus 0, in slots from 1 on: so many.
    Pci(usize),
}

/// A device's place on virtio-mmio.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Window {
    /// Guest-physical address of its 4 KiB.
    pub(crate) addr: u64,
    /// Its interrupt line.
    pub(crate) irq: u32,
}

impl Places {
    /// Places for `count` devices, on PCI or not.
    pub(super) fn new(count: usize, pci: bool) -> Result<Self, DeviceError> {
        let (max, what) = if pci {
            (pci::MAX_DEVICES, "PCI slots")
        } else {
            (mmio::MAX_DEVICES, "interrupt lines (--enable-pci has more)")
        };
        if count > max {
            return Err(DeviceError::TooMany { count, max, what });
        }
        if pci {
            return Ok(Places::Pci(count));
        }
        let windows = (0..count as u64).zip(IRQ_LINES);
        let window = |(n, irq)| Window { addr: layout::VIRTIO_MMIO + n * WINDOW_SIZE, irq };
        Ok(Places::Mmio(windows.map(window).collect()))
    }

    /// What a kernel without ACPI has to read on its command line to find them. (PCI it finds by itself.)
    pub(super) fn boot_args(&self) -> Vec<String> {
        match self {
            Places::Mmio(windows) => std::iter::once("pci=off".to_owned())
                .chain(windows.iter().map(|w| format!("virtio_mmio.device=4K@{:#x}:{}", w.addr, w.irq)))
                .collect(),
            Places::Pci(_) => Vec::new(),
        }
    }
}

/// Where the BAR of the device in `slot` is before the guest moves it.
pub(super) fn first_bar(slot: u8) -> u64 {
    layout::PCI_BARS.start + (u64::from(slot) - 1) * BAR_SIZE
}
