//! Devices on virtio-mmio: each has a window on the MMIO bus and an interrupt line.

use std::sync::{Arc, Mutex};

use sync::{EventFd, locked};
use virtio::transport::mmio::{IrqLine, MmioTransport, WINDOW_SIZE};
use virtio::transport::{Attachment, IoEventFds};

use super::address::MmioWindow;
use super::error::DeviceError;
use crate::bus::{Bus, BusDevice};
use crate::kvm::Vm;

/// Puts a device at `window`.
pub(super) fn plug(
    attachment: Attachment,
    window: MmioWindow,
    vm: &Vm,
    io_event_fds: Arc<dyn IoEventFds>,
    bus: &mut Bus,
) -> Result<Arc<Mutex<MmioTransport>>, DeviceError> {
    let event = EventFd::new().map_err(|source| DeviceError::Host { what: "an interrupt line", source })?;
    vm.register_irqfd(&event, window.irq)?;
    let transport = MmioTransport::new(attachment, window.addr, Box::new(Line(event)), io_event_fds)
        .map_err(|source| DeviceError::Host { what: "a virtio device", source })?;
    let transport = Arc::new(Mutex::new(transport));
    bus.add(window.addr..window.addr + WINDOW_SIZE, Arc::new(Registers(Arc::clone(&transport))))
        .expect("the layout gives each device its own window");
    Ok(transport)
}

/// A device's window on the bus.
struct Registers(Arc<Mutex<MmioTransport>>);

impl BusDevice for Registers {
    fn read(&self, offset: u64, data: &mut [u8]) {
        locked(&self.0).read(offset, data);
    }

    fn write(&self, offset: u64, data: &[u8]) {
        let resetting = locked(&self.0).write(offset, data);
        // The one wait of a vCPU thread, without the lock: when its write returns, a driver takes
        // the device to be reset.
        if let Some(resetting) = resetting {
            resetting.wait();
        }
    }
}

/// An interrupt line that KVM raises when the eventfd is signalled.
struct Line(EventFd);

impl IrqLine for Line {
    fn trigger(&self) {
        self.0.signal();
    }
}
