//! The steps that building and restoring a machine have in common.
//!
//! They differ in where the state of vCPUs and devices comes from ([`VmSource`]). The order is that
//! of KVM's calls ([`crate::kvm`]), and:
//!
//! 1. interrupt controllers before vCPUs, because local APICs talk to them;
//! 2. vCPUs before devices, because a restored device raises an interrupt at once, which would be
//!    lost in a vCPU that gets its state afterwards;
//! 3. the timer chip last, for the same reason.
//!
//! # Guest memory that is missing
//!
//! The memory of a restored machine may come from a page server that stalls, or from a file on a
//! disk that does. A thread that accesses a missing page cannot be interrupted. So this thread
//! accesses no guest memory but pages that the load has fetched before ([`crate::vm_gen_id`]), and
//! devices stay paused until the machine runs. KVM accesses guest memory when a vCPU gets its
//! state; each vCPU does so on its own thread. This thread waits for all of them
//! ([`restore_vcpus`]) only as long as pages arrive and the restore is not cancelled.

use std::os::fd::BorrowedFd;
use std::sync::Arc;
use std::time::{Duration, SystemTime};

use config::MachineConfig;
use kvm_ioctls::VcpuFd;
use memory::GuestRam;
use memory::page_server::PageServer;
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use sync::EventFd;

use super::error::StartError;
use super::instance::Machine;
use crate::boot::Loaded;
use crate::bus::{Bus, BusDevice, Buses};
use crate::chipset::ClockAfter;
use crate::cpu::registers::{set_fpu, set_lapic};
use crate::cpu::{Cpuid, GuestCpu, StateFormat, VcpuState, missing_features, restore_counters};
use crate::debug::{DebugSocket, Debugger};
use crate::devices::{DeviceAddresses, DeviceSetup, Devices};
use crate::events::EventSink;
use crate::kvm::{Kvm, Vm};
use crate::layout;
use crate::legacy::{
    BootTimer, Cmos, ConsoleThread, I8042, Power, PvPanic, SerialPort, SerialPortState, SerialSetup,
    StartTimes,
};
use crate::state::MachineState;
use crate::vcpu::VcpuHandle;
use crate::vm_gen_id::VmGenId;

/// How long a page server may take for a page that a vCPU needs to get its state.
const PAGE_TIMEOUT: Duration = Duration::from_secs(10);

/// How often a wait for vCPUs looks whether the restore was cancelled.
const CANCEL_POLL: Duration = Duration::from_millis(20);

/// What a machine is built from, new or saved.
pub(super) struct VmParts {
    pub(super) ram: GuestRam,
    pub(super) devices: DeviceSetup,
    pub(super) addresses: DeviceAddresses,
    pub(super) serial: SerialSetup,
    pub(super) boot_timer: Option<StartTimes>,
    /// The socket of a debugger, for which the vCPUs wait.
    pub(super) debug_socket: Option<DebugSocket>,
    pub(super) events: EventSink,
}

/// Where the state of vCPUs and devices comes from.
pub(super) enum VmSource<'a> {
    /// A kernel in guest memory, at its entry, on a `cpu`.
    Boot { cpu: &'a GuestCpu<'a>, loaded: &'a Loaded },
    /// A saved machine, on a host that supports `cpuid`.
    State { cpuid: &'a Cpuid, state: &'a MachineState, clock: ClockAfter, wait: RestoreWait<'a> },
}

/// The conditions that end the wait for guest memory while vCPUs get their state.
#[derive(Debug, Clone, Copy)]
pub(super) struct RestoreWait<'a> {
    /// Sends the pages, if a page server does.
    pub(super) page_server: Option<&'a PageServer>,
    /// Readable once the restore is cancelled.
    pub(super) stop: Option<BorrowedFd<'a>>,
}

/// Assembles a machine with paused vCPUs.
pub(super) fn assemble(
    kvm: Kvm,
    config: &MachineConfig,
    parts: VmParts,
    source: &VmSource<'_>,
) -> Result<Machine, StartError> {
    let (saved, after) = match source {
        VmSource::State { state, clock, .. } => (Some(*state), *clock),
        VmSource::Boot { .. } => (None, ClockAfter::default()),
    };
    let (vm, vcpu_fds) = kvm
        .create_vm()?
        .map_ram(parts.ram, config.track_dirty_pages)?
        .create_irqchip()?
        .create_vcpus(config.vcpu_count)?;

    let more_msrs = match source {
        VmSource::Boot { cpu, .. } => cpu.template_msrs(),
        // Among them are those that a template changed before the save.
        VmSource::State { state, .. } => state.vcpus.first().map_or_else(Vec::new, VcpuState::msr_indices),
    };
    let format = Arc::new(StateFormat::of(&kvm, &vm, &more_msrs)?);
    if let VmSource::State { cpuid, state, .. } = source {
        check_cpu_features(cpuid, state, &vcpu_fds)?;
        state.chipset.restore_irqchips(&vm.shared_fd())?;
        for (fd, state) in vcpu_fds.iter().zip(&state.vcpus) {
            state.prepare(fd, &format)?;
        }
        // All at once, so that the differences between them stay as they were.
        let counters: Vec<_> = state.vcpus.iter().map(VcpuState::counter).collect();
        restore_counters(&vcpu_fds, &counters, state.chipset.time_passed(after, SystemTime::now()))?;
        state.chipset.restore_clock(&vm.shared_fd(), after)?;
    }
    if let VmSource::Boot { cpu, loaded } = source {
        cpu.set_up(&vcpu_fds)?;
        for fd in &vcpu_fds {
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
    if let VmSource::State { state, wait, .. } = source {
        vcpus = restore_vcpus(vcpus, state, &format, *wait)?;
    }

    let (console, serial) = start_console(&vm, parts.serial, saved.map(|state| &state.serial))?;
    let keyboard = Arc::new(I8042::new(irq_line(&vm, layout::I8042_IRQ)?, clone_sink(&parts.events)?));
    if let Some(state) = saved {
        keyboard.restore(&state.keyboard);
    }
    let cmos = Arc::new(Cmos::restore(saved.map(|state| state.cmos).unwrap_or_default()));
    let power = Arc::new(Power::new(clone_sink(&parts.events)?));
    let notices = parts.events.notices();
    let pvpanic = Arc::new(PvPanic::new(notices.clone()));
    let boot_timer = parts.boot_timer.map(|start| Arc::new(BootTimer::new(start)));
    let mut buses = fill_buses(serial.clone(), keyboard.clone(), cmos.clone(), power, pvpanic, boot_timer);
    let saved_devices = saved.map(|state| &state.devices);
    let devices =
        Devices::attach(parts.devices, parts.addresses, saved_devices, &vm, &mut buses, Arc::new(notices))?;
    let vm_gen_id = VmGenId::new(vm.ram().clone(), irq_line(&vm, layout::GENERIC_EVENT_IRQ)?);
    let written = if saved.is_some() { vm_gen_id.change() } else { vm_gen_id.init() };
    written.map_err(|source| StartError::Host { what: "a VM generation id", source })?;

    let buses = Arc::new(buses);
    vcpus.iter().try_for_each(|vcpu| vcpu.connect(&buses))?;
    if let Some(state) = saved {
        state.chipset.restore_pit(&vm.shared_fd())?;
    }
    let debugger = match parts.debug_socket {
        Some(socket) => Some(Debugger::start(socket, &kvm, &vcpus, vm.ram().clone(), parts.events)?),
        None => None,
    };
    let page_watch = None;
    Ok(Machine { debugger, page_watch, vcpus, devices, console, serial, keyboard, cmos, more_msrs, vm, kvm })
}

/// Restores the state of the vCPUs, each on its own thread, and waits for all.
///
/// After an error, threads that wait for a page server get zeros instead and end: the memory is of
/// no use any more. If the restore is cancelled while pages of a file do not arrive, the threads
/// are abandoned: the process is about to end.
fn restore_vcpus(
    vcpus: Vec<VcpuHandle>,
    state: &MachineState,
    format: &Arc<StateFormat>,
    wait: RestoreWait<'_>,
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
                // Without a page server, no thread is left waiting: pages of a file arrive, or the
                // access fails.
                (None, _) => {}
            }
            Err(error)
        }
    }
}

fn wait_restored(vcpus: &[VcpuHandle], wait: RestoreWait<'_>) -> Result<(), StartError> {
    let mut left = vcpus.iter();
    let mut next = left.next();
    // Waits at most `limit`. Returns whether all vCPUs are restored.
    let mut poll_once = |limit: Duration| -> Result<bool, StartError> {
        while let Some(vcpu) = next {
            let Some(restored) = vcpu.poll_restored(limit)? else {
                return if is_readable(wait.stop) { Err(StartError::Cancelled) } else { Ok(false) };
            };
            restored?;
            next = left.next();
        }
        Ok(true)
    };
    match wait.page_server {
        Some(server) => server.wait_while_serving(PAGE_TIMEOUT, poll_once),
        None => {
            while !poll_once(CANCEL_POLL)? {}
            Ok(())
        }
    }
}

/// Whether the descriptor, if there is one, is readable now.
fn is_readable(fd: Option<BorrowedFd<'_>>) -> bool {
    let Some(fd) = fd else { return false };
    let now = Timespec { tv_sec: 0, tv_nsec: 0 };
    let mut fds = [PollFd::from_borrowed_fd(fd, PollFlags::IN)];
    // After EINTR the next poll finds out.
    poll(&mut fds, Some(&now)).is_ok_and(|ready| ready > 0)
}

/// Checks that this host's CPU has the features that CPUID showed to the saved guest.
fn check_cpu_features(cpuid: &Cpuid, state: &MachineState, fresh: &[VcpuFd]) -> Result<(), StartError> {
    let (Some(fd), Some(saved)) = (fresh.first(), state.vcpus.first()) else { return Ok(()) };
    let missing = missing_features(cpuid, fd, &saved.cpuid)?;
    if missing.is_empty() { Ok(()) } else { Err(StartError::MissingCpuFeatures { missing }) }
}

fn start_console(
    vm: &Vm,
    setup: SerialSetup,
    saved: Option<&SerialPortState>,
) -> Result<(ConsoleThread, Arc<SerialPort>), StartError> {
    let interrupt = irq_line(vm, layout::COM1_IRQ)?;
    ConsoleThread::start(setup, |console| match saved {
        Some(state) => SerialPort::restore(state, interrupt, console),
        None => Ok(SerialPort::new(interrupt, console)),
    })
    .map_err(|source| StartError::Host { what: "the serial port", source })
}

/// Creates an eventfd that raises interrupt line `gsi` when signalled.
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
    pvpanic: Arc<PvPanic>,
    boot_timer: Option<Arc<BootTimer>>,
) -> Buses {
    let mut buses = Buses { ports: Bus::default(), mmio: Bus::default() };
    let port = u64::from;
    let ports = [
        (port(layout::COM1)..port(layout::COM1) + 8, serial as Arc<dyn BusDevice>),
        (port(layout::I8042)..port(layout::I8042) + 5, keyboard),
        (port(layout::CMOS)..port(layout::CMOS) + 2, cmos),
        (port(layout::PVPANIC)..port(layout::PVPANIC) + 1, pvpanic),
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
