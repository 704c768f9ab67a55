//! Putting a machine together, one that boots or one that was saved.
//!
//! Both go the same way; they differ in where a vCPU's registers and a device's state come from ([`Origin`]). The order is
//! KVM's ([`crate::kvm`]), and then: interrupt controllers before vCPUs, because local APICs speak to them; vCPUs before devices, because a
//! restored device interrupts at once and a vCPU that is given its state afterwards would forget
//! it; the timer chip last, for the same reason.
//!
//! # Guest memory that is missing
//!
//! The memory of a restored machine may come from a page server that stalls, or from a file on a
//! disk that does. A thread that accesses a missing page cannot be interrupted. So this thread
//! accesses no guest memory but the pages that the load fetched before ([`crate::generation`]), and
//! devices are paused until the machine runs. KVM accesses guest memory when a vCPU gets its state;
//! each does so on its own thread, and this thread waits for all of them ([`restore_vcpus`]) only
//! as long as pages arrive and the restore is not cancelled.

use std::os::fd::BorrowedFd;
use std::sync::Arc;
use std::time::{Duration, SystemTime};

use config::MachineConfig;
use kvm_ioctls::{Cap, VcpuFd};
use memory::GuestRam;
use memory::page_server::PageServer;
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use sync::EventFd;

use crate::boot::Loaded;
use crate::bus::{Bus, BusDevice};
use crate::chipset::ClockAfter;
use crate::cpu::registers::{set_fpu, set_lapic};
use crate::cpu::{
    Cpuid, StateFormat, XsaveSize, missing_features, restore_counters, set_boot_msrs, unlisted_msrs,
};
use crate::devices::{DeviceAddresses, DeviceSetup, Devices};
use crate::events::EventSink;
use crate::generation::Generation;
use crate::kvm::{Ioctl, Kvm, KvmError, Vm};
use crate::layout;
use crate::legacy::console::{self, Pump};
use crate::legacy::{BootTimer, Cmos, I8042, Power, SerialPort, SerialPortState, SerialSetup, StartTimes};
use crate::machine::{Machine, StartError};
use crate::state::MachineState;
use crate::vcpu::{Buses, VcpuHandle};

/// Longest that a page server may take for a page that a vCPU needs to get its state.
const PAGE_PATIENCE: Duration = Duration::from_secs(10);

/// How long one look at the vCPUs waits before whoever may end the wait is looked at.
const TURN: Duration = Duration::from_millis(20);

/// What a machine is made of, whatever its past.
pub(crate) struct Parts {
    pub(crate) ram: GuestRam,
    pub(crate) devices: DeviceSetup,
    pub(crate) addresses: DeviceAddresses,
    pub(crate) serial: SerialSetup,
    pub(crate) boot_timer: Option<StartTimes>,
    pub(crate) events: EventSink,
}

/// Where it begins.
pub(crate) enum Origin<'a> {
    /// At a kernel's entry.
    Boot { cpuid: &'a Cpuid, loaded: &'a Loaded },
    /// Where a machine stood when it was saved; on a host that shows `cpuid`.
    State { cpuid: &'a Cpuid, state: &'a MachineState, clock: ClockAfter, wait: Wait<'a> },
}

/// What ends the wait for guest memory while vCPUs get their state.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Wait<'a> {
    /// Sends the pages, if a server does.
    pub(crate) page_server: Option<&'a PageServer>,
    /// Readable once the restore is cancelled.
    pub(crate) stop: Option<BorrowedFd<'a>>,
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

    let format = Arc::new(StateFormat::of(&kvm, &vm)?);
    if let Origin::State { cpuid, state, .. } = origin {
        check_processor(cpuid, state, &vcpu_fds)?;
        state.chipset.restore_irqchips(&vm.shared_fd())?;
        for (fd, state) in vcpu_fds.iter().zip(&state.vcpus) {
            state.prepare(fd, &format)?;
        }
        // Together, so that they go on as they stood to each other.
        restore_counters(&vcpu_fds, &state.vcpus, state.chipset.time_passed(after, SystemTime::now()))?;
        state.chipset.restore_clock(&vm.shared_fd(), after)?;
    }
    if let Origin::Boot { cpuid, loaded } = origin {
        for (id, fd) in (0..).zip(&vcpu_fds) {
            // CPUID first: what it shows decides which registers there are.
            fd.set_cpuid2(&cpuid.for_vcpu(id)?).ioctl("KVM_SET_CPUID2")?;
            set_boot_msrs(fd)?;
            loaded.set_up_vcpu(fd)?;
            set_fpu(fd)?;
            set_lapic(fd)?;
        }
    }

    let mut vcpus = Vec::with_capacity(vcpu_fds.len());
    for (id, fd) in (0..).zip(vcpu_fds) {
        let (size, events) = (vm.shared_fd().run_size(), clone_sink(&parts.events)?);
        let handle = VcpuHandle::spawn(id, (fd, size), vm.ram().clone(), events)
            .map_err(|source| StartError::Host { what: "a vCPU thread", source })?;
        vcpus.push(handle);
    }
    if let Origin::State { state, wait, .. } = origin {
        vcpus = restore_vcpus(vcpus, state, &format, *wait)?;
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
        Devices::attach(parts.devices, parts.addresses, saved.map(|state| &state.devices), &vm, &mut buses)?;
    let generation = Generation::new(vm.ram().clone(), irq_line(&vm, layout::GENERIC_EVENT_IRQ)?);
    let lives = if saved.is_some() { generation.advance() } else { generation.begin() };
    lives.map_err(|source| StartError::Host { what: "a VM generation id", source })?;

    let buses = Arc::new(buses);
    vcpus.iter().try_for_each(|vcpu| vcpu.connect(&buses))?;
    if let Some(state) = saved {
        state.chipset.restore_pit(&vm.shared_fd())?;
    }
    Ok(Machine { page_watch: None, vcpus, devices, pump, serial, keyboard, cmos, vm, kvm })
}

/// Gives the vCPUs their state, each on its own thread, and waits for all.
///
/// If pages do not arrive, the threads that wait for them are let go: with zeros where a page
/// server was to send them (the memory is of no use then), or to wait on without the main thread
/// of a process that ends.
fn restore_vcpus(
    vcpus: Vec<VcpuHandle>,
    state: &MachineState,
    format: &Arc<StateFormat>,
    wait: Wait<'_>,
) -> Result<Vec<VcpuHandle>, StartError> {
    for (vcpu, state) in vcpus.iter().zip(&state.vcpus) {
        vcpu.request_restore(state.clone(), format)?;
    }
    match wait_restored(&vcpus, wait) {
        Ok(()) => Ok(vcpus),
        Err(error) => {
            match (wait.page_server, &error) {
                (Some(server), _) => server.release(),
                (None, StartError::Cancelled) => vcpus.into_iter().for_each(VcpuHandle::abandon),
                // A file's pages come, or the access fails.
                (None, _) => {}
            }
            Err(error)
        }
    }
}

fn wait_restored(vcpus: &[VcpuHandle], wait: Wait<'_>) -> Result<(), StartError> {
    let mut left = vcpus.iter();
    let mut next = left.next();
    // Whether there is nothing more to wait for. Looks for at most `turn`.
    let mut look = |turn: Duration| -> Result<bool, StartError> {
        while let Some(vcpu) = next {
            let Some(restored) = vcpu.poll_restored(turn)? else {
                return if is_readable(wait.stop) { Err(StartError::Cancelled) } else { Ok(false) };
            };
            restored?;
            next = left.next();
        }
        Ok(true)
    };
    match wait.page_server {
        Some(server) => server.wait_while_serving(PAGE_PATIENCE, look),
        None => {
            while !look(TURN)? {}
            Ok(())
        }
    }
}

/// Whether the descriptor, if there is one, is readable now.
fn is_readable(fd: Option<BorrowedFd<'_>>) -> bool {
    let Some(fd) = fd else { return false };
    let now = Timespec { tv_sec: 0, tv_nsec: 0 };
    let mut fds = [PollFd::from_borrowed_fd(fd, PollFlags::IN)];
    // An interrupted look is made again at the next turn.
    poll(&mut fds, Some(&now)).is_ok_and(|ready| ready > 0)
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
        Ok(StateFormat {
            msrs,
            xsave: XsaveSize::of(&vm.shared_fd()),
            nested: kvm.saves_nested_state(),
            scales_tsc: vm.shared_fd().check_extension(Cap::TscControl),
        })
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
    let event = EventFd::new().map_err(|source| StartError::Host { what: "an interrupt line", source })?;
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
