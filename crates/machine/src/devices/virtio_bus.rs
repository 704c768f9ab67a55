//! The virtio devices of a machine at their addresses, on either transport; saved and restored.

use std::fmt;
use std::sync::{Arc, Mutex};

use sync::locked;
use virtio::device::Device;
use virtio::transport::mmio::MmioTransport;
use virtio::transport::pci::{PciRoot, PciTransport};
use virtio::transport::{Attachment, FailureObserver, IoEventFds};
use virtio::worker::Workers;

use super::address::{DeviceAddresses, MmioWindow};
use super::error::DeviceError;
use super::io_event_fds::KvmIoEventFds;
use super::state::{DevicesState, SavedDevice, SavedTransport};
use super::table::{Handles, device_name};
use super::{mmio, pci};
use crate::bus::Buses;
use crate::kvm::Vm;
use crate::stats::DeviceStats;

/// All virtio devices of a machine.
pub(super) struct VirtioBus {
    workers: Workers,
    failures: Arc<dyn FailureObserver>,
    free: FreeAddresses,
    plugged: Vec<Plugged>,
}

/// The addresses that no device has yet.
enum FreeAddresses {
    Mmio { windows: std::vec::IntoIter<MmioWindow>, io_event_fds: Arc<dyn IoEventFds> },
    Pci { root: Arc<PciRoot>, next_slot: u8 },
}

/// A device at its address.
struct Plugged {
    name: String,
    transport: Transport,
}

enum Transport {
    Mmio(Arc<Mutex<MmioTransport>>),
    Pci(Arc<Mutex<PciTransport>>),
}

impl VirtioBus {
    /// A bus without devices. `workers` run the devices to come, and `failures` learns of those
    /// that fail.
    pub(super) fn new(
        addresses: DeviceAddresses,
        vm: &Vm,
        buses: &mut Buses,
        workers: Workers,
        failures: Arc<dyn FailureObserver>,
    ) -> Self {
        let io_event_fds = Arc::new(KvmIoEventFds(vm.shared_fd()));
        let free = match addresses {
            DeviceAddresses::Mmio(windows) => {
                FreeAddresses::Mmio { windows: windows.into_iter(), io_event_fds }
            }
            DeviceAddresses::Pci(_) => {
                FreeAddresses::Pci { root: pci::add_root(buses, io_event_fds), next_slot: 1 }
            }
        };
        VirtioBus { workers, failures, free, plugged: Vec::new() }
    }

    /// Puts a device at the next address.
    pub(super) fn plug(
        &mut self,
        name: String,
        device: Box<dyn Device>,
        vm: &Vm,
        buses: &mut Buses,
    ) -> Result<(), DeviceError> {
        let (memory, workers) = (vm.ram().clone(), self.workers.clone());
        let failures = Arc::clone(&self.failures);
        let attachment = Attachment { name: name.clone(), device, memory, workers, failures };
        let transport = match &mut self.free {
            FreeAddresses::Mmio { windows, io_event_fds } => {
                let window = windows.next().expect("there is an address for each device");
                let io_event_fds = Arc::clone(io_event_fds);
                Transport::Mmio(mmio::plug(attachment, window, vm, io_event_fds, &mut buses.mmio)?)
            }
            FreeAddresses::Pci { root, next_slot } => {
                let function = pci::plug(attachment, *next_slot, vm, root)?;
                *next_slot += 1;
                Transport::Pci(function)
            }
        };
        self.plugged.push(Plugged { name, transport });
        Ok(())
    }

    /// The counters of the devices of one kind, which have `handles` by id and `noun` as the first
    /// word of their names.
    pub(super) fn stats_of<C, S>(
        &self,
        noun: &str,
        handles: &Handles<C>,
        stats: impl Fn(&C) -> Arc<S>,
    ) -> Vec<DeviceStats<S>> {
        let of_one = |(id, control): (&String, &C)| {
            let name = device_name(noun, id);
            let plugged = self.plugged.iter().find(|plugged| plugged.name == name)?;
            let transport = match &plugged.transport {
                Transport::Mmio(transport) => locked(transport).stats(),
                Transport::Pci(function) => locked(function).stats(),
            };
            Some(DeviceStats { id: id.clone(), stats: stats(control), transport })
        };
        handles.iter().filter_map(of_one).collect()
    }

    /// The state of all devices. The workers are paused.
    pub(super) fn save(&self) -> DevicesState {
        let saved = |plugged: &Plugged| SavedDevice {
            name: plugged.name.clone(),
            transport: match &plugged.transport {
                Transport::Mmio(transport) => SavedTransport::Mmio(locked(transport).save()),
                Transport::Pci(function) => SavedTransport::Pci(locked(function).save()),
            },
        };
        let pci = match &self.free {
            FreeAddresses::Pci { root, .. } => Some(root.save()),
            FreeAddresses::Mmio { .. } => None,
        };
        DevicesState { pci, devices: self.plugged.iter().map(saved).collect() }
    }

    /// Restores the transports of the devices, which were built from the same `state` and in its
    /// order. The interrupt controllers have their state, and the workers are paused.
    pub(super) fn restore(&self, state: &DevicesState) -> Result<(), DeviceError> {
        debug_assert!(self.plugged.iter().map(|p| &p.name).eq(state.devices.iter().map(|d| &d.name)));
        if let (FreeAddresses::Pci { root, .. }, Some(saved)) = (&self.free, &state.pci) {
            root.restore(saved);
        }
        for (plugged, saved) in self.plugged.iter().zip(&state.devices) {
            match (&plugged.transport, &saved.transport) {
                (Transport::Mmio(transport), SavedTransport::Mmio(state)) => {
                    locked(transport).restore(state)?;
                }
                (Transport::Pci(function), SavedTransport::Pci(state)) => locked(function).restore(state)?,
                (Transport::Mmio(_), SavedTransport::Pci(_)) => {
                    return Err(DeviceError::OtherTransport { pci: false });
                }
                (Transport::Pci(_), SavedTransport::Mmio(_)) => {
                    return Err(DeviceError::OtherTransport { pci: true });
                }
            }
        }
        Ok(())
    }
}

impl fmt::Debug for VirtioBus {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_list().entries(self.plugged.iter().map(|plugged| &plugged.name)).finish()
    }
}
