//! The start of a fork's child, in its own process: its machine as it was saved, around the memory
//! that the kernel gave it.

use std::sync::Arc;

use block::disk::FileLocks;
use config::Drive;
use machine::chipset::ClockAfter;
use machine::{EventSink, Paused, Restore};

use crate::backends::Backends;
use crate::boot::open_serial;
use crate::child::{ChildSpec, ParentState, Reporter};
use crate::drives::Drives;
use crate::events::{Event, EventLog, StartedBy};
use crate::host::Host;
use crate::microvm::MicroVm;
use crate::networks::Networks;
use crate::settings::Settings;
use crate::vsock::VsockSockets;
use crate::{CommandError, Instance, Platform};

/// Builds the child and starts it. The reporter is returned either way.
pub(crate) fn start<H: Host>(
    host: &mut H,
    instance: Arc<Instance>,
    spec: ChildSpec,
    parent: ParentState,
    sink: EventSink,
    events: EventLog,
) -> (Reporter, Result<MicroVm, CommandError>) {
    let ChildSpec { platform, config, metadata, networks, resume, reporter, metrics, .. } = spec;
    let platform = Platform { boot_timer: None, ..platform };
    let mut vm = MicroVm::new(instance, platform, sink, events);
    vm.metadata = metadata;
    let (settings, drives, interfaces) = Settings::split(config);
    vm.backends.settings = settings;
    vm.backends.networks = Networks::with_backends(interfaces, networks);
    vm.metrics.set_process(host.process_counts());
    let configured = metrics.map_or(Ok(()), |metrics| {
        let last = vm.metrics.configure(&metrics, &vm.instance.identity().id)?;
        host.keep_last_line(last);
        Ok(())
    });
    let started =
        configured.and_then(|()| open(&mut vm, drives)).and_then(|()| restore(&mut vm, host, parent, resume));
    (reporter, started.map(|()| vm))
}

/// Opens the rest of the child's backends.
fn open(vm: &mut MicroVm, drives: Vec<Drive>) -> Result<(), CommandError> {
    let notices = vm.lifecycle.notices();
    let Backends { settings, drives: disks, vsock, .. } = &mut vm.backends;
    // The parent created the files of the overlays, and made their directory entries durable.
    *disks = Drives::open(drives, &FileLocks::default(), true)?;
    disks.report_failures(notices);
    *vsock = VsockSockets::create(settings.vsock.as_ref())?;
    let serial_path = settings.serial.as_ref().and_then(|serial| serial.serial_out_path.as_deref());
    vm.serial_output = serial_path.map(open_serial).transpose()?;
    Ok(())
}

fn restore<H: Host>(
    vm: &mut MicroVm,
    host: &H,
    parent: ParentState,
    resume: bool,
) -> Result<(), CommandError> {
    let ParentState { state, ram } = parent;
    let settings = &vm.backends.settings;
    let machine = Paused::restore(Restore {
        config: &settings.machine_config,
        cpu_config: settings.cpu_config.as_ref(),
        state: &state,
        ram,
        page_server: None,
        serial: vm.serial_to_file(settings).map_err(CommandError::Serial)?,
        devices: vm.device_setup(),
        clock: ClockAfter::Continues,
        events: vm.lifecycle.events().map_err(CommandError::start)?,
        stop: host.asked_to_end(),
    })
    .map_err(CommandError::start)?;
    vm.backends.networks.release();
    vm.metrics.guest_starts(machine.stats());
    vm.lifecycle.start(machine, resume).map_err(CommandError::start)?;
    vm.events.publish(&Event::Started { by: StartedBy::Fork, phase: vm.lifecycle.phase() });
    Ok(())
}
