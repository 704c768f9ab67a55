//! Devices on virtio-mmio: a window on the bus and an interrupt line each.

use std::sync::{Arc, Mutex, MutexGuard};

use virtio::transport::mmio::{IrqLine, MmioTransport, WINDOW_SIZE};
use virtio::transport::{Attachment, IoEventFds};
use vmm_sys_util::eventfd::EventFd;

use super::DeviceError;
use super::place::Window;
use crate::bus::{Bus, BusDevice};
use crate::kvm::Vm;

/// Puts a device at `window`.
pub(super) fn plug(
    attachment: Attachment,
    window: Window,
    vm: &Vm,
    io_events: Arc<dyn IoEventFds>,
    bus: &mut Bus,
) -> Result<Arc<Mutex<MmioTransport>>, DeviceError> {
    let event = EventFd::new(libc::EFD_NONBLOCK | libc::EFD_CLOEXEC)
        .map_err(|source| DeviceError::Host { what: "an interrupt line", source })?;
    vm.register_irqfd(&event, window.irq)?;
    let transport = MmioTransport::new(attachment, window.addr, Box::new(Line(event)), io_events)
        .map_err(|source| DeviceError::Host { what: "a virtio device", source })?;
    let transport = Arc::new(Mutex::new(transport));
    bus.add(window.addr..window.addr + WINDOW_SIZE, Arc::new(Registers(Arc::clone(&transport))))
        .expect("the layout gives each device its own window");
    Ok(transport)
}

/// A device's window on the bus.
struct Registers(Arc<Mutex<MmioTransport>>);

impl Registers {
    fn lock(&self) -> MutexGuard<'_, MmioTransport> {
        self.0.lock().expect("no holder of this lock panics")
    }
}

impl BusDevice for Registers {
    fn read(&self, offset: u64, data: &mut [u8]) {
        self.lock().read(offset, data);
    }

    fn write(&self, offset: u64, data: &[u8]) {
        let resetting = self.lock().write(offset, data);
        // The one wait of a vCPU thread: the driver takes a reset to be done when it has asked for it.
        if let Some(resetting) = resetting {
            resetting.wait();
        }
    }
}

/// An interrupt line, as a descriptor that KVM waits on.
struct Line(EventFd);

impl IrqLine for Line {
    fn trigger(&self) {
        // Its counter can only be full when the interrupt is raised anyway.
        let _ = self.0.write(1);
    }
}
