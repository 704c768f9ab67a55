//! Devices on virtio-pci: one bus, reached through ECAM, two ports and the window of BARs.
//!
//! # Interrupts
//!
//! A message is sent with `KVM_SIGNAL_MSI`, by the worker that raises it. The other way, an irqfd with a route for each vector, costs a
//! descriptor per vector, and a grace period of the kernel for each message that a guest writes while it sets up its devices.

use std::io;
use std::sync::{Arc, Mutex, PoisonError};

use kvm_bindings::kvm_msi;
use kvm_ioctls::VmFd;
use virtio::transport::pci::{
    CONFIG_ADDRESS, ECAM_SIZE, MAX_DEVICES, MsiMessage, MsiVectors, PciRoot, PciTransport,
};
use virtio::transport::{Attachment, IoEventFds};

use super::DeviceError;
use super::place::first_bar;
use crate::bus::BusDevice;
use crate::kvm::Vm;
use crate::layout;
use crate::vcpu::Buses;

/// The bus, reachable for the guest.
pub(super) fn root(buses: &mut Buses, io_events: Arc<dyn IoEventFds>) -> Arc<PciRoot> {
    let root = Arc::new(PciRoot::new(layout::PCI_BARS, io_events));
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
    root.plug(Some(slot), Arc::clone(&function)).expect("each device was given a slot of its own");
    Ok(function)
}

/// The configuration spaces in memory.
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
    /// Locked to copy a message, no longer: one that is half changed is never sent.
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
        *slot.lock().unwrap_or_else(PoisonError::into_inner) = Some(message);
        Ok(())
    }

    fn trigger(&self, vector: u16) {
        let message = self.vectors.get(usize::from(vector));
        let message = message.and_then(|slot| *slot.lock().unwrap_or_else(PoisonError::into_inner));
        let Some(MsiMessage { addr, data }) = message else { return };
        let msi =
            kvm_msi { address_lo: addr as u32, address_hi: (addr >> 32) as u32, data, ..Default::default() };
        // It fails where the guest's message addresses no vCPU: the guest's loss, as on real hardware.
        let _ = self.vm.signal_msi(msi);
    }
}
