//! A microVM from its parts to its end.
//!
//! [`Paused`] and [`Running`] are the same machine in its two states: each has the operations that make sense in it, and the step
//! between them consumes the one and gives the other. What can only be done to a still machine (saving, forking) is only there
//! on [`Paused`].
//!
//! # Errors
//!
//! [`StartError`] names what could not be built; nothing is left of a machine that was not. [`VcpuGone`] is a bug in this monitor.

use std::ops::Deref;
use std::os::fd::BorrowedFd;
use std::sync::Arc;
use std::time::{Duration, Instant};

use config::MachineConfig;
use memory::page_server::{FetchError, PageServer};
use memory::{GuestRam, MapError, PageSet, TakeDirtyError};

use crate::assemble::{Origin, Parts, Wait, assemble};
use crate::boot::{self, BootError, BootFiles};
use crate::chipset::{ChipsetState, ClockAfter};
use crate::cpu::{Cpuid, StateFormat, Topology};
use crate::devices::{DeviceError, DeviceSetup, Devices};
use crate::events::EventSink;
use crate::kvm::{Kvm, KvmError, Named, Vm};
use crate::legacy::console::Pump;
use crate::legacy::{Cmos, I8042, KeyboardFull, SerialPort, SerialSetup, StartTimes};
use crate::page_watch::PageWatch;
use crate::state::MachineState;
use crate::vcpu::{VcpuGone, VcpuHandle, WaitError};
use crate::{acpi, kick, layout};

/// Everything that a machine is made of.
#[derive(Debug)]
pub struct Setup<'a> {
    /// Processors and memory, checked.
    pub config: &'a MachineConfig,
    /// What to boot.
    pub boot: BootFiles,
    /// Where the serial port leads.
    pub serial: SerialSetup,
    /// Since when the boot timer counts; `None` for no boot timer.
    pub boot_timer: Option<StartTimes>,
    /// Virtio devices.
    pub devices: DeviceSetup,
    /// Where the machine says that it wants to end.
    pub events: EventSink,
}

/// Everything that a saved machine is made of again.
#[derive(Debug)]
pub struct Restore<'a> {
    /// Processors and memory, as they were.
    pub config: &'a MachineConfig,
    /// What was saved.
    pub state: &'a MachineState,
    /// The guest's memory, with its contents.
    pub ram: GuestRam,
    /// Who sends the contents that are not there yet.
    pub page_server: Option<PageServer>,
    /// Where the serial port leads now.
    pub serial: SerialSetup,
    /// The same virtio devices, on the back ends that they have now.
    pub devices: DeviceSetup,
    /// What the guest's clock shows.
    pub clock: ClockAfter,
    /// Where the machine says that it wants to end.
    pub events: EventSink,
    /// Readable once the restore is cancelled: pages that do not arrive are not waited for any
    /// longer.
    pub stop: Option<BorrowedFd<'a>>,
}

/// Why a machine could not be saved.
#[derive(Debug, thiserror::Error)]
pub enum SaveError {
    /// KVM did not give its state.
    #[error(transparent)]
    Kvm(#[from] KvmError),
    /// A bug in this monitor.
    #[error(transparent)]
    Gone(#[from] VcpuGone),
}

/// Why a machine could not be started.
#[derive(Debug, thiserror::Error)]
pub enum StartError {
    /// KVM refused, or cannot do it.
    #[error(transparent)]
    Kvm(#[from] KvmError),
    /// Guest memory cannot be mapped.
    #[error(transparent)]
    Memory(#[from] MapError),
    /// The kernel or what goes with it cannot be booted.
    #[error(transparent)]
    Boot(#[from] BootError),
    /// The devices cannot be had.
    #[error(transparent)]
    Device(#[from] DeviceError),
    /// A saved guest saw a processor that this host cannot show it.
    #[error("the guest cannot go on on this host's processor, which lacks: {}", missing.join(", "))]
    OtherProcessor {
        /// What it lacks.
        missing: Vec<String>,
    },
    /// A saved machine has other vCPUs than its configuration says.
    #[error("the saved state has {saved} vCPUs, and its configuration says {configured}")]
    OtherVcpus {
        /// How many were saved.
        saved: usize,
        /// How many there should be.
        configured: u8,
    },
    /// The page server did not send pages that the vCPUs need.
    #[error(transparent)]
    PageServer(#[from] FetchError),
    /// The restore was cancelled while it waited for guest memory.
    #[error("the restore was cancelled while it waited for guest memory")]
    Cancelled,
    /// A bug in this monitor.
    #[error(transparent)]
    Gone(#[from] VcpuGone),
    /// The host is out of threads or descriptors.
    #[error("cannot create {what}: {source}")]
    Host {
        /// What was to be made.
        what: &'static str,
        /// The kernel's reason.
        source: std::io::Error,
    },
}

/// Longest that vCPUs may take to stand still when a machine is paused: one may wait for a page.
pub const VCPU_PATIENCE: Duration = Duration::from_secs(5);

/// Longest that requests in flight may take when a machine is paused.
pub const DRAIN_PATIENCE: Duration = Duration::from_secs(10);

/// Why a machine could not be paused.
#[derive(Debug, thiserror::Error)]
pub enum PauseError {
    /// A vCPU or a device does not come to an end; the machine runs on.
    #[error("the microVM runs on: {why}")]
    Busy {
        /// The machine.
        machine: Running,
        /// Who does not.
        why: String,
    },
    /// A bug in this monitor; the machine is lost.
    #[error(transparent)]
    Gone(#[from] VcpuGone),
}

/// A machine whose vCPUs stand still, freshly built or paused.
#[derive(Debug)]
pub struct Paused(Box<Machine>);

/// A machine whose vCPUs run.
#[derive(Debug)]
pub struct Running(Box<Machine>);

impl Paused {
    /// Builds a machine, ready to run its first instruction.
    pub fn build(setup: Setup<'_>) -> Result<Self, StartError> {
        Machine::build(setup).map(|machine| Paused(Box::new(machine)))
    }

    /// Makes a saved machine again, to go on where it stood. Its guest is told that it is another one ([`crate::generation`]).
    pub fn restore(restore: Restore<'_>) -> Result<Self, StartError> {
        Machine::restore(restore).map(|machine| Paused(Box::new(machine)))
    }

    /// All its state but for its memory. It goes on standing still, and can be resumed or saved again.
    pub fn save(&self) -> Result<MachineState, SaveError> {
        let format = Arc::new(StateFormat::of(&self.kvm, &self.vm)?);
        // Timers and interrupt controllers keep running. What one of them passes on to a vCPU
        // during the save is in both.
        let chipset = ChipsetState::save(&self.vm.shared_fd())?;
        self.vcpus.iter().try_for_each(|vcpu| vcpu.request_state(&format))?;
        // All are waited for, also when one fails: nothing may be left in their channels.
        let vcpus = self.vcpus.iter().map(VcpuHandle::take_state).collect::<Vec<_>>();
        let vcpus = vcpus.into_iter().map(|state| Ok(state??)).collect::<Result<_, SaveError>>()?;
        Ok(MachineState {
            vcpus,
            chipset,
            devices: self.devices.save(),
            serial: self.serial.save(),
            keyboard: self.keyboard.save(),
            cmos: self.cmos.save(),
        })
    }

    /// Lets it run.
    pub fn resume(self) -> Result<Running, VcpuGone> {
        if let Some(workers) = self.0.devices.workers() {
            workers.resume();
        }
        self.0.vcpus.iter().try_for_each(VcpuHandle::resume)?;
        Ok(Running(self.0))
    }
}

impl Running {
    /// Stops all vCPUs, then the devices, and returns when they stand still: every access that a vCPU had begun is done, and no
    /// request is in flight.
    ///
    /// A disk may take its time, and so may a page server that a vCPU waits for; where they take longer than [`DRAIN_PATIENCE`] and
    /// [`VCPU_PATIENCE`], the machine runs on.
    pub fn pause(self) -> Result<Paused, PauseError> {
        self.pause_within(VCPU_PATIENCE, DRAIN_PATIENCE)
    }

    /// The same with at most this long for the vCPUs, and then for the devices.
    pub fn pause_within(self, vcpus: Duration, devices: Duration) -> Result<Paused, PauseError> {
        self.0.vcpus.iter().try_for_each(VcpuHandle::request_pause)?;
        let deadline = Instant::now() + vcpus;
        match self.0.vcpus.iter().try_for_each(|vcpu| vcpu.wait_paused(deadline)) {
            Ok(()) => {}
            Err(WaitError::Gone(gone)) => return Err(gone.into()),
            // Those that stand still go on, and this one when it has stood still.
            Err(busy @ WaitError::Busy(_)) => {
                self.0.vcpus.iter().try_for_each(VcpuHandle::resume)?;
                return Err(PauseError::Busy { machine: self, why: busy.to_string() });
            }
        }
        let drained = self.0.devices.workers().map_or(Ok(()), |workers| workers.pause(devices));
        let paused = Paused(self.0);
        match drained {
            Ok(()) => Ok(paused),
            Err(busy) => Err(PauseError::Busy { machine: paused.resume()?, why: busy.to_string() }),
        }
    }
}

impl Deref for Paused {
    type Target = Machine;

    fn deref(&self) -> &Machine {
        &self.0
    }
}

impl Deref for Running {
    type Target = Machine;

    fn deref(&self) -> &Machine {
        &self.0
    }
}

/// The parts, and what can be done with them in either state. Fields are dropped in order: vCPUs, which were told to stop before, end first, then what
/// they used goes.
#[derive(Debug)]
pub struct Machine {
    /// First, so that no vCPU waits for a page when its end is waited for.
    pub(crate) page_watch: Option<PageWatch>,
    pub(crate) vcpus: Vec<VcpuHandle>,
    pub(crate) devices: Devices,
    pub(crate) pump: Pump,
    pub(crate) serial: Arc<SerialPort>,
    pub(crate) keyboard: Arc<I8042>,
    pub(crate) cmos: Arc<Cmos>,
    pub(crate) vm: Vm,
    pub(crate) kvm: Kvm,
}

impl Drop for Machine {
    fn drop(&mut self) {
        // Before pages that are missing become zeros: none of them runs on with these.
        self.vcpus.iter().for_each(VcpuHandle::request_stop);
    }
}

impl Machine {
    /// The devices, to be changed while they work.
    pub fn devices(&self) -> &Devices {
        &self.devices
    }

    /// The guest's memory.
    pub fn ram(&self) -> &GuestRam {
        self.vm.ram()
    }

    /// The pages that were written, by the guest or for it, since they were last asked for; `None` where that is not tracked.
    /// From here on they count as not written: a caller that fails to save them calls [`GuestRam::mark_dirty_again`]. After an error
    /// all of them still count as written.
    pub fn take_dirty_pages(&self) -> Result<Option<PageSet>, KvmError> {
        let regions = self.ram().regions();
        let taken = self.ram().take_dirty_pages(|index| {
            let size = usize::try_from(regions[index].size).unwrap_or(usize::MAX);
            // One memory slot for each region, in their order.
            let slot = u32::try_from(index).unwrap_or(u32::MAX);
            self.vm.shared_fd().get_dirty_log(slot, size).named("KVM_GET_DIRTY_LOG")
        });
        taken.map_err(|error| match error {
            TakeDirtyError::Log(error) => error,
            TakeDirtyError::Length(_) => KvmError::StateTooLarge("dirty pages"),
        })
    }

    /// Presses Ctrl+Alt+Del on the guest's keyboard. A paused guest sees it when it runs again.
    pub fn press_ctrl_alt_del(&self) -> Result<(), KeyboardFull> {
        self.keyboard.press_ctrl_alt_del()
    }

    /// Waits at most `limit` until the serial port's output is where it leads. Says whether it is.
    pub fn drain_serial(&self, limit: Duration) -> bool {
        self.pump.drain(limit)
    }

    /// A machine that has never run: its kernel is loaded and its first vCPU stands at its entry.
    fn build(setup: Setup<'_>) -> Result<Self, StartError> {
        let config = setup.config;
        let kvm = open_kvm(config)?;
        let cpuid = Cpuid::new(&kvm, Topology::new(config.vcpu_count, config.smt))?;
        let ram = GuestRam::map(config.mem_size_mib, config.huge_pages, config.track_dirty_pages)?;
        check_address_width(&ram, setup.devices.pci, cpuid.physical_address_bits())?;

        // The files first: they are what fails most often, and nothing of KVM exists yet.
        let places = setup.devices.places()?;
        let rsdp = acpi::write_tables(&ram, config.vcpu_count, &places);
        let device_args = setup.devices.boot_args(&places);
        let loaded = boot::load(&ram, setup.boot, &device_args, config.vcpu_count, rsdp)?;
        log::debug!("kernel loaded, to be entered by the {} protocol", loaded.protocol());

        let parts = Parts {
            ram,
            devices: setup.devices,
            places,
            serial: setup.serial,
            boot_timer: setup.boot_timer,
            events: setup.events,
        };
        assemble(kvm, config, parts, &Origin::Boot { cpuid: &cpuid, loaded: &loaded })
    }

    /// A machine that was saved.
    fn restore(restore: Restore<'_>) -> Result<Self, StartError> {
        let (config, state) = (restore.config, restore.state);
        if state.vcpus.len() != usize::from(config.vcpu_count) {
            return Err(StartError::OtherVcpus { saved: state.vcpus.len(), configured: config.vcpu_count });
        }
        let kvm = open_kvm(config)?;
        let cpuid = Cpuid::new(&kvm, Topology::new(config.vcpu_count, config.smt))?;
        check_address_width(&restore.ram, restore.devices.pci, cpuid.physical_address_bits())?;
        let parts = Parts {
            places: restore.devices.places()?,
            ram: restore.ram,
            devices: restore.devices,
            serial: restore.serial,
            boot_timer: None,
            events: restore.events,
        };
        let events = parts.events.try_clone();
        let wait = Wait { page_server: restore.page_server.as_ref(), stop: restore.stop };
        let origin = Origin::State { cpuid: &cpuid, state, clock: restore.clock, wait };
        let mut machine = assemble(kvm, config, parts, &origin)?;
        if let Some(server) = restore.page_server {
            let watch = events.and_then(|events| PageWatch::start(server, events));
            let host = |source| StartError::Host { what: "the page server's watch", source };
            machine.page_watch = Some(watch.map_err(host)?);
        }
        Ok(machine)
    }
}

/// KVM, with room for as many vCPUs.
fn open_kvm(config: &MachineConfig) -> Result<Kvm, StartError> {
    kick::install_handler()
        .map_err(|e| StartError::Host { what: "the vCPU signal handler", source: e.into() })?;
    let kvm = Kvm::open()?;
    if usize::from(config.vcpu_count) > kvm.max_vcpus() {
        return Err(KvmError::TooManyVcpus { wanted: config.vcpu_count, max: kvm.max_vcpus() }.into());
    }
    Ok(kvm)
}

/// RAM and the registers of PCI devices must lie where the processor can address them.
fn check_address_width(ram: &GuestRam, pci: bool, bits: u8) -> Result<(), KvmError> {
    let registers = pci.then_some(layout::PCI_BARS.end);
    let end = ram.regions().iter().map(|r| r.guest_addr + r.size).chain(registers).max().unwrap_or(0);
    if bits < 64 && end > 1 << bits { Err(KvmError::AddressWidth { end, bits }) } else { Ok(()) }
}

#[cfg(test)]
mod tests {
    use super::*;
    use config::HugePages;

    #[test]
    fn memory_and_registers_beyond_what_the_processor_addresses_are_refused() {
        let ram = GuestRam::map(5 * 1024, HugePages::None, false).unwrap();
        assert!(check_address_width(&ram, false, 32).is_err());
        assert!(check_address_width(&ram, false, 36).is_ok());
        assert!(check_address_width(&ram, true, 36).is_err(), "windows of PCI devices begin at 256 GiB");
        assert!(check_address_width(&ram, true, 64).is_ok());
    }
}
