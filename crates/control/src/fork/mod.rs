//! Making children of a started microVM (`PUT /fork`, an extension).
//!
//! # How
//!
//! ```text
//! check, bind the children's sockets,
//! make empty files for new overlays           the guest runs
//! pause                                       ------------- from here on it stands still
//! disks: what was written so far becomes a base, this microVM goes on on a new overlay of it
//! save the machine
//! fork(2)    --- the first child forks the second, the second the third, ...
//! resume                                      ------------- until here
//! wait for each child's report
//! ```
//!
//! A child has the guest's memory from the kernel, copy-on-write, and everything else anew: KVM, threads, its API, overlays of its own
//! on the same bases, all made from what was saved, as after a restore.
//!
//! # Invariants
//!
//! - What can be found wrong before the guest stands still is found then. What is found wrong later leaves this microVM running, on
//!   its old disks or on overlays of them.
//! - A disk whose contents are unknown, because a sync of it failed, is no base: nothing is forked before it is replaced.
//! - A child that cannot begin ends, and its report says why. The others live, and its overlays are removed.
//! - With dirty pages tracked, a child's first Diff has all that its parent's next one would have had, and more: what a live snapshot that is
//!   being written has taken.
//!
//! # Callers
//!
//! The controller, for [`Command::Fork`](crate::Command::Fork). A [`Host`] splits the process and gives each child to
//! [`Controller::born`].

pub(crate) mod disks;
pub(crate) mod files;
pub(crate) mod merging;
mod report;

use std::os::fd::{AsFd, AsRawFd, RawFd};
use std::time::{Duration, Instant};

use config::{Child, Drive, Fork, FullVmConfig, Logger, NetworkInterface, Vsock, apply_network_overrides};
use machine::chipset::ClockAfter;
use machine::{EventSink, MachineState, Paused, Restore};
use memory::GuestRam;
use net::NetBackend;
use serde_json::json;

use crate::api::{ApiServer, Limits};
use crate::controller::{Controller, Host, Identity, Platform, State, devices, open_disks, open_networks};
use crate::metadata::Metadata;
use crate::vsock::VsockSockets;
use crate::{CommandError, Reply};
use disks::{Plan, Planner, write_back_disks};
use files::NewFiles;
pub use report::Reporter;
use report::{Report, Reports};

/// How long children may take to begin, all together.
const PATIENCE: Duration = Duration::from_mins(1);

/// Everything that the children of one fork need. A child takes the last seed and leaves the rest to the next child.
#[derive(Debug)]
pub struct Family {
    /// The children that are not there yet.
    pub seeds: Vec<Seed>,
    /// What they all begin with.
    pub inheritance: Inheritance,
}

/// What a guest leaves to its children.
#[derive(Debug)]
pub struct Inheritance {
    state: MachineState,
    ram: GuestRam,
}

impl Inheritance {
    /// The descriptors that a child keeps for it.
    pub fn descriptors(&self) -> Vec<RawFd> {
        self.ram.descriptors()
    }
}

/// One child to be.
#[derive(Debug)]
pub struct Seed {
    /// Who it is.
    pub identity: Identity,
    /// Where it serves its API.
    pub api: Option<ApiServer>,
    /// How it logs, where not as its parent.
    pub logger: Option<Logger>,
    /// The cgroup that it moves to.
    pub cgroup: Option<std::path::PathBuf>,
    /// Says how it went. Dropped unused, the parent learns that the child ended.
    pub reporter: Reporter,
    platform: Platform,
    /// Its parent's drives until `plan` is applied.
    config: FullVmConfig,
    plan: Plan,
    metadata: Metadata,
    /// By interface: its network, open; where it has none of its own, none.
    networks: Vec<NetBackend>,
    resume: bool,
}

impl Seed {
    /// The descriptors that the child keeps for it.
    pub fn descriptors(&self) -> Vec<RawFd> {
        let api = self.api.as_ref().map(|api| api.as_fd().as_raw_fd());
        let networks = self.networks.iter().flat_map(NetBackend::descriptors);
        networks.chain(api).chain([self.reporter.as_fd().as_raw_fd()]).collect()
    }
}

/// How the parent and each of its children go on, with the files that were made for that.
type Plans = ((Plan, NewFiles), Vec<(Plan, NewFiles)>);

fn plans(planner: &Planner, id: &str, fork: &Fork) -> Result<Plans, CommandError> {
    let mut own_files = NewFiles::default();
    let own = planner.plan(id, &fork.drives, &mut own_files)?;
    let of_child = |child| {
        let mut files = NewFiles::default();
        planner.of_child(child, &mut files).map(|plan| (plan, files))
    };
    let children = fork.children.iter().map(of_child).collect::<Result<_, _>>()?;
    Ok(((own, own_files), children))
}

impl<H: Host> Controller<H> {
    /// Makes the children. The guest goes on as it was, running or paused.
    pub(crate) fn fork(&mut self, fork: &Fork) -> Result<Reply, CommandError> {
        if let Some(child) = fork.children.iter().find(|child| child.id.as_str() == self.identity.id) {
            return Err(CommandError::new(format_args!(
                "child {}: this is the id of the microVM that is forked",
                child.id.as_str()
            )));
        }
        if let Some(machine) = self.machine() {
            machine.ram().fork_check().map_err(CommandError::new)?;
        }
        let named = fork.children.iter().flat_map(|child| &child.drives).chain(&fork.drives);
        let named = named.map(|overlay| overlay.overlay.clone());
        let planner = Planner::new(&self.config.drives, &self.disks, named);
        let (id, of_task) = (self.identity.id.clone(), fork.clone());
        // The names of new files are made durable, for which a disk may need long.
        let ((plan, own_files), plans) = self.task(None, move |_| plans(&planner, &id, &of_task))??;
        let reports = Reports::new().map_err(|e| cannot("make a pipe", &e))?;
        let (mut seeds, mut files) = (Vec::new(), Vec::new());
        for (number, (child, (plan, childs_files))) in (0..).zip(fork.children.iter().zip(plans)) {
            seeds.push(self.seed(child, plan, reports.reporter(number))?);
            files.push(childs_files);
        }

        let bases = self.bases();
        plan.apply(&mut bases.clone(), &self.unwritten())?;
        let disks = self.disks_by_id();
        self.task(None, move |_| write_back_disks(&disks))??;
        let was_running = matches!(self.state, State::Running(_));
        let begin = Instant::now();
        self.pause()?;
        let split = self.split(&plan, seeds, &bases);
        let pause = if was_running { self.resume_after_pause() } else { Ok(()) };
        let paused_for = begin.elapsed();
        own_files.keep(|path| self.has_overlay(path));
        self.settle_disks();
        self.keep_merged(&bases, split.is_ok());
        split?;

        let count = fork.children.len();
        let reports = self.task_that_commits(None, move |token| reports.collect(count, PATIENCE, token));
        let reports = match reports {
            Ok(reports) => reports,
            Err(error) => {
                // The children exist, and their files are theirs.
                for files in files {
                    files.keep(|_| true);
                }
                return Err(error.into());
            }
        };
        for (files, report) in files.into_iter().zip(&reports) {
            // One that has said nothing may still begin.
            if report.as_ref().is_none_or(|report| report.error.is_none()) {
                files.keep_begun();
            }
        }
        pause?;
        answer(fork, &reports, begin, paused_for)
    }

    /// What one child is to be.
    fn seed(&self, child: &Child, plan: Plan, reporter: Reporter) -> Result<Seed, CommandError> {
        let mut config = self.config.clone();
        let networks = self.networks_of(child, &mut config.network_interfaces);
        let networks =
            networks.map_err(|e| CommandError::new(format_args!("child {}: {e}", child.id.as_str())))?;
        // A child does not write to its parent's terminal or file.
        config.serial = Some(child.serial.clone().unwrap_or_default());
        config.vsock = vsock_of(config.vsock.as_ref(), child)
            .map_err(|e| CommandError::new(format_args!("child {}: {e}", child.id.as_str())))?;
        if child.logger.is_some() {
            config.logger.clone_from(&child.logger);
        }
        let of_child =
            |e: &dyn std::fmt::Display| CommandError::new(format_args!("child {}: {e}", child.id.as_str()));
        let limits = Limits { max_payload: self.platform.max_payload, ..Limits::default() };
        let api = child.api_socket.as_deref().map(|path| ApiServer::bind(path, limits));
        Ok(Seed {
            identity: Identity { id: child.id.as_str().to_owned(), ..self.identity.clone() },
            api: api.transpose().map_err(|e| of_child(&e))?,
            logger: child.logger.clone(),
            cgroup: child.cgroup.clone(),
            reporter,
            platform: self.platform,
            config,
            plan,
            metadata: self.metadata.child(child.mmds.clone()).map_err(|e| of_child(&e))?,
            networks,
            resume: child.resume,
        })
    }

    /// Puts the child's networks in the place of its parent's, and opens them.
    fn networks_of(
        &self,
        child: &Child,
        networks: &mut [NetworkInterface],
    ) -> Result<Vec<NetBackend>, CommandError> {
        networks.iter_mut().for_each(NetworkInterface::clear_host_endpoint);
        apply_network_overrides(networks, &child.network_overrides)?;
        let parents = self.config.network_interfaces.iter().flat_map(|network| network.fds.iter().flatten());
        let parents: Vec<_> = parents.collect();
        if let Some(fd) =
            networks.iter().flat_map(|network| network.fds.iter().flatten()).find(|fd| parents.contains(fd))
        {
            return Err(CommandError::new(format_args!("descriptor {fd} is that of its parent's tap")));
        }
        open_networks(networks)
    }

    /// What happens while the guest stands still.
    fn split(&mut self, plan: &Plan, mut seeds: Vec<Seed>, bases: &[Drive]) -> Result<(), CommandError> {
        let unwritten = self.unwritten();
        for seed in &mut seeds {
            bases.clone_into(&mut seed.config.drives);
            seed.plan.apply(&mut seed.config.drives, &unwritten)?;
        }
        self.put_overlays(plan, &unwritten, bases)?;
        let State::Paused(machine) = &self.state else {
            return Err(CommandError::new("there is no machine to fork"));
        };
        let state = machine.save().map_err(|e| cannot("save the microVM", &e))?;
        let ram = machine.ram().clone();
        // KVM's log stays here; what the monitor knows, both sides know.
        if let Some(written) = machine.take_dirty_pages().map_err(|e| cannot("read the dirty pages", &e))? {
            ram.mark_dirty_again(&written);
        }
        if let Some(job) = &mut self.job {
            job.count_as_unsaved();
        }
        self.check_not_ending()?;
        ram.note_fork();
        let inheritance = Inheritance { state, ram };
        self.host.fork(Family { seeds, inheritance }).map_err(|e| cannot("fork this process", &e))
    }

    /// A child, in its own process: its machine as it was saved, around the memory that the kernel gave it.
    pub fn born(
        host: H,
        seed: Seed,
        inheritance: Inheritance,
        events: EventSink,
    ) -> Result<(Self, Reporter), (CommandError, Reporter)> {
        let Seed { identity, platform, config, metadata, networks, resume, reporter, .. } = seed;
        let platform = Platform { boot_timer: None, ..platform };
        let mut controller = Controller::new(identity, host, platform, events);
        (controller.config, controller.metadata) = (config, metadata);
        match controller.restore_inherited(inheritance, networks, resume) {
            Ok(()) => Ok((controller, reporter)),
            Err(error) => Err((error, reporter)),
        }
    }

    fn restore_inherited(
        &mut self,
        inheritance: Inheritance,
        networks: Vec<NetBackend>,
        resume: bool,
    ) -> Result<(), CommandError> {
        let Inheritance { state, ram } = inheritance;
        // Its parent made the files of its overlays, and their names durable.
        self.disks = open_disks(&self.config.drives, &self.disk_locks, true)?;
        self.vsock = self
            .config
            .vsock
            .as_ref()
            .map(VsockSockets::of)
            .transpose()
            .map_err(CommandError::new)?
            .flatten();
        self.networks = networks;
        let serial_output = self.config.serial.as_ref().and_then(|serial| serial.serial_out_path.clone());
        self.serial_output = serial_output.as_deref().map(crate::controller::open_serial).transpose()?;
        let machine = Paused::restore(Restore {
            config: &self.config.machine_config,
            state: &state,
            ram,
            page_server: None,
            serial: self.file_serial(&self.config).map_err(|e| cannot("open the serial output", &e))?,
            devices: devices(&self.config, self.back_ends(), self.platform.pci),
            clock: ClockAfter::Continues,
            events: self.events.try_clone().map_err(|e| cannot("make a descriptor", &e))?,
            stop: self.host.asked_to_end(),
        })
        .map_err(|e| cannot("begin", &e))?;
        // The machine has them.
        self.networks.clear();
        self.state = if resume {
            State::Running(machine.resume().map_err(|e| cannot("begin", &e))?)
        } else {
            State::Paused(machine)
        };
        Ok(())
    }
}

/// A child's socket device: with sockets of its own, or none. (A path that is empty says so: nobody can ask for it.)
fn vsock_of(parents: Option<&Vsock>, child: &Child) -> Result<Option<Vsock>, CommandError> {
    let Some(parents) = parents else {
        return match child.vsock_override {
            None => Ok(None),
            Some(_) => Err(CommandError::new("vsock_override is given, and there is no vsock device")),
        };
    };
    let Some(by) = &child.vsock_override else {
        return Ok(Some(Vsock { uds_path: "".into(), seqpacket_uds_path: None, ..parents.clone() }));
    };
    let vsock = parents.overridden(by);
    vsock.check()?;
    VsockSockets::are_possible(&vsock).map_err(CommandError::new)?;
    Ok(Some(vsock))
}

/// What the user is told: the pause, and each child or why there is none.
fn answer(
    fork: &Fork,
    reports: &[Option<Report>],
    begin: Instant,
    paused_for: Duration,
) -> Result<Reply, CommandError> {
    let micros = |time: Duration| u64::try_from(time.as_micros()).unwrap_or(u64::MAX);
    let mut living = 0;
    let mut first_error = None;
    let children = fork.children.iter().zip(reports).map(|(child, report)| {
        let id = child.id.as_str();
        let (pid, error) = match report {
            Some(Report { pid, error: None, .. }) => (*pid, None),
            Some(Report { error: Some(error), .. }) => (0, Some(error.clone())),
            None => (0, Some("it ended before it could begin, or takes too long".to_owned())),
        };
        if let Some(error) = error {
            first_error.get_or_insert_with(|| format!("child {id}: {error}"));
            return json!({ "id": id, "error": error });
        }
        living += 1;
        let ready = report.as_ref().map(|report| micros(report.at.saturating_duration_since(begin)));
        json!({
            "id": id,
            "pid": pid,
            "api_socket": child.api_socket,
            "state": if child.resume { "Running" } else { "Paused" },
            "ready_us": ready,
        })
    });
    let children: Vec<_> = children.collect();
    match first_error {
        Some(error) if living == 0 => Err(CommandError::new(error)),
        _ => Ok(Reply::Json(json!({ "pause_us": micros(paused_for), "children": children }))),
    }
}

fn cannot(what: &str, error: &dyn std::fmt::Display) -> CommandError {
    CommandError::new(format_args!("cannot {what}: {error}"))
}
