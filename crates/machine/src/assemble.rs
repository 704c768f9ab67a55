//! Putting a machine together, one that boots or one that was saved.
//!
//! Both go the same way; they differ in where a vCPU's registers and a device's state come from ([`Origin`]). The order is
//! KVM's ([`crate::kvm`]), and then: interrupt controllers before vCPUs, because local APICs speak to them; vCPUs before devices, because a
//! restored device interrupts at once and a vCPU that is given its state afterwards would forget
//! it; the timer chip last, for the same reason.

use std::sync::Arc;
use std::time::SystemTime;

use config::MachineConfig;
use kvm_ioctls::VcpuFd;
use memory::GuestRam;
use vmm_sys_util::eventfd::EventFd;

use crate::boot::Loaded;
use crate::bus::{Bus, BusDevice};
use crate::chipset::ClockAfter;
use crate::cpu::registers::{set_fpu, set_lapic};
use crate::cpu::{Cpuid, StateFormat, XsaveSize, missing_features, set_boot_msrs, unlisted_msrs};
use crate::devices::{DeviceSetup, Devices, Places};
use crate::events::EventSink;
use crate::generation::Generation;
use crate::kvm::{Kvm, KvmError, Named, Vm};
use crate::layout;
use crate::legacy::console::{self, Pump};
use crate::legacy::{BootTimer, Cmos, I8042, Power, SerialPort, SerialPortState, SerialSetup, StartTimes};
use crate::machine::{Machine, StartError};
use crate::state::MachineState;
use crate::vcpu::{Buses, VcpuHandle};

/// What a machine is made of, whatever its past.
pub(crate) struct Parts {
    pub(crate) ram: GuestRam,
    pub(crate) devices: DeviceSetup,
    pub(crate) places: Places,
    pub(crate) serial: SerialSetup,
    pub(crate) boot_timer: Option<StartTimes>,
    pub(crate) events: EventSink,
}

/// Where it begins.
pub(crate) enum Origin<'a> {
    /// At a kernel's entry.
    Boot { cpuid: &'a Cpuid, loaded: &'a Loaded },
    /// Where a machine stood when it was saved; on a host that shows `cpuid`.
    State { cpuid: &'a Cpuid, state: &'a MachineState, clock: ClockAfter },
}

/// Puts it together, its vCPUs paused.
pub(crate) fn assemble(
    kvm: Kvm,
    config: &MachineConfig,
    parts: Parts,
    origin: &Origin<'_>,
) -> Result<Machine, StartError> {
    let (saved, after) = match origin {
        Origin::State { state, clock, .. } => (Some(*state), *clock),
        Origin::Boot { .. } => (None, ClockAfter::default()),
    };
    let (vm, vcpu_fds) = kvm
        .create_vm()?
        .map_ram(parts.ram, config.track_dirty_pages)?
        .create_irqchip()?
        .create_vcpus(config.vcpu_count)?;

    if let Origin::State { cpuid, state, .. } = origin {
        check_processor(cpuid, state, &vcpu_fds)?;
        state.chipset.restore_irqchips(&vm.shared_fd())?;
        let format = StateFormat::of(&kvm, &vm)?;
        let passed = state.chipset.time_passed(after, SystemTime::now());
        for (fd, state) in vcpu_fds.iter().zip(&state.vcpus) {
            state.restore(fd, &format, passed)?;
            // What the pause told the guest's watchdogs was for the vCPU that it was. KVM refuses it for a guest without such a clock.
            let _ = fd.kvmclock_ctrl();
        }
    }
    if let Origin::Boot { cpuid, loaded } = origin {
        for (id, fd) in (0..).zip(&vcpu_fds) {
            // CPUID first: what it shows decides which registers there are.
            fd.set_cpuid2(&cpuid.for_vcpu(id)?).named("KVM_SET_CPUID2")?;
            set_boot_msrs(fd)?;
            loaded.set_up_vcpu(fd)?;
            set_fpu(fd)?;
            set_lapic(fd)?;
        }
    }

    let (pump, serial) = start_console(&vm, parts.serial, saved.map(|state| &state.serial))?;
    let keyboard = Arc::new(I8042::new(irq_line(&vm, layout::I8042_IRQ)?, clone_sink(&parts.events)?));
    if let Some(state) = saved {
        keyboard.restore(&state.keyboard);
    }
    let cmos = Arc::new(Cmos::restore(saved.map(|state| state.cmos).unwrap_or_default()));
    let power = Arc::new(Power::new(clone_sink(&parts.events)?));
    let boot_timer = parts.boot_timer.map(|start| Arc::new(BootTimer::new(start)));
    let mut buses = fill_buses(serial.clone(), keyboard.clone(), cmos.clone(), power, boot_timer);
    let devices =
        Devices::attach(parts.devices, parts.places, saved.map(|state| &state.devices), &vm, &mut buses)?;
    let generation = Generation::new(vm.ram().clone(), irq_line(&vm, layout::GENERIC_EVENT_IRQ)?);
    let lives = if saved.is_some() { generation.advance() } else { generation.begin() };
    lives.map_err(|source| StartError::Host { what: "a VM generation id", source })?;

    let buses = Arc::new(buses);
    let mut vcpus = Vec::with_capacity(vcpu_fds.len());
    for (id, fd) in (0..).zip(vcpu_fds) {
        let events = clone_sink(&parts.events)?;
        let handle =
            VcpuHandle::spawn(id, (fd, vm.shared_fd().run_size()), vm.ram().clone(), buses.clone(), events)
                .map_err(|source| StartError::Host { what: "a vCPU thread", source })?;
        vcpus.push(handle);
    }
    if let Some(state) = saved {
        state.chipset.restore_clock(&vm.shared_fd(), after)?;
        state.chipset.restore_pit(&vm.shared_fd())?;
    }
    Ok(Machine { page_watch: None, vcpus, devices, pump, serial, keyboard, cmos, vm, kvm })
}

/// A saved guest must find here what it knows of its processor.
fn check_processor(cpuid: &Cpuid, state: &MachineState, fresh: &[VcpuFd]) -> Result<(), StartError> {
    let (Some(fd), Some(saved)) = (fresh.first(), state.vcpus.first()) else { return Ok(()) };
    let missing = missing_features(cpuid, fd, &saved.cpuid)?;
    if missing.is_empty() { Ok(()) } else { Err(StartError::OtherProcessor { missing }) }
}

impl StateFormat {
    /// What saving and restoring need to know of this host.
    pub(crate) fn of(kvm: &Kvm, vm: &Vm) -> Result<Self, KvmError> {
        let mut msrs = kvm.msr_indices()?;
        msrs.extend(unlisted_msrs().filter(|index| !msrs.contains(index)).collect::<Vec<_>>());
        Ok(StateFormat { msrs, xsave: XsaveSize::of(&vm.shared_fd()), nested: kvm.saves_nested_state() })
    }
}

fn start_console(
    vm: &Vm,
    setup: SerialSetup,
    saved: Option<&SerialPortState>,
) -> Result<(Pump, Arc<SerialPort>), StartError> {
    let interrupt = irq_line(vm, layout::COM1_IRQ)?;
    console::start(setup, |console| match saved {
        Some(state) => SerialPort::restore(state, interrupt, console),
        None => Ok(SerialPort::new(interrupt, console)),
    })
    .map_err(|source| StartError::Host { what: "the serial port", source })
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
    cmos: Arc<Cmos>,
    power: Arc<Power>,
    boot_timer: Option<Arc<BootTimer>>,
) -> Buses {
    let mut buses = Buses { ports: Bus::default(), mmio: Bus::default() };
    let port = u64::from;
    let ports = [
        (port(layout::COM1)..port(layout::COM1) + 8, serial as Arc<dyn BusDevice>),
        (port(layout::I8042)..port(layout::I8042) + 5, keyboard),
        (port(layout::CMOS)..port(layout::CMOS) + 2, cmos),
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
