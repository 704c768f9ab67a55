//! Virtio devices: which a machine has, where the guest finds them, and what KVM does for them.
//!
//! ```text
//!  table ------ a row per kind of device: from a DeviceSetup to named, typed devices
//!    |  adapter, adapters/     what a row needs to know of a kind: block, net, entropy, vsock
//!  mod (Devices::attach) ----- starts I/O workers, builds each device, plugs it in
//!    |
//!  virtio_bus ---------------- gives each device the next address, on either transport
//!    |  mmio, pci              what a transport needs of the buses and of KVM
//!    |  io_event_fds           queue notifications: KVM_IOEVENTFD
//!  address ------------------- windows and interrupt lines, or PCI slots
//!  state, error -------------- saved state, DeviceError
//! ```
//!
//! # How the guest finds devices
//!
//! Devices are numbered by the rows of the [`table`]: the root drive, the other drives in the order
//! in which they were configured, network interfaces in theirs, entropy, vsock. A Linux guest names
//! them in this order (`vda`, `vdb`, ...; `eth0`, `eth1`, ...).
//!
//! - On virtio-mmio, device `n` has the `n`-th window of 4 KiB from
//!   [`layout::VIRTIO_MMIO`](crate::layout::VIRTIO_MMIO) on and the `n`-th interrupt line from 5
//!   on. A guest with ACPI finds it in the DSDT, one without by `virtio_mmio.device=` on its
//!   command line.
//! - On virtio-pci, device `n` is in slot `n + 1` of bus 0. A guest with ACPI finds the bus in the
//!   DSDT and the MCFG, one without by probing.
//!
//! # Invariants
//!
//! - Addresses are fixed before the guest's ACPI tables are written. Devices are built after its
//!   vCPUs (the order of KVM's calls, [`crate::kvm`]).
//! - A kick goes ioeventfd -> I/O worker. An interrupt goes from the worker to KVM. A vCPU thread
//!   accesses registers only.
//!
//! # Errors
//!
//! [`DeviceError`] names the device. After an error no device is left.

mod adapter;
mod adapters;
mod address;
mod error;
mod io_event_fds;
mod mmio;
mod pci;
mod state;
mod table;
mod virtio_bus;

use std::io;
use std::sync::Arc;
use std::time::Duration;

use block::BlockControl;
use net::NetControl;
use virtio::transport::FailureObserver;
use virtio::worker::{WorkerId, Workers, monotonic};
use vsock::VsockControl;

use crate::bus::Buses;
use crate::kvm::Vm;
use crate::stats::DevicesStats;

use adapter::{BuildContext, DeviceAdapter, IoWorkers};
use adapters::{BlockAdapter, EntropyAdapter, NetAdapter, VsockAdapter};
use io_event_fds::KvmIoEventFds;
use table::{Controls, NO_ID};
use virtio_bus::VirtioBus;

pub use adapter::limits;
pub use adapters::VsockSetup;
pub(crate) use address::{DeviceAddresses, MmioWindow};
pub use error::DeviceError;
pub use state::{DevicesState, SavedDevice, SavedTransport};
pub use table::DeviceSetup;

/// How long new I/O workers may take to pause before a restore. They have nothing to drain; what
/// they may wait for is a CPU.
const WORKER_START_TIMEOUT: Duration = Duration::from_secs(10);

impl DeviceSetup {
    /// Gives each device its address.
    pub(crate) fn addresses(&self) -> Result<DeviceAddresses, DeviceError> {
        DeviceAddresses::new(self.count(), self.pci)
    }

    /// What is added to the kernel's command line: the root device, and where each device is.
    pub(crate) fn boot_args(&self, addresses: &DeviceAddresses) -> String {
        let args: Vec<_> = self.kernel_args().into_iter().chain(addresses.boot_args()).collect();
        args.join(" ")
    }
}

/// The devices of a machine.
pub struct Devices {
    /// The I/O workers and the bus; `None` in a machine without devices, which has no such threads.
    running: Option<(Workers, VirtioBus)>,
    controls: Controls,
    metadata: Option<Arc<mmds::Service>>,
}

impl Devices {
    /// Builds the devices and puts each at its address on the buses. With a saved state, the
    /// devices are those that were saved, and their workers are paused. `failures` learns of
    /// devices that fail.
    pub(crate) fn attach(
        mut setup: DeviceSetup,
        addresses: DeviceAddresses,
        saved: Option<&DevicesState>,
        vm: &Vm,
        buses: &mut Buses,
        failures: Arc<dyn FailureObserver>,
    ) -> Result<Self, DeviceError> {
        let planned = table::plan(&mut setup, saved)?;
        let mut controls = Controls::default();
        if planned.is_empty() {
            // A guest finds the PCI bus also where no device is on it.
            if setup.pci {
                pci::add_root(buses, Arc::new(KvmIoEventFds(vm.shared_fd())));
            }
            return Ok(Devices { running: None, controls, metadata: None });
        }
        let needs = planned.iter().map(|device| device.io_workers()).collect::<Result<Vec<_>, _>>()?;
        let (workers, dedicated) = start_workers(&needs)?;
        if saved.is_some() {
            workers.pause(WORKER_START_TIMEOUT).map_err(|busy| worker_error(io::Error::other(busy)))?;
        }
        let mut bus = VirtioBus::new(addresses, vm, buses, workers.clone(), failures);
        let now = monotonic();
        for (device, workers) in planned.into_iter().zip(dedicated) {
            let context = BuildContext {
                now,
                workers,
                metadata: setup.metadata.as_ref(),
                tracks_dirty_pages: vm.ram().tracks_dirty_pages(),
            };
            let name = device.name().to_owned();
            bus.plug(name, device.build(context, &mut controls)?, vm, buses)?;
        }
        if let Some(saved) = saved {
            bus.restore(saved)?;
        }
        Ok(Devices { running: Some((workers, bus)), controls, metadata: setup.metadata })
    }

    /// The state of all devices. The vCPUs and the workers are paused.
    pub(crate) fn save(&self) -> DevicesState {
        match &self.running {
            Some((_, bus)) => bus.save(),
            None => DevicesState { pci: None, devices: Vec::new() },
        }
    }

    /// The I/O workers; `None` if there are no devices.
    pub(crate) fn workers(&self) -> Option<&Workers> {
        self.running.as_ref().map(|(workers, _)| workers)
    }

    /// Pauses the I/O workers, for a machine that does not run again: no more requests are taken
    /// from the queues. Waits at most `timeout` for those in flight.
    pub fn quiesce(&self, timeout: Duration) -> Result<(), virtio::worker::PauseError> {
        self.workers().map_or(Ok(()), |workers| workers.pause(timeout))
    }

    /// A handle to the counters of all devices.
    pub(crate) fn stats(&self) -> DevicesStats {
        let Some((_, bus)) = &self.running else { return DevicesStats::default() };
        let Controls { drives, networks, entropy, vsock } = &self.controls;
        DevicesStats {
            drives: bus.stats_of(BlockAdapter::NOUN, drives, |drive| Arc::clone(drive.stats())),
            networks: bus.stats_of(NetAdapter::NOUN, networks, |network| Arc::clone(network.stats())),
            entropy: bus.stats_of(EntropyAdapter::NOUN, entropy, |entropy| Arc::clone(entropy.stats())).pop(),
            vsock: bus.stats_of(VsockAdapter::NOUN, vsock, |vsock| Arc::clone(vsock.stats())).pop(),
            metadata: self.metadata.clone(),
        }
    }

    /// Changes the drive `id` while it works.
    pub fn drive(&self, id: &str) -> Option<&BlockControl> {
        self.controls.drives.get(id)
    }

    /// Changes the network interface `id` while it works.
    pub fn network(&self, id: &str) -> Option<&NetControl> {
        self.controls.networks.get(id)
    }

    /// Changes the socket device while it works.
    pub fn vsock(&self) -> Option<&VsockControl> {
        self.controls.vsock.get(NO_ID)
    }
}

impl std::fmt::Debug for Devices {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Devices").field("controls", &self.controls).finish_non_exhaustive()
    }
}

/// Starts the I/O workers that devices need: shared ones, and for each device its own.
fn start_workers(needs: &[IoWorkers]) -> Result<(Workers, Vec<Vec<WorkerId>>), DeviceError> {
    let shared = needs.iter().map(|need| match need {
        IoWorkers::Shared(count) => usize::from(*count),
        IoWorkers::Dedicated(_) => 1,
    });
    let shared = shared.max().unwrap_or(1);
    let workers = Workers::start(shared).map_err(worker_error)?;
    let dedicated = needs.iter().map(|need| {
        let count = match need {
            IoWorkers::Shared(_) => 0,
            IoWorkers::Dedicated(count) => *count,
        };
        (0..count).map(|_| workers.dedicated()).collect::<io::Result<Vec<_>>>().map_err(worker_error)
    });
    let dedicated = dedicated.collect::<Result<_, _>>()?;
    Ok((workers, dedicated))
}

fn worker_error(source: io::Error) -> DeviceError {
    DeviceError::Host { what: "an I/O worker", source }
}

#[cfg(test)]
mod tests;
