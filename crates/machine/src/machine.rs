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
use std::sync::Arc;
use std::time::Duration;

use config::MachineConfig;
use memory::{GuestRam, MapError};
use vmm_sys_util::eventfd::EventFd;

use crate::boot::{self, BootError, BootFiles};
use crate::bus::{Bus, BusDevice};
use crate::cpu::registers::{set_fpu, set_lapic};
use crate::cpu::{Cpuid, Topology, set_boot_msrs};
use crate::devices::{DeviceError, DeviceSetup, Devices};
use crate::events::EventSink;
use crate::kvm::{Kvm, KvmError, Vm};
use crate::legacy::console::{self, Pump};
use crate::legacy::{BootTimer, I8042, KeyboardFull, Power, SerialPort, SerialSetup, StartTimes};
use crate::vcpu::{Buses, VcpuGone, VcpuHandle};
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
    /// The host is out of threads or descriptors.
    #[error("cannot create {what}: {source}")]
    Host {
        /// What was to be made.
        what: &'static str,
        /// The kernel's reason.
        source: std::io::Error,
    },
}

/// Longest that requests in flight may take when a machine is paused.
pub const DRAIN_PATIENCE: Duration = Duration::from_secs(10);

/// Why a machine could not be paused.
#[derive(Debug, thiserror::Error)]
pub enum PauseError {
    /// A device has requests that do not end; the machine runs on.
    #[error("the microVM runs on: {source}")]
    Busy {
        /// The machine.
        machine: Running,
        /// Which worker waits.
        source: virtio::worker::PauseError,
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
    /// A disk may take its time; where it takes longer than [`DRAIN_PATIENCE`], the machine runs on.
    pub fn pause(self) -> Result<Paused, PauseError> {
        self.0.vcpus.iter().try_for_each(VcpuHandle::request_pause)?;
        self.0.vcpus.iter().try_for_each(VcpuHandle::wait_paused)?;
        let drained = self.0.devices.workers().map_or(Ok(()), |workers| workers.pause(DRAIN_PATIENCE));
        let paused = Paused(self.0);
        match drained {
            Ok(()) => Ok(paused),
            Err(source) => Err(PauseError::Busy { machine: paused.resume()?, source }),
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

/// The parts, and what can be done with them in either state. Fields are dropped in order: vCPUs stop first, then what they used
/// goes.
#[derive(Debug)]
pub struct Machine {
    vcpus: Vec<VcpuHandle>,
    devices: Devices,
    pump: Pump,
    keyboard: Arc<I8042>,
    _vm: Vm,
}

impl Machine {
    /// The devices, to be changed while they work.
    pub fn devices(&self) -> &Devices {
        &self.devices
    }

    /// Presses Ctrl+Alt+Del on the guest's keyboard. A paused guest sees it when it runs again.
    pub fn press_ctrl_alt_del(&self) -> Result<(), KeyboardFull> {
        self.keyboard.press_ctrl_alt_del()
    }

    /// Waits at most `limit` until the serial port's output is where it leads. Says whether it is.
    pub fn drain_serial(&self, limit: Duration) -> bool {
        self.pump.drain(limit)
    }

    fn build(setup: Setup<'_>) -> Result<Self, StartError> {
        let config = setup.config;
        kick::install_handler()
            .map_err(|e| StartError::Host { what: "the vCPU signal handler", source: e.into() })?;

        let kvm = Kvm::open()?;
        if usize::from(config.vcpu_count) > kvm.max_vcpus() {
            return Err(KvmError::TooManyVcpus { wanted: config.vcpu_count, max: kvm.max_vcpus() }.into());
        }
        let cpuid = Cpuid::new(&kvm, Topology::new(config.vcpu_count, config.smt))?;
        let ram = GuestRam::map(config.mem_size_mib, config.huge_pages, config.track_dirty_pages)?;
        check_address_width(&ram, setup.devices.pci, cpuid.physical_address_bits())?;

        // The files first: they are what fails most often, and nothing of KVM exists yet.
        let places = setup.devices.places()?;
        let rsdp = acpi::write_tables(&ram, config.vcpu_count, &places);
        let device_args = setup.devices.boot_args(&places);
        let loaded = boot::load(&ram, setup.boot, &device_args, config.vcpu_count, rsdp)?;
        log::debug!("kernel loaded, to be entered by the {} protocol", loaded.protocol());

        let (vm, vcpu_fds) = kvm
            .create_vm()?
            .map_ram(ram, config.track_dirty_pages)?
            .create_irqchip()?
            .create_vcpus(config.vcpu_count)?;

        let (pump, serial) = start_console(&vm, setup.serial)?;
        let keyboard = Arc::new(I8042::new(irq_line(&vm, layout::I8042_IRQ)?, clone_sink(&setup.events)?));
        let power = Arc::new(Power::new(clone_sink(&setup.events)?));
        let boot_timer = setup.boot_timer.map(|start| Arc::new(BootTimer::new(start)));
        let mut buses = fill_buses(serial, keyboard.clone(), power, boot_timer);
        let devices = Devices::attach(setup.devices, places, &vm, &mut buses)?;
        let buses = Arc::new(buses);

        let mut vcpus = Vec::with_capacity(vcpu_fds.len());
        for (id, fd) in (0..config.vcpu_count).zip(vcpu_fds) {
            // CPUID first: what it shows decides which registers there are.
            fd.set_cpuid2(&cpuid.for_vcpu(id)?)
                .map_err(|source| KvmError::Call { call: "KVM_SET_CPUID2", source })?;
            set_boot_msrs(&fd)?;
            loaded.set_up_vcpu(&fd)?;
            set_fpu(&fd)?;
            set_lapic(&fd)?;
            let events = clone_sink(&setup.events)?;
            let handle = VcpuHandle::spawn(id, fd, vm.ram().clone(), buses.clone(), events)
                .map_err(|source| StartError::Host { what: "a vCPU thread", source })?;
            vcpus.push(handle);
        }
        Ok(Machine { vcpus, devices, pump, keyboard, _vm: vm })
    }
}

/// RAM and the registers of PCI devices must lie where the processor can address them.
fn check_address_width(ram: &GuestRam, pci: bool, bits: u8) -> Result<(), KvmError> {
    let registers = pci.then_some(layout::PCI_BARS.end);
    let end = ram.regions().iter().map(|r| r.guest_addr + r.size).chain(registers).max().unwrap_or(0);
    if bits < 64 && end > 1 << bits { Err(KvmError::AddressWidth { end, bits }) } else { Ok(()) }
}

fn start_console(vm: &Vm, setup: SerialSetup) -> Result<(Pump, Arc<SerialPort>), StartError> {
    let interrupt = irq_line(vm, layout::COM1_IRQ)?;
    console::start(setup, |console| SerialPort::new(interrupt, console))
        .map_err(|source| StartError::Host { what: "the serial port's thread", source })
}

/// A descriptor that raises interrupt line `gsi` when written to.
fn irq_line(vm: &Vm, gsi: u32) -> Result<EventFd, StartError> {
    let event = EventFd::new(libc::EFD_NONBLOCK | libc::EFD_CLOEXEC)
        .map_err(|source| StartError::Host { what: "an interrupt line", source })?;
    vm.register_irqfd(&event, gsi)?;
    Ok(event)
}

fn clone_sink(events: &EventSink) -> Result<EventSink, StartError> {
    events.try_clone().map_err(|source| StartError::Host { what: "an event descriptor", source })
}

/// Puts the legacy devices on their buses.
fn fill_buses(
    serial: Arc<SerialPort>,
    keyboard: Arc<I8042>,
    power: Arc<Power>,
    boot_timer: Option<Arc<BootTimer>>,
) -> Buses {
    let mut buses = Buses { ports: Bus::default(), mmio: Bus::default() };
    let port = u64::from;
    let ports = [
        (port(layout::COM1)..port(layout::COM1) + 8, serial as Arc<dyn BusDevice>),
        (port(layout::I8042)..port(layout::I8042) + 5, keyboard),
        (port(layout::ACPI_SLEEP_CONTROL)..port(layout::ACPI_RESET) + 1, power),
    ];
    for (range, device) in ports {
        buses.ports.add(range, device).expect("the layout gives each legacy device its own ports");
    }
    if let Some(timer) = boot_timer {
        let range = layout::BOOT_TIMER..layout::BOOT_TIMER + 0x1000;
        buses.mmio.add(range, timer).expect("the boot timer has its own page");
    }
    buses
}
