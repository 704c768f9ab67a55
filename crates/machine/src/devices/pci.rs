//! Devices on virtio-pci: one bus, reached through ECAM, ports 0xcf8 to 0xcff and the window of
//! BARs.
//!
//! # Interrupts
//!
//! The worker that raises an interrupt sends its message with `KVM_SIGNAL_MSI`. An irqfd with a
//! route for each vector would cost a descriptor per vector. It would also cost a grace period of
//! the kernel for each message that a guest writes while it sets up its devices.

use std::io;
use std::sync::{Arc, Mutex};

use kvm_bindings::kvm_msi;
use kvm_ioctls::VmFd;
use sync::locked;
use virtio::transport::pci::{
    CONFIG_ADDRESS, ECAM_SIZE, MAX_DEVICES, MsiMessage, MsiVectors, PciRoot, PciTransport,
};
use virtio::transport::{Attachment, IoEventFds};

use super::address::first_bar;
use super::error::DeviceError;
use crate::bus::BusDevice;
use crate::bus::Buses;
use crate::kvm::Vm;
use crate::layout;

/// Creates the PCI bus and puts its registers on the machine's buses.
pub(super) fn add_root(buses: &mut Buses, io_event_fds: Arc<dyn IoEventFds>) -> Arc<PciRoot> {
    let root = Arc::new(PciRoot::new(layout::PCI_BARS, io_event_fds));
    let mut mmio = |range: std::ops::Range<u64>, device| {
        buses.mmio.add(range, device).expect("the layout sets PCI's addresses aside");
    };
    mmio(layout::ECAM..layout::ECAM + ECAM_SIZE, Arc::new(Ecam(Arc::clone(&root))) as Arc<dyn BusDevice>);
    mmio(layout::PCI_BARS, Arc::new(Bars(Arc::clone(&root))));
    let ports = u64::from(CONFIG_ADDRESS);
    buses
        .ports
        .add(ports..ports + 8, Arc::new(Ports(Arc::clone(&root))))
        .expect("the layout sets PCI's ports aside");
    root
}

/// Puts a device in `slot`, which is free.
pub(super) fn plug(
    attachment: Attachment,
    slot: u8,
    vm: &Vm,
    root: &PciRoot,
) -> Result<Arc<Mutex<PciTransport>>, DeviceError> {
    debug_assert!((1..=MAX_DEVICES).contains(&slot.into()));
    let queues = attachment.device.queue_sizes().len();
    let vectors = Box::new(Messages::new(vm.shared_fd(), queues + 1));
    let function = root
        .new_function(attachment, first_bar(slot), vectors)
        .map_err(|source| DeviceError::Host { what: "a virtio device", source })?;
    let function = Arc::new(Mutex::new(function));
    root.plug(Some(slot), Arc::clone(&function)).expect("there is a slot for each device");
    Ok(function)
}

/// The configuration spaces in memory (ECAM).
struct Ecam(Arc<PciRoot>);

impl BusDevice for Ecam {
    fn read(&self, offset: u64, data: &mut [u8]) {
        self.0.read_ecam(offset, data);
    }

    fn write(&self, offset: u64, data: &[u8]) {
        self.0.write_ecam(offset, data);
    }
}

/// The configuration spaces behind ports 0xcf8 to 0xcff.
struct Ports(Arc<PciRoot>);

impl BusDevice for Ports {
    fn read(&self, offset: u64, data: &mut [u8]) {
        self.0.read_port(offset as u16, data);
    }

    fn write(&self, offset: u64, data: &[u8]) {
        self.0.write_port(offset as u16, data);
    }
}

/// The window that all BARs are in.
struct Bars(Arc<PciRoot>);

impl BusDevice for Bars {
    fn read(&self, offset: u64, data: &mut [u8]) {
        self.0.read_bar(layout::PCI_BARS.start + offset, data);
    }

    fn write(&self, offset: u64, data: &[u8]) {
        self.0.write_bar(layout::PCI_BARS.start + offset, data);
    }
}

/// The messages of one device.
struct Messages {
    vm: Arc<VmFd>,
    /// Each is locked to copy its message, so that no half-changed message is sent.
    vectors: Vec<Mutex<Option<MsiMessage>>>,
}

impl Messages {
    fn new(vm: Arc<VmFd>, count: usize) -> Self {
        Messages { vm, vectors: (0..count).map(|_| Mutex::new(None)).collect() }
    }
}

impl MsiVectors for Messages {
    fn set(&self, vector: u16, message: MsiMessage) -> io::Result<()> {
        let slot = self.vectors.get(usize::from(vector)).ok_or(io::ErrorKind::InvalidInput)?;
        *locked(slot) = Some(message);
        Ok(())
    }

    fn trigger(&self, vector: u16) {
        let message = self.vectors.get(usize::from(vector));
        let message = message.and_then(|slot| *locked(slot));
        let Some(MsiMessage { addr, data }) = message else { return };
        let msi =
            kvm_msi { address_lo: addr as u32, address_hi: (addr >> 32) as u32, data, ..Default::default() };
        // It fails if the guest's message addresses no vCPU. The interrupt is lost, as on hardware.
        let _ = self.vm.signal_msi(msi);
    }
}
