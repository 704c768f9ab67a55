//! Putting devices in their places, whichever transport they are on.

use std::sync::Arc;

use virtio::device::Device;
use virtio::transport::pci::PciRoot;
use virtio::transport::{Attachment, IoEvents};
use virtio::worker::Workers;

use super::io_events::KvmIoEvents;
use super::place::{Places, Window};
use super::{DeviceError, mmio, pci};
use crate::kvm::Vm;
use crate::vcpu::Buses;

/// Where devices are put.
pub(super) struct Board {
    io_events: Arc<dyn IoEvents>,
    workers: Workers,
    places: Free,
}

/// The places that are not taken yet.
enum Free {
    Mmio(std::vec::IntoIter<Window>),
    Pci { root: Arc<PciRoot>, next_slot: u8 },
}

impl Board {
    /// An empty one with these places, for devices that `workers` run.
    pub(super) fn new(places: Places, vm: &Vm, buses: &mut Buses, workers: Workers) -> Self {
        let places = match places {
            Places::Mmio(windows) => Free::Mmio(windows.into_iter()),
            Places::Pci(_) => Free::Pci { root: pci::root(buses), next_slot: 1 },
        };
        Board { io_events: Arc::new(KvmIoEvents(vm.shared_fd())), workers, places }
    }

    /// Puts a device in the next place. Logs will call it `name`.
    pub(super) fn plug(
        &mut self,
        name: String,
        device: Box<dyn Device>,
        vm: &Vm,
        buses: &mut Buses,
    ) -> Result<(), DeviceError> {
        let (memory, workers) = (vm.ram().clone(), self.workers.clone());
        let attachment = Attachment { name, device, memory, workers };
        let io_events = Arc::clone(&self.io_events);
        match &mut self.places {
            Free::Mmio(windows) => {
                let window = windows.next().expect("each device was given a place");
                mmio::plug(attachment, window, vm, io_events, &mut buses.mmio)?;
            }
            Free::Pci { root, next_slot } => {
                pci::plug(attachment, *next_slot, vm, io_events, root)?;
                *next_slot += 1;
            }
        }
        Ok(())
    }
}
