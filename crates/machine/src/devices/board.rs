//! Putting devices in their places, whichever transport they are on, and saving and restoring what is there.
//!
//! A device is known by its name (`drive rootfs`), in a saved state too: the same names in the same places are the same machine.

use std::fmt;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use serde::{Deserialize, Serialize};
use virtio::device::{Device, DeviceState};
use virtio::transport::mmio::{MmioState, MmioTransport};
use virtio::transport::pci::{PciRoot, PciRootState, PciState, PciTransport};
use virtio::transport::{Attachment, IoEventFds};
use virtio::worker::Workers;

use super::io_events::KvmIoEventFds;
use super::place::{Places, Window};
use super::{DeviceError, mmio, pci};
use crate::kvm::Vm;
use crate::vcpu::Buses;

/// Where devices are put.
pub(super) struct Board {
    workers: Workers,
    places: Free,
    plugged: Vec<Plugged>,
}

/// The places that are not taken yet.
enum Free {
    Mmio { windows: std::vec::IntoIter<Window>, io_events: Arc<dyn IoEventFds> },
    Pci { root: Arc<PciRoot>, next_slot: u8 },
}

/// A device in its place.
struct Plugged {
    name: String,
    transport: Transport,
}

enum Transport {
    Mmio(Arc<Mutex<MmioTransport>>),
    Pci(Arc<Mutex<PciTransport>>),
}

/// All virtio devices of a machine, as saved.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct DevicesState {
    /// The PCI bus, where there is one.
    pub pci: Option<PciRootState>,
    /// The devices, in order of their places.
    pub devices: Vec<SavedDevice>,
}

/// A device, as saved.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct SavedDevice {
    /// What it is called.
    pub name: String,
    /// Its transport, with the device inside.
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
    /// The state of the device that is called `name`.
    pub fn device(&self, name: &str) -> Option<&DeviceState> {
        self.devices.iter().find(|saved| saved.name == name).map(SavedDevice::device)
    }
}

impl Board {
    /// An empty one with these places, for devices that `workers` run.
    pub(super) fn new(places: Places, vm: &Vm, buses: &mut Buses, workers: Workers) -> Self {
        let io_events = Arc::new(KvmIoEventFds(vm.shared_fd()));
        let places = match places {
            Places::Mmio(windows) => Free::Mmio { windows: windows.into_iter(), io_events },
            Places::Pci(_) => Free::Pci { root: pci::root(buses, io_events), next_slot: 1 },
        };
        Board { workers, places, plugged: Vec::new() }
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
        let attachment = Attachment { name: name.clone(), device, memory, workers };
        let transport = match &mut self.places {
            Free::Mmio { windows, io_events } => {
                let window = windows.next().expect("each device was given a place");
                let io_events = Arc::clone(io_events);
                Transport::Mmio(mmio::plug(attachment, window, vm, io_events, &mut buses.mmio)?)
            }
            Free::Pci { root, next_slot } => {
                let function = pci::plug(attachment, *next_slot, vm, root)?;
                *next_slot += 1;
                Transport::Pci(function)
            }
        };
        self.plugged.push(Plugged { name, transport });
        Ok(())
    }

    /// The state of all that is plugged. The workers are paused.
    pub(super) fn save(&self) -> DevicesState {
        let saved = |plugged: &Plugged| SavedDevice {
            name: plugged.name.clone(),
            transport: match &plugged.transport {
                Transport::Mmio(transport) => SavedTransport::Mmio(locked(transport).save()),
                Transport::Pci(function) => SavedTransport::Pci(locked(function).save()),
            },
        };
        let pci = match &self.places {
            Free::Pci { root, .. } => Some(root.save()),
            Free::Mmio { .. } => None,
        };
        DevicesState { pci, devices: self.plugged.iter().map(saved).collect() }
    }

    /// Gives what is plugged its saved state; the devices were made from theirs. The interrupt controllers have their state and the
    /// workers are paused.
    pub(super) fn restore(&self, state: &DevicesState) -> Result<(), DeviceError> {
        let names = |of: &mut dyn Iterator<Item = &String>| of.cloned().collect::<Vec<_>>().join(", ");
        let here = names(&mut self.plugged.iter().map(|plugged| &plugged.name));
        let there = names(&mut state.devices.iter().map(|saved| &saved.name));
        if here != there {
            return Err(DeviceError::OtherDevices { here, there });
        }
        if let (Free::Pci { root, .. }, Some(saved)) = (&self.places, &state.pci) {
            root.restore(saved);
        }
        for (plugged, saved) in self.plugged.iter().zip(&state.devices) {
            match (&plugged.transport, &saved.transport) {
                (Transport::Mmio(transport), SavedTransport::Mmio(state)) => {
                    locked(transport).restore(state)?;
                }
                (Transport::Pci(function), SavedTransport::Pci(state)) => locked(function).restore(state)?,
                _ => {
                    return Err(DeviceError::OtherTransport { pci: matches!(self.places, Free::Pci { .. }) });
                }
            }
        }
        Ok(())
    }
}

impl fmt::Debug for Board {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_list().entries(self.plugged.iter().map(|plugged| &plugged.name)).finish()
    }
}

fn locked<T>(transport: &Mutex<T>) -> MutexGuard<'_, T> {
    transport.lock().unwrap_or_else(PoisonError::into_inner)
}
