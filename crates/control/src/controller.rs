//! [`Controller`]: dispatches each command to the module that carries it out.
//!
//! # Invariants
//!
//! - The main thread has the only [`Controller`] and gives it one [`Command`] at a time; there is
//!   no lock. While a command takes long, the [task](crate::task) module answers questions of API
//!   clients from the same [`MicroVm`].
//! - The phase is changed by [`lifecycle`](crate::lifecycle) alone.
//!
//! # Errors
//!
//! [`CommandError`], for the user. What ends the guest, and notices about it, are sent to the
//! receiver of the machine's event channel, not returned here. It passes them on for clients that
//! watch the microVM ([`Controller::publish_notices`], [`Controller::publish`]).

use std::os::fd::BorrowedFd;
use std::sync::Arc;
use std::time::{Duration, Instant};

use config::{
    BootSource, CpuConfigSource, MachineConfig, MmdsConfig, NetworkInterface, NetworkInterfaceUpdate, Serial,
    VmConfig, VmState, Vsock,
};
use machine::debug::DebugEnd;
use machine::machine::Machine;
use machine::{EventSink, Notices};

use crate::api::Requests;
use crate::boot::{self, OpenedBootFiles};
use crate::events::{Event, EventLog};
use crate::fork::{ChildSpec, ParentState, Reporter};
use crate::host::Host;
use crate::live_snapshot::LiveSnapshotJob;
use crate::metrics::{Operation, StartupTimes};
use crate::microvm::MicroVm;
use crate::task::{Questions, Tasks};
use crate::vsock::VsockSockets;
use crate::{Command, CommandError, Instance, Phase, Platform, Reply};
use crate::{drive_commands, fork, pause, phase, shutdown, snapshot};

/// How long a pause waits for the guest's serial output to be written.
const SERIAL_DRAIN_TIMEOUT: Duration = Duration::from_millis(100);

/// The owner of a microVM. Runs commands, one at a time.
#[derive(Debug)]
pub struct Controller<H> {
    vm: MicroVm,
    tasks: Tasks<H>,
    /// The first command that described a microVM to boot. After it no snapshot can be loaded.
    boot_command: Option<&'static str>,
    /// The files of the boot source, opened when it was set.
    boot_files: Option<OpenedBootFiles>,
}

impl<H: Host> Controller<H> {
    /// A microVM that is not configured yet.
    ///
    /// Its machine reports to `sink`; what happens to it is published in `events`.
    pub fn new(
        instance: Arc<Instance>,
        host: H,
        platform: Platform,
        sink: EventSink,
        events: EventLog,
    ) -> Self {
        let vm = MicroVm::new(instance, platform, sink, events);
        vm.metrics.set_process(host.process_counts());
        Self::with_vm(vm, host)
    }

    fn with_vm(vm: MicroVm, host: H) -> Self {
        vm.instance.set_phase(vm.lifecycle.phase());
        Controller { vm, tasks: Tasks::new(host), boot_command: None, boot_files: None }
    }

    /// Starts a child of a fork, in its own process. `parent` is the guest as it was at the fork.
    pub fn start_child(
        mut host: H,
        instance: Arc<Instance>,
        spec: ChildSpec,
        parent: ParentState,
        sink: EventSink,
        events: EventLog,
    ) -> (Reporter, Result<Self, CommandError>) {
        let (reporter, started) = fork::start_child(&mut host, instance, spec, parent, sink, events);
        (reporter, started.map(|vm| Self::with_vm(vm, host)))
    }

    /// Sets the requests of the API's clients. Questions among them are answered while a command
    /// takes long.
    pub fn set_requests(&mut self, requests: Option<Requests>) {
        self.vm.metrics.set_api(requests.as_ref().map(Requests::stats));
        self.tasks.requests = requests;
    }

    /// The requests of the API's clients, if there is an API.
    pub fn requests(&self) -> Option<&Requests> {
        self.tasks.requests.as_ref()
    }

    /// Gives the requests back, because the process ends.
    pub fn take_requests(&mut self) -> Option<Requests> {
        self.tasks.requests.take()
    }

    /// Sets the time that the process took to start, for metrics.
    pub fn set_startup_times(&mut self, startup: StartupTimes) {
        self.vm.metrics.set_startup(startup);
    }

    /// Writes metrics that are due. Returns how long the main thread may wait until the next call;
    /// `None` for any time.
    pub fn tick(&self) -> Option<Duration> {
        self.vm.metrics.tick()
    }

    /// Applies a configuration file, and starts the guest. The CPU template is inline: the caller
    /// has read it where it is in a file.
    pub fn start_from(&mut self, config: VmConfig) -> Result<(), CommandError> {
        if let Some(logger) = config.logger {
            self.run(Command::PutLogger(logger))?;
        }
        if let Some(metrics) = config.metrics {
            self.run(Command::PutMetrics(metrics))?;
        }
        self.run(Command::PutMachineConfig(config.machine_config))?;
        if let Some(template) = config.cpu_config.and_then(CpuConfigSource::inline) {
            self.run(Command::PutCpuConfig(template))?;
        }
        self.run(Command::PutBootSource(config.boot_source))?;
        if let Some(serial) = config.serial {
            self.run(Command::PutSerial(serial))?;
        }
        for drive in config.drives {
            self.run(Command::PutDrive(drive))?;
        }
        for network in config.network_interfaces {
            self.run(Command::PutNetwork(network))?;
        }
        if let Some(entropy) = config.entropy {
            self.run(Command::PutEntropy(entropy))?;
        }
        if let Some(vsock) = config.vsock {
            self.run(Command::PutVsock(vsock))?;
        }
        if let Some(mmds) = config.mmds_config {
            self.run(Command::PutMmdsConfig(mmds))?;
        }
        self.run(Command::Start).map(drop)
    }

    /// Runs one command, if it is possible in the present phase.
    pub fn run(&mut self, command: Command) -> Result<Reply, CommandError> {
        phase::check(&command, self.phase())?;
        let boot_command = command.describes_boot().then(|| command.name());
        let operation = Operation::of(&command).map(|operation| (operation, Instant::now()));
        let reply = self.dispatch(command);
        self.vm.instance.set_phase(self.phase());
        self.publish_snapshot_job();
        let reply = reply?;
        if let Some((operation, begun)) = operation {
            self.took(operation, begun.elapsed());
        }
        self.boot_command = self.boot_command.or(boot_command);
        Ok(reply)
    }

    /// Notes how long an operation took. Tools match the words of the line.
    fn took(&self, operation: Operation, took: Duration) {
        self.vm.metrics.operations().durations.set(operation, took);
        let (name, micros) = (operation.name_in_log(), took.as_micros());
        log::info!(target: "vmm::rpc_interface", "'{name}' VMM action took {micros} us.");
    }

    fn dispatch(&mut self, command: Command) -> Result<Reply, CommandError> {
        if let Some(answer) = self.vm.answer(&command) {
            return answer;
        }
        let Self { vm, tasks, .. } = self;
        match command {
            Command::PutMachineConfig(config) => self.set_machine_config(config)?,
            Command::PatchMachineConfig(update) => {
                let config = vm.backends.settings.machine_config.updated(&update)?;
                self.set_machine_config(config)?;
            }
            Command::PutCpuConfig(template) => {
                template.check()?;
                vm.backends.settings.set_cpu_config(template);
            }
            Command::PutBootSource(source) => self.set_boot_source(source)?,
            Command::PutLogger(logger) => {
                logger.check()?;
                tasks.host.set_up_logger(&logger).map_err(|source| CommandError::Log {
                    path: logger.log_path.clone().unwrap_or_default(),
                    source,
                })?;
                let before = vm.backends.settings.logger.take().unwrap_or_default();
                vm.backends.settings.logger = Some(logger.after(before));
            }
            Command::PutMetrics(config) => {
                config.check()?;
                let last = vm.metrics.configure(&config, &vm.instance.identity().id)?;
                tasks.host.keep_last_line(last);
            }
            Command::PutSerial(serial) => self.set_serial(serial)?,
            Command::PutDrive(drive) => drive_commands::put(vm, tasks, &drive)?,
            Command::PatchDrive(update) => {
                let patched = drive_commands::patch(vm, tasks, &update);
                patched.inspect_err(|_| vm.metrics.count_failed_update(&update.drive_id))?;
            }
            Command::PutNetwork(network) => self.put_network(&network)?,
            Command::PatchNetwork(update) => self.patch_network(&update)?,
            Command::PutEntropy(entropy) => {
                entropy.check()?;
                vm.backends.settings.entropy = Some(entropy);
            }
            Command::PutVsock(vsock) => self.put_vsock(vsock)?,
            Command::PutMmdsConfig(config) => self.put_mmds_config(config)?,
            Command::PutMmds(contents) => vm.metadata.put(contents, vm.lifecycle.has_started())?,
            Command::PatchMmds(patch) => vm.metadata.patch(patch, vm.lifecycle.has_started())?,
            Command::Start => boot::start(vm, tasks, self.boot_files.as_ref())?,
            Command::FlushMetrics => vm.metrics.flush()?,
            // Questions are answered above.
            Command::DescribeInstance
            | Command::GetVersion
            | Command::GetOpenApi
            | Command::GetMachineConfig
            | Command::GetVmConfig
            | Command::GetMmds
            | Command::GetMetrics => {}
            Command::SendCtrlAltDel => {
                vm.lifecycle.machine().map_or(Ok(()), Machine::press_ctrl_alt_del)?;
            }
            Command::SetVmState(VmState::Paused) => {
                let ran = vm.lifecycle.is_running();
                pause::pause(vm, tasks)?;
                if ran {
                    vm.events.publish(&Event::Paused);
                }
                // The output of a paused guest can be read. If its reader stalls, it waits as
                // always.
                let machine = vm.lifecycle.machine();
                let _ = machine.is_none_or(|machine| machine.drain_serial(SERIAL_DRAIN_TIMEOUT));
            }
            Command::SetVmState(VmState::Resumed) => {
                let ran = vm.lifecycle.is_running();
                vm.resume()?;
                if !ran {
                    vm.events.publish(&Event::Resumed);
                }
                drive_commands::settle_swaps(vm, tasks);
            }
            Command::CreateSnapshot(create) => {
                let _kept_out = vm.keep_debugger_out()?;
                return snapshot::create(vm, tasks, &create);
            }
            Command::DescribeJob => return Ok(Reply::Json(self.live_snapshot()?.describe())),
            Command::CancelJob => self.live_snapshot()?.cancel(),
            Command::LoadSnapshot(load) => {
                if let Some(command) = self.boot_command {
                    return Err(CommandError::LoadAfterConfiguration { command });
                }
                snapshot::load(vm, tasks, &load)?;
            }
            Command::Fork(fork) => {
                let _kept_out = vm.keep_debugger_out()?;
                return fork::fork(vm, tasks, &fork);
            }
        }
        Ok(Reply::Empty)
    }

    /// Where the microVM is in its life.
    pub fn phase(&self) -> Phase {
        self.vm.lifecycle.phase()
    }

    /// Publishes an event that the process around the controller knows of: the guest's end or its
    /// own.
    pub fn publish(&self, event: &Event) {
        self.vm.events.publish(event);
    }

    /// Publishes what the machine's threads have noticed.
    pub fn publish_notices(&self, notices: Notices) {
        notices.list.into_iter().for_each(|notice| self.publish(&Event::Notice(notice)));
        self.vm.events.skip(notices.dropped);
    }

    /// A descriptor that is readable when the live snapshot that is being written is further, or
    /// has ended. `None` if there is none.
    pub fn snapshot_job_fd(&self) -> Option<BorrowedFd<'_>> {
        self.vm.live_snapshot.as_ref().and_then(LiveSnapshotJob::lines_fd)
    }

    /// Reads how far the live snapshot is, and publishes it if there is something new.
    pub fn publish_snapshot_job(&mut self) {
        self.vm.publish_snapshot_job();
    }

    /// Waits at most `limit` until the guest's serial output is written.
    pub fn drain_serial(&self, limit: Duration) {
        let machine = self.vm.lifecycle.machine();
        if !machine.is_none_or(|machine| machine.drain_serial(limit)) {
            log::warn!("the rest of the serial port's output was not read within {} ms", limit.as_millis());
        }
    }

    /// Does what is left to do for the microVM when the process ends, whether it was started or
    /// not: closes its overlays, which may take `limit`, removes the sockets of its vsock device,
    /// and writes the last line of metrics.
    pub fn shut_down(&mut self, limit: Duration) {
        self.vm.backends.drives.cancel_merges();
        shutdown::close_disks(&self.vm, limit);
        self.vm.backends.vsock = None;
        // The last line. A line that is lost is logged.
        let _ = self.vm.metrics.flush();
    }

    /// Reports the end of the guest to a debugger that is attached. No debugger is served any more.
    pub fn end_debugging(&self, end: DebugEnd) {
        if let Some(machine) = self.vm.lifecycle.machine() {
            machine.end_debugging(end);
        }
    }

    fn live_snapshot(&mut self) -> Result<&mut LiveSnapshotJob, CommandError> {
        self.vm.live_snapshot.as_mut().ok_or(CommandError::NoSnapshotJob)
    }

    fn set_machine_config(&mut self, config: MachineConfig) -> Result<(), CommandError> {
        config.check()?;
        self.vm.backends.settings.set_machine_config(config);
        Ok(())
    }

    fn set_boot_source(&mut self, source: BootSource) -> Result<(), CommandError> {
        source.check()?;
        self.boot_files = Some(boot::open_boot_source(&self.vm, &mut self.tasks, &source)?);
        self.vm.backends.settings.boot_source = Some(source);
        Ok(())
    }

    fn set_serial(&mut self, serial: Serial) -> Result<(), CommandError> {
        serial.check()?;
        self.vm.serial_output = serial.serial_out_path.as_deref().map(boot::open_serial).transpose()?;
        self.vm.backends.settings.serial = Some(serial);
        Ok(())
    }

    fn put_network(&mut self, network: &NetworkInterface) -> Result<(), CommandError> {
        let backends = &mut self.vm.backends;
        backends.networks.put(network, backends.settings.mmds_config.as_ref())
    }

    fn patch_network(&mut self, update: &NetworkInterfaceUpdate) -> Result<(), CommandError> {
        let machine = self.vm.lifecycle.machine();
        let control = machine.and_then(|machine| machine.devices().network(&update.iface_id));
        self.vm.backends.networks.patch(update, control)
    }

    fn put_vsock(&mut self, vsock: Vsock) -> Result<(), CommandError> {
        vsock.check()?;
        let backends = &mut self.vm.backends;
        VsockSockets::replace(&mut backends.vsock, &vsock)?;
        backends.settings.vsock = Some(vsock);
        Ok(())
    }

    fn put_mmds_config(&mut self, config: MmdsConfig) -> Result<(), CommandError> {
        self.vm.metadata.configure(&config, &self.vm.backends.networks.configs())?;
        self.vm.backends.settings.mmds_config = Some(config);
        Ok(())
    }
}
