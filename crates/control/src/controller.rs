//! Carrying commands out: the one owner of the configuration and, once there is one, of the machine.
//!
//! # Invariants
//!
//! - The main thread has the only [`Controller`] and gives it one [`Command`] at a time; there is
//!   no lock. While a command takes long, questions of API clients are answered
//!   ([`task`](crate::task)).
//! - [`State`] is changed in [`Controller::start`], [`Controller::set_vm_state`] and its variant in
//!   a task, and by a load or fork that begins. Nowhere else.
//! - A command that is refused leaves everything as it was: a start that fails can be tried again.
//!
//! # Errors
//!
//! [`CommandError`], for the user. What ends the guest arrives as a [`machine::MachineEvent`] at whoever owns the event
//! channel's other end, not here.

use std::fs::File;
use std::os::fd::{BorrowedFd, RawFd};
use std::os::unix::fs::FileTypeExt;
use std::path::Path;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use block::DiskSwap;
use block::disk::{Disk, DiskOptions, FileLocks};
use config::{
    BootSource, CpuTemplate, Drive, DriveUpdate, FullVmConfig, Logger, MachineConfig, MmdsConfig,
    NetworkInterface, NetworkInterfaceUpdate, Serial, VmConfig, VmState, Vsock, check_drives, check_networks,
};
use machine::boot::BootFiles;
use machine::devices::{DeviceSetup, VsockSetup, limits};
use machine::legacy::{Output, SerialSetup, StartTimes};
use machine::machine::{Machine, PauseError};
use machine::{EventSink, MachineEvent, Paused, Running, Setup, VcpuFault};
use net::NetBackend;
use rustix::fs::{Mode, OFlags};
use serde_json::json;
use virtio::rate_limiter::RateLimiterConfig;
use virtio::worker::monotonic;

use crate::api::Requests;
use crate::fork::Family;
use crate::fork::merging::Merges;
use crate::metadata::Metadata;
use crate::snapshot::ahead::Ahead;
use crate::snapshot::job::Job;
use crate::task::Token;
use crate::vsock::VsockSockets;
use crate::{Command, CommandError, Phase, Reply, phase};

/// How long a change of a drive waits for requests in flight on its old disk.
pub(crate) const REPLACE_PATIENCE: Duration = Duration::from_secs(5);

/// How long a pause may hold up the main thread, for the vCPUs and for the devices.
const QUICK_PAUSE: Duration = Duration::from_millis(20);

/// How long pausing waits for the serial port's output to be carried out.
const PAUSE_OUTPUT: Duration = Duration::from_millis(100);

/// Who the monitor says it is.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Identity {
    /// The microVM's id.
    pub id: String,
    /// The program's name.
    pub app_name: &'static str,
    /// The program's version.
    pub version: &'static str,
    /// The version of Firecracker whose API this is.
    pub api_version: &'static str,
}

/// What is decided once, when the process starts.
#[derive(Debug, Clone, Copy)]
pub struct Platform {
    /// Since when the boot timer counts; `None` for no boot timer.
    pub boot_timer: Option<StartTimes>,
    /// Devices are on virtio-pci instead of virtio-mmio.
    pub pci: bool,
    /// Most bytes that the metadata service's contents may be long, as JSON.
    pub mmds_size_limit: usize,
    /// Most bytes of an API request's body.
    pub max_payload: usize,
}

/// What the process around a controller does for it.
pub trait Host {
    /// Makes the log as `logger` says, or leaves it as it is and says why.
    fn set_up_logger(&mut self, logger: &Logger) -> Result<(), CommandError>;

    /// This process's standard input and output as the ends of a serial port.
    fn standard_io(&mut self) -> std::io::Result<SerialSetup>;

    /// Splits this process: into itself, which returns, and a child for each seed, which never does. A child is given to
    /// [`Controller::born`], and lives until its guest ends.
    fn fork(&mut self, family: Family) -> std::io::Result<()>
    where
        Self: Sized;

    /// Splits this process: into itself, which returns, and a child that has the descriptors `kept` and no others, does `work`, and ends with it. Whether
    /// it succeeded is its exit status.
    fn fork_writer(&mut self, kept: Vec<RawFd>, work: Box<dyn FnOnce() -> bool>) -> std::io::Result<()>;

    /// Readable once this process is asked to end, for commands that wait.
    fn asked_to_end(&self) -> Option<BorrowedFd<'_>> {
        None
    }

    /// The guest runs from now on, and has standard input and output if `with_standard_io`.
    fn guest_starts(&mut self, with_standard_io: bool);
}

/// The owner of configuration and machine.
#[derive(Debug)]
pub struct Controller<H> {
    pub(crate) identity: Identity,
    pub(crate) host: H,
    pub(crate) platform: Platform,
    pub(crate) events: EventSink,
    pub(crate) config: FullVmConfig,
    /// The first command that described a machine to boot. After it no snapshot can be loaded.
    pub(crate) boot_command: Option<&'static str>,
    /// What `config.boot_source` names, opened when it was set.
    boot_files: Option<OpenedBootFiles>,
    /// What `config.serial` names, opened when it was set.
    pub(crate) serial_output: Option<Output>,
    /// The disks of `config.drives`, in the same order, opened when they were set.
    pub(crate) disks: Vec<Disk>,
    /// What keeps other monitors from them.
    pub(crate) disk_locks: FileLocks,
    /// A task was left behind and may still use what it was given. The process is ending.
    pub(crate) left_behind: bool,
    /// What the guest can learn, and the way to it that `config.mmds_config` says.
    pub(crate) metadata: Metadata,
    /// The networks of `config.network_interfaces`, in the same order, opened when they were set.
    pub(crate) networks: Vec<NetBackend>,
    /// Disks that were replaced and may still be in use, by their drives' ids.
    pub(crate) settling: Vec<(String, DiskSwap)>,
    /// Layers of the disks that are being merged.
    pub(crate) merges: Merges,
    /// The live snapshot that is being written, or was last.
    pub(crate) job: Option<Job>,
    /// What fills in a restored guest's memory.
    pub(crate) ahead: Option<Ahead>,
    /// The sockets of `config.vsock`, made when it was set.
    pub(crate) vsock: Option<VsockSockets>,
    /// What clients of the API ask for, so that questions are answered while a command takes long.
    pub(crate) requests: Option<Requests>,
    pub(crate) state: State,
}

/// The life of a microVM. (Stopped is not here: the process ends.)
#[derive(Debug)]
pub(crate) enum State {
    Configured,
    Running(Running),
    /// A task pauses the machine, and has it.
    Pausing,
    Paused(Paused),
    /// A bug in this monitor left no machine. An event was posted that ends the process.
    Lost,
}

#[derive(Debug)]
struct OpenedBootFiles {
    kernel: File,
    initrd: Option<File>,
}

impl<H: Host> Controller<H> {
    /// A microVM that is not configured yet.
    pub fn new(identity: Identity, host: H, platform: Platform, events: EventSink) -> Self {
        Controller {
            identity,
            host,
            platform,
            events,
            config: FullVmConfig::default(),
            boot_command: None,
            boot_files: None,
            serial_output: None,
            disks: Vec::new(),
            disk_locks: FileLocks::default(),
            left_behind: false,
            metadata: Metadata::new(platform.mmds_size_limit),
            networks: Vec::new(),
            settling: Vec::new(),
            merges: Merges::default(),
            job: None,
            ahead: None,
            vsock: None,
            requests: None,
            state: State::Configured,
        }
    }

    /// Takes the requests of the API's clients: for [`Self::requests`], and for questions while a
    /// command takes long.
    pub fn set_requests(&mut self, requests: Option<Requests>) {
        self.requests = requests;
    }

    /// The requests of the API's clients, if there is an API.
    pub fn requests(&self) -> Option<&Requests> {
        self.requests.as_ref()
    }

    /// Gives the requests back: the process ends.
    pub fn take_requests(&mut self) -> Option<Requests> {
        self.requests.take()
    }

    /// Does everything that a configuration file says, and starts the guest.
    pub fn start_from(&mut self, config: VmConfig) -> Result<(), CommandError> {
        if let Some(logger) = config.logger {
            self.run(Command::PutLogger(logger))?;
        }
        self.run(Command::PutMachineConfig(config.machine_config))?;
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

    /// Carries out one command, if this is the time for it.
    pub fn run(&mut self, command: Command) -> Result<Reply, CommandError> {
        phase::check(&command, self.phase())?;
        let boot_command = command.describes_boot().then(|| command.name());
        let reply = self.carry_out(command)?;
        self.boot_command = self.boot_command.or(boot_command);
        Ok(reply)
    }

    fn carry_out(&mut self, command: Command) -> Result<Reply, CommandError> {
        if let Some(answer) = self.answer(&command) {
            return answer;
        }
        match command {
            Command::PutMachineConfig(config) => self.set_machine_config(config)?,
            Command::PatchMachineConfig(update) => {
                let config = self.config.machine_config.updated(&update)?;
                self.set_machine_config(config)?;
            }
            Command::PutBootSource(source) => self.set_boot_source(source)?,
            Command::PutLogger(logger) => {
                self.host.set_up_logger(&logger)?;
                self.config.logger = Some(logger);
            }
            Command::PutSerial(serial) => self.set_serial(serial)?,
            Command::PutDrive(drive) => self.put_drive(&drive)?,
            Command::PatchDrive(update) => self.patch_drive(&update)?,
            Command::PutNetwork(network) => self.put_network(&network)?,
            Command::PatchNetwork(update) => self.patch_network(&update)?,
            Command::PutEntropy(entropy) => {
                entropy.check()?;
                self.config.entropy = Some(entropy);
            }
            Command::PutVsock(vsock) => self.put_vsock(vsock)?,
            Command::PutMmdsConfig(config) => self.put_mmds_config(config)?,
            Command::PutMmds(contents) => self.metadata.put(contents, self.has_started())?,
            Command::PatchMmds(patch) => self.metadata.patch(patch, self.has_started())?,
            Command::Start => self.start()?,
            // There is no destination for metrics yet, so nothing waits to be written. Questions
            // are answered above.
            Command::FlushMetrics
            | Command::DescribeInstance
            | Command::GetVersion
            | Command::GetMachineConfig
            | Command::GetVmConfig
            | Command::GetMmds => {}
            Command::SendCtrlAltDel => self.press_ctrl_alt_del()?,
            Command::SetVmState(state) => {
                match state {
                    VmState::Paused => self.pause()?,
                    VmState::Resumed => self.set_vm_state(state)?,
                }
                self.settle_disks();
                if state == VmState::Paused {
                    // What a paused guest has written can be read; where nobody takes it, it waits as always.
                    let _ = self.machine().is_none_or(|machine| machine.drain_serial(PAUSE_OUTPUT));
                }
            }
            Command::CreateSnapshot(create) => return self.create_snapshot(&create),
            Command::DescribeJob => return self.with_job(Job::describe),
            Command::CancelJob => {
                return self.with_job(|job| {
                    job.cancel();
                    Reply::Empty
                });
            }
            Command::LoadSnapshot(load) => self.load_snapshot(&load)?,
            Command::Fork(fork) => {
                let forked = self.fork(&fork);
                self.merge_many_layers();
                return forked;
            }
        }
        Ok(Reply::Empty)
    }

    /// The answer to a question, which is possible in every phase and changes nothing; `None` for
    /// all other commands.
    pub(crate) fn answer(&self, command: &Command) -> Option<Result<Reply, CommandError>> {
        Some(match command {
            Command::DescribeInstance => Ok(Reply::Json(self.describe())),
            Command::GetVersion => {
                Ok(Reply::Json(json!({ "firecracker_version": self.identity.api_version })))
            }
            Command::GetMachineConfig => to_json(&self.config.machine_config),
            Command::GetVmConfig => to_json(&self.shown_config()),
            Command::GetMmds => self.metadata.get(self.has_started()).map(Reply::Json),
            _ => return None,
        })
    }

    fn has_started(&self) -> bool {
        self.phase() != Phase::Configured
    }

    fn with_job(&mut self, act: impl FnOnce(&mut Job) -> Reply) -> Result<Reply, CommandError> {
        let job = self.job.as_mut();
        job.map(act).ok_or_else(|| CommandError::new("there has been no live snapshot of this microVM"))
    }

    /// Where the microVM is in its life.
    pub fn phase(&self) -> Phase {
        match &self.state {
            State::Configured => Phase::Configured,
            State::Running(_) | State::Pausing => Phase::Running,
            State::Paused(_) | State::Lost => Phase::Paused,
        }
    }

    /// Waits at most `limit` until what the guest wrote to its serial port is out.
    pub fn drain_serial(&self, limit: Duration) {
        let out = self.machine().is_none_or(|machine| machine.drain_serial(limit));
        if !out {
            log::warn!("nobody took the rest of the serial port's output within {} ms", limit.as_millis());
        }
    }

    /// The configuration as its user sees it: each drive with the I/O engine in force, which `PUT /drives` takes back.
    fn shown_config(&self) -> FullVmConfig {
        let mut config = self.config.clone();
        // While a drive is opened anew there is one disk less than there are drives.
        if self.disks.len() == config.drives.len() {
            for (drive, disk) in config.drives.iter_mut().zip(&self.disks) {
                drive.io_engine = Some(disk.engine());
            }
        }
        config
    }

    fn describe(&self) -> serde_json::Value {
        json!({
            "id": self.identity.id,
            "state": self.phase().name(),
            "vmm_version": self.identity.version,
            "app_name": self.identity.app_name,
        })
    }

    fn set_machine_config(&mut self, config: MachineConfig) -> Result<(), CommandError> {
        config.check()?;
        match config.cpu_template {
            None | Some(CpuTemplate::None) => {}
            Some(template) => {
                log::warn!(
                    "cpu_template {template:?} is accepted and has no effect: this version shows the host's CPU"
                );
            }
        }
        self.config.machine_config = config;
        Ok(())
    }

    fn set_boot_source(&mut self, source: BootSource) -> Result<(), CommandError> {
        source.check()?;
        let (kernel, initrd) = (source.kernel_image_path.clone(), source.initrd_path.clone());
        let opened = self.task(None, move |_| {
            let kernel = open("kernel image", &kernel)?;
            let initrd = initrd.as_deref().map(|path| open("initrd", path)).transpose()?;
            Ok::<_, CommandError>(OpenedBootFiles { kernel, initrd })
        });
        self.boot_files = Some(opened??);
        self.config.boot_source = Some(source);
        Ok(())
    }

    fn set_serial(&mut self, serial: Serial) -> Result<(), CommandError> {
        serial.check()?;
        self.serial_output = serial.serial_out_path.as_deref().map(open_serial).transpose()?;
        self.config.serial = Some(serial);
        Ok(())
    }

    fn put_mmds_config(&mut self, config: MmdsConfig) -> Result<(), CommandError> {
        self.metadata.configure(&config, &self.config.network_interfaces)?;
        self.config.mmds_config = Some(config);
        Ok(())
    }

    /// Adds a drive, or sets it anew; its disk is opened now.
    fn put_drive(&mut self, drive: &Drive) -> Result<(), CommandError> {
        let at = self.config.drives.iter().position(|other| other.drive_id == drive.drive_id);
        let mut drives = self.config.drives.clone();
        match at {
            Some(at) => drives[at] = drive.clone(),
            None => drives.push(drive.clone()),
        }
        check_drives(&drives)?;
        match at {
            None => {
                let disk = self.open_disk(drive, None)?;
                self.disks.push(disk);
            }
            Some(at) => self.reopen_disk(at, drive)?,
        }
        self.config.drives = drives;
        Ok(())
    }

    /// Opens another disk for a drive that has one. An overlay is locked while it is open, so the old disk is closed first,
    /// and opened again should the new one fail.
    fn reopen_disk(&mut self, at: usize, drive: &Drive) -> Result<(), CommandError> {
        drop(self.disks.remove(at));
        let error = match self.open_disk(drive, None) {
            Ok(disk) => {
                self.disks.insert(at, disk);
                return Ok(());
            }
            Err(error) => error,
        };
        let old = self.config.drives[at].clone();
        match self.open_disk(&old, None) {
            Ok(disk) => self.disks.insert(at, disk),
            Err(gone) => {
                log::error!("{gone}; there is no such drive any more");
                self.config.drives.remove(at);
            }
        }
        Err(error)
    }

    /// Opens the disk of a drive, on a file system that may take long.
    fn open_disk(&mut self, drive: &Drive, replaces: Option<Disk>) -> Result<Disk, CommandError> {
        let (drive, locks) = (drive.clone(), self.disk_locks.clone());
        self.task(None, move |_| open_disk(&drive, &locks, replaces.as_ref()))?
    }

    /// Waits for requests in flight on disks that were replaced.
    pub(crate) fn wait_for_replaced(&mut self, replaced: Vec<(String, DiskSwap)>) {
        if replaced.is_empty() {
            return;
        }
        let waited = self.task(None, move |_| {
            for (drive_id, mut replaced) in replaced {
                if let Err(still) = replaced.wait(REPLACE_PATIENCE) {
                    log::warn!("drive {drive_id}: {still}; it is closed when they have ended");
                }
            }
        });
        if let Err(error) = waited {
            log::warn!("the requests in flight on replaced disks are not waited for: {error}");
        }
    }

    /// Adds the socket device, or sets it anew; its sockets are made now.
    fn put_vsock(&mut self, vsock: Vsock) -> Result<(), CommandError> {
        vsock.check()?;
        VsockSockets::make(&mut self.vsock, &vsock).map_err(CommandError::new)?;
        self.config.vsock = Some(vsock);
        Ok(())
    }

    /// Removes the files that stand for this process: it ends.
    pub fn remove_socket_files(&mut self) {
        self.vsock = None;
    }

    /// Changes a drive of the guest: another disk, other limits.
    fn patch_drive(&mut self, update: &DriveUpdate) -> Result<(), CommandError> {
        let no_such = || CommandError::new(format_args!("there is no drive {}", update.drive_id));
        let at = self.config.drives.iter().position(|drive| drive.drive_id == update.drive_id);
        let at = at.ok_or_else(no_such)?;
        let control = self.machine().and_then(|machine| machine.devices().drive(&update.drive_id)).cloned();
        let control = control.ok_or_else(no_such)?;
        let drive = self.config.drives[at].updated(update)?;
        // An overlay that is written to fits the disk that it was made on, and that one only: the same paths can be but the same disk.
        let same = self.disks[at].has_overlay()
            && DiskOptions::of(&drive) == DiskOptions::of(&self.config.drives[at]);
        if same && (update.path_on_host.is_some() || update.overlay.is_some()) {
            // It stays as it is, which is no way out of unknown contents.
            let named = |error| CommandError::new(format_args!("drive {}: {error}", drive.drive_id));
            self.disks[at].check().map_err(named)?;
        }
        if (update.path_on_host.is_some() || update.overlay.is_some()) && !same {
            let disk = self.open_disk(&drive, Some(self.disks[at].clone()))?;
            let replaced = control.replace(disk.clone()).map_err(CommandError::new)?;
            self.merges.give_up(&update.drive_id);
            self.disks[at] = disk;
            self.wait_for_replaced(vec![(drive.drive_id.clone(), replaced)]);
        }
        if update.rate_limiter.is_some() {
            control.update_limits(limits(update.rate_limiter.as_ref()), monotonic());
        }
        self.config.drives[at] = drive;
        Ok(())
    }

    /// Adds a network interface, or sets it anew; its network is opened now.
    fn put_network(&mut self, network: &NetworkInterface) -> Result<(), CommandError> {
        let at = self.config.network_interfaces.iter().position(|other| other.iface_id == network.iface_id);
        let mut networks = self.config.network_interfaces.clone();
        match at {
            Some(at) => networks[at] = network.clone(),
            None => networks.push(network.clone()),
        }
        check_networks(&networks)?;
        if let Some(mmds) = &self.config.mmds_config {
            mmds.check_interfaces(&networks)?;
        }
        match at {
            None => self.networks.push(NetBackend::open(network).map_err(CommandError::new)?),
            Some(at) if self.serves(at, network) => {}
            Some(at) => self.reopen_network(at, network)?,
        }
        self.config.network_interfaces = networks;
        Ok(())
    }

    /// Whether the network that is open for an interface is the one that `network` names, too. A tap that the monitor made would go with its
    /// last user, and a server of one connection with that.
    fn serves(&self, at: usize, network: &NetworkInterface) -> bool {
        self.config.network_interfaces[at].has_same_host_endpoint(network) && self.networks[at].is_there()
    }

    /// Opens another network for an interface that has one. The old one is closed when the new one is there; or before that, where both
    /// are the same tap, which has one user. It is opened again should the new one fail.
    fn reopen_network(&mut self, at: usize, network: &NetworkInterface) -> Result<(), CommandError> {
        let old = &self.config.network_interfaces[at];
        if old.host_dev_name.is_none() || old.host_dev_name != network.host_dev_name {
            self.networks[at] = NetBackend::open(network).map_err(CommandError::new)?;
            return Ok(());
        }
        drop(self.networks.remove(at));
        let error = match NetBackend::open(network) {
            Ok(backend) => {
                self.networks.insert(at, backend);
                return Ok(());
            }
            Err(error) => error,
        };
        match NetBackend::open(&self.config.network_interfaces[at]) {
            Ok(backend) => self.networks.insert(at, backend),
            Err(gone) => {
                log::error!("{gone}; the interface is removed");
                self.config.network_interfaces.remove(at);
            }
        }
        Err(CommandError::new(error))
    }

    fn patch_network(&mut self, update: &NetworkInterfaceUpdate) -> Result<(), CommandError> {
        let networks = &self.config.network_interfaces;
        let at = networks.iter().position(|network| network.iface_id == update.iface_id);
        let control = self.machine().and_then(|machine| machine.devices().network(&update.iface_id));
        let (Some(at), Some(control)) = (at, control) else {
            let id = &update.iface_id;
            return Err(CommandError::new(format_args!("there is no network interface {id}")));
        };
        let network = networks[at].updated(update)?;
        let [rx, tx] =
            [update.rx_rate_limiter, update.tx_rate_limiter].map(|limiter| limits(limiter.as_ref()));
        control.update_limits(rx, tx, monotonic());
        self.config.network_interfaces[at] = network;
        Ok(())
    }

    /// The machine in either of its states, if there is one.
    pub(crate) fn machine(&self) -> Option<&Machine> {
        match &self.state {
            State::Running(machine) => Some(machine),
            State::Paused(machine) => Some(machine),
            State::Configured | State::Pausing | State::Lost => None,
        }
    }

    /// Where the serial port of a guest with this configuration leads: the file that was set, else standard input and output.
    pub(crate) fn serial_for(&mut self, config: &FullVmConfig) -> Result<SerialSetup, CommandError> {
        let setup = match &self.serial_output {
            Some(_) => self.file_serial(config),
            None => self.host.standard_io().map(|setup| SerialSetup { limit: serial_limit(config), ..setup }),
        };
        setup.map_err(|e| CommandError::new(format_args!("cannot open the serial port's other end: {e}")))
    }

    /// The same, and nowhere if no file was set.
    pub(crate) fn file_serial(&self, config: &FullVmConfig) -> std::io::Result<SerialSetup> {
        let output = self.serial_output.as_ref().map(Output::try_clone).transpose()?;
        Ok(SerialSetup { output, input: None, limit: serial_limit(config) })
    }

    fn start(&mut self) -> Result<(), CommandError> {
        let serial = self.serial_for(&self.config.clone())?;
        let (Some(source), Some(files)) = (&self.config.boot_source, &self.boot_files) else {
            return Err(CommandError::new("there is nothing to boot: no boot source has been set"));
        };
        let boot = BootFiles {
            kernel: clone_file("kernel image", &files.kernel)?,
            initrd: files.initrd.as_ref().map(|file| clone_file("initrd", file)).transpose()?,
            cmdline: source.boot_args().to_owned(),
        };
        let machine_config = self.config.machine_config.clone();
        let boot_timer = self.platform.boot_timer;
        let devices = devices(&self.config, self.back_ends(), self.platform.pci);
        let events = self.events.try_clone().map_err(|e| cannot_start(&e))?;
        // It reads the kernel, from a file system that may take long.
        let build = move |_: &Token| {
            Paused::build(Setup { config: &machine_config, boot, serial, boot_timer, devices, events })
        };
        let machine = self.task(None, build)?.map_err(|e| cannot_start(&e))?;
        self.host.guest_starts(self.serial_output.is_none());
        // The machine has them: whose network goes away closes it.
        self.networks.clear();
        self.state = State::Running(machine.resume().map_err(|e| cannot_start(&e))?);
        log::info!("the guest has started");
        Ok(())
    }

    fn press_ctrl_alt_del(&self) -> Result<(), CommandError> {
        self.machine().map_or(Ok(()), Machine::press_ctrl_alt_del).map_err(CommandError::new)
    }

    /// Pauses a running machine on a thread of its own: requests in flight on a slow disk take
    /// seconds. A signal waits for it too, as the disks are closed in order then; it takes no
    /// longer than [`machine::machine::DRAIN_PATIENCE`] and a little.
    /// Pauses the machine. The usual pause takes less than a millisecond, and a thread would add to
    /// it; only one that takes longer is left to a task.
    pub(crate) fn pause(&mut self) -> Result<(), CommandError> {
        let machine = match std::mem::replace(&mut self.state, State::Lost) {
            State::Running(machine) => machine,
            other => {
                self.state = other;
                return self.set_vm_state(VmState::Paused);
            }
        };
        match machine.pause_within(QUICK_PAUSE, QUICK_PAUSE) {
            Err(PauseError::Busy { machine, .. }) => {
                self.state = State::Running(machine);
                self.pause_in_task()
            }
            paused => {
                let (next, result) = after_pause(paused, &self.events);
                self.state = next;
                result
            }
        }
    }

    /// Lets a machine that a fork or a live snapshot paused run on. Not once a task was left behind:
    /// that may still work with its disks.
    pub(crate) fn resume_after_pause(&mut self) -> Result<(), CommandError> {
        if self.left_behind { Ok(()) } else { self.set_vm_state(VmState::Resumed) }
    }

    fn pause_in_task(&mut self) -> Result<(), CommandError> {
        let machine = match std::mem::replace(&mut self.state, State::Pausing) {
            State::Running(machine) => machine,
            other => {
                self.state = other;
                return self.set_vm_state(VmState::Paused);
            }
        };
        // The machine is not lost if there is no thread for it.
        let machine = Arc::new(Mutex::new(Some(machine)));
        let of_task = Arc::clone(&machine);
        let take = |slot: &Mutex<Option<Running>>| slot.lock().unwrap_or_else(PoisonError::into_inner).take();
        let paused = self.task_to_the_end(move |_| take(&of_task).map(Running::pause));
        let (next, result) = match (paused, take(&machine)) {
            (Ok(Some(paused)), _) => after_pause(paused, &self.events),
            (Err(error), Some(machine)) => (State::Running(machine), Err(error.into())),
            (Ok(None) | Err(_), _) => (State::Lost, Err(CommandError::new("there is no machine any more"))),
        };
        self.state = next;
        result
    }

    pub(crate) fn set_vm_state(&mut self, wanted: VmState) -> Result<(), CommandError> {
        let (next, result) = match (std::mem::replace(&mut self.state, State::Lost), wanted) {
            (State::Running(machine), VmState::Paused) => after_pause(machine.pause(), &self.events),
            (State::Paused(machine), VmState::Resumed) => {
                self.ahead.iter_mut().for_each(Ahead::guest_runs);
                match machine.resume() {
                    Ok(machine) => (State::Running(machine), Ok(())),
                    Err(gone) => lost(&gone, &self.events),
                }
            }
            (State::Lost, _) => (State::Lost, Err(CommandError::new("there is no machine any more"))),
            (same, _) => (same, Ok(())),
        };
        self.state = next;
        result
    }
}

/// A configuration with its back ends open, for a machine that is made of saved state.
#[derive(Debug)]
pub(crate) struct Loaded {
    pub(crate) config: FullVmConfig,
    pub(crate) disks: Vec<Disk>,
    pub(crate) networks: Vec<NetBackend>,
    pub(crate) vsock: Option<VsockSockets>,
}

impl Loaded {
    /// The devices to be.
    pub(crate) fn devices(&self, metadata: Option<Arc<mmds::Service>>, pci: bool) -> DeviceSetup {
        let back_ends =
            BackEnds { disks: &self.disks, networks: &self.networks, vsock: self.vsock.as_ref(), metadata };
        devices(&self.config, back_ends, pci)
    }
}

/// What devices are made of, besides their configuration; in its order.
#[derive(Debug)]
pub(crate) struct BackEnds<'a> {
    disks: &'a [Disk],
    networks: &'a [NetBackend],
    vsock: Option<&'a VsockSockets>,
    metadata: Option<Arc<mmds::Service>>,
}

impl<H> Controller<H> {
    /// Those of this microVM.
    pub(crate) fn back_ends(&self) -> BackEnds<'_> {
        BackEnds {
            disks: &self.disks,
            networks: &self.networks,
            vsock: self.vsock.as_ref(),
            metadata: self.metadata.service(&self.identity.id),
        }
    }
}

/// The devices to be, their back ends open.
pub(crate) fn devices(config: &FullVmConfig, back_ends: BackEnds<'_>, pci: bool) -> DeviceSetup {
    let networks = config.network_interfaces.iter().cloned();
    let vsock = config.vsock.as_ref().map(|config| VsockSetup {
        guest_cid: config.guest_cid,
        sockets: back_ends.vsock.map(VsockSockets::for_device).unwrap_or_default(),
    });
    DeviceSetup {
        drives: config.drives.iter().cloned().zip(back_ends.disks.iter().cloned()).collect(),
        networks: networks.zip(back_ends.networks.iter().cloned()).collect(),
        entropy: config.entropy.clone(),
        vsock,
        metadata: back_ends.metadata,
        pci,
    }
}

/// Opens the networks of a guest that goes on, which must be there.
pub(crate) fn open_networks(networks: &[NetworkInterface]) -> Result<Vec<NetBackend>, CommandError> {
    networks.iter().map(|network| NetBackend::open_existing(network).map_err(CommandError::new)).collect()
}

/// Opens the disk of a drive, in place of the one that it `replaces`. The error names the drive.
fn open_disk(drive: &Drive, locks: &FileLocks, replaces: Option<&Disk>) -> Result<Disk, CommandError> {
    open_disk_with(drive, &DiskOptions::of(drive), locks, replaces)
}

/// Opens the disks of these drives. `names_are_durable` is whether the names of new, empty overlay files are.
pub(crate) fn open_disks(
    drives: &[Drive],
    locks: &FileLocks,
    names_are_durable: bool,
) -> Result<Vec<Disk>, CommandError> {
    let open = |drive: &Drive| {
        let options = DiskOptions { name_is_durable: names_are_durable, ..DiskOptions::of(drive) };
        open_disk_with(drive, &options, locks, None)
    };
    drives.iter().map(open).collect()
}

fn open_disk_with(
    drive: &Drive,
    options: &DiskOptions,
    locks: &FileLocks,
    replaces: Option<&Disk>,
) -> Result<Disk, CommandError> {
    let named = |error| CommandError::new(format_args!("drive {}: {error}", drive.drive_id));
    Disk::open_with(options, locks, replaces).map_err(named)
}

fn serial_limit(config: &FullVmConfig) -> RateLimiterConfig {
    let bucket = config.serial.as_ref().and_then(|serial| serial.rate_limiter);
    limits(Some(&config::RateLimiter { bandwidth: bucket, ops: None }))
}

/// What a machine is after an attempt to pause it.
fn after_pause(paused: Result<Paused, PauseError>, events: &EventSink) -> (State, Result<(), CommandError>) {
    match paused {
        Ok(machine) => (State::Paused(machine), Ok(())),
        Err(PauseError::Busy { machine, why }) => {
            let error = CommandError::new(format_args!("the microVM cannot be paused now: {why}"));
            (State::Running(machine), Err(error))
        }
        Err(PauseError::Gone(gone)) => lost(&gone, events),
    }
}

/// A bug in this monitor: there is no machine any more.
fn lost(gone: &machine::vcpu::VcpuGone, events: &EventSink) -> (State, Result<(), CommandError>) {
    log::error!("{gone}");
    let fault = VcpuFault { vcpu: gone.0, reason: gone.to_string(), place: None };
    events.post(MachineEvent::Fatal(fault));
    (State::Lost, Err(CommandError::new(gone)))
}

fn to_json(value: &impl serde::Serialize) -> Result<Reply, CommandError> {
    serde_json::to_value(value).map(Reply::Json).map_err(CommandError::new)
}

/// A file or FIFO that the serial console goes to.
pub(crate) fn open_serial(path: &Path) -> Result<Output, CommandError> {
    Output::open(path).map_err(|error| {
        CommandError::new(format_args!("cannot open the serial output {}: {error}", path.display()))
    })
}

/// Opens a file or block device that is to be read. Anything else at `path` is refused by name,
/// without waiting for it: a FIFO has no writer yet, and a character device need not have an end.
fn open(what: &str, path: &Path) -> Result<File, CommandError> {
    let failed = |error: &dyn std::fmt::Display| {
        CommandError::new(format_args!("cannot open the {what} {}: {error}", path.display()))
    };
    let flags = OFlags::RDONLY | OFlags::NONBLOCK | OFlags::NOCTTY | OFlags::CLOEXEC;
    let file = File::from(rustix::fs::open(path, flags, Mode::empty()).map_err(|e| failed(&e))?);
    let kind = file.metadata().map_err(|e| failed(&e))?.file_type();
    let found = match kind {
        _ if kind.is_file() || kind.is_block_device() => None,
        _ if kind.is_dir() => Some("a directory"),
        _ if kind.is_fifo() => Some("a FIFO"),
        _ => Some("a character device"),
    };
    if let Some(found) = found {
        return Err(failed(&format_args!("it is {found}; it must be a file or a block device")));
    }
    let flags = rustix::fs::fcntl_getfl(&file).map_err(|e| failed(&e))?;
    rustix::fs::fcntl_setfl(&file, flags - OFlags::NONBLOCK).map_err(|e| failed(&e))?;
    Ok(file)
}

fn clone_file(what: &str, file: &File) -> Result<File, CommandError> {
    file.try_clone().map_err(|error| CommandError::new(format_args!("cannot use the {what}: {error}")))
}

fn cannot_start(error: &dyn std::error::Error) -> CommandError {
    CommandError::new(format_args!("cannot start the microVM: {error}"))
}
