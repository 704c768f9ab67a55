//! Forking a started microVM into children (`PUT /fork`, an extension).
//!
//! # How
//!
//! ```text
//! check, bind the children's sockets,
//! create empty files for new overlays         the guest runs
//! pause                                       ------------- the guest is paused
//! disks: what was written so far becomes a base, this microVM continues on a new overlay of it
//! save the machine
//! fork(2)    --- the first child forks the second, the second the third, ...
//! resume                                      ------------- the guest runs
//! wait for each child's report
//! ```
//!
//! A child has the guest's memory from the kernel, copy-on-write. Everything else is created again
//! from the saved state, as after a restore: KVM, threads, the API, and overlays of its own on the
//! same bases.
//!
//! - [`spec`]: what each child is to be.
//! - [`start`]: the start of a child, in its own process.
//!
//! # Invariants
//!
//! - Errors that can be found before the guest is paused are found then. An error that is found
//!   later leaves this microVM running, on its old disks or on overlays of them.
//! - A disk whose contents are unknown, because a sync of it failed, is no base: a fork fails until
//!   the disk is replaced.
//! - A child that cannot start ends, its report says why, and its overlays are removed. The other
//!   children live.
//! - With dirty pages tracked, the first Diff of a child has all that its parent's next one would
//!   have had. It also has the pages that a live snapshot took that is still being written.
//!
//! # Callers
//!
//! The controller, for [`Command::Fork`](crate::Command::Fork). A [`Host`] forks the process, and
//! each child calls [`Controller::start_child`](crate::Controller::start_child).

mod spec;
mod start;

use std::time::{Duration, Instant};

use config::{ChildOutcome, ChildState, Drive, Fork, ForkOutcome};

pub use crate::child::{ChildSpec, ForkPlan, ParentState, Reporter};
use crate::child::{Report, Reports};
use crate::drive_commands::{settle_swaps, switch_to_overlays, write_back};
use crate::events::Event;
use crate::host::Host;
use crate::live_snapshot::LiveSnapshotJob;
use crate::microvm::MicroVm;
use crate::overlays::files::NewFiles;
use crate::overlays::plan::{OverlayPlan, Planner};
use crate::pause::{pause, resume_after_pause};
use crate::task::Tasks;
use crate::{CommandError, Reply};

pub(crate) use start::start as start_child;

/// How long children may take to start, all together.
const START_TIMEOUT: Duration = Duration::from_mins(1);

/// The overlays of the parent and of each child, with the files that were created for them.
type Plans = ((OverlayPlan, NewFiles), Vec<(OverlayPlan, NewFiles)>);

/// Forks the children. The guest then runs or is paused as before.
pub(crate) fn fork<H: Host>(
    vm: &mut MicroVm,
    tasks: &mut Tasks<H>,
    fork: &Fork,
) -> Result<Reply, CommandError> {
    let forked = fork_children(vm, tasks, fork);
    let stats = vm.metrics.operations();
    if forked.is_ok() { &stats.forks } else { &stats.fork_fails }.add(1);
    vm.backends.drives.merge_many_layers(&vm.instance.identity().id);
    forked
}

fn fork_children<H: Host>(
    vm: &mut MicroVm,
    tasks: &mut Tasks<H>,
    fork: &Fork,
) -> Result<Reply, CommandError> {
    if fork.children.iter().any(|child| child.id.as_str() == vm.instance.identity().id) {
        return Err(CommandError::child(
            &vm.instance.identity().id,
            "this is the id of the microVM that is forked",
        ));
    }
    if let Some(machine) = vm.lifecycle.machine() {
        machine.ram().fork_check()?;
    }
    let named = fork.children.iter().flat_map(|child| &child.drives).chain(&fork.drives);
    let planner = vm.backends.drives.planner(named.map(|overlay| overlay.overlay.clone()));
    let (id, of_task) = (vm.instance.identity().id.clone(), fork.clone());
    // The directory entries of new files are made durable, which may take a disk long.
    let ((plan, own_files), plans) =
        tasks.run(vm, None, move |_| plan_overlays(&planner, &id, &of_task))??;
    let reports = Reports::new().map_err(CommandError::fork("create a pipe"))?;
    let (mut children, mut files) = (Vec::new(), Vec::new());
    for (number, (child, (plan, childs_files))) in (0..).zip(fork.children.iter().zip(plans)) {
        children.push(spec::child_spec(vm, child, plan, reports.reporter(number))?);
        files.push(childs_files);
    }

    let bases = vm.backends.drives.bases();
    plan.apply(&mut bases.clone(), &vm.backends.drives.unwritten())?;
    write_back(vm, tasks)?;
    let was_running = vm.lifecycle.is_running();
    let begin = Instant::now();
    pause(vm, tasks)?;
    let forked = fork_paused(vm, tasks, &plan, children, &bases);
    let resumed = if was_running { resume_after_pause(vm, tasks) } else { Ok(()) };
    let paused_for = begin.elapsed();
    vm.metrics.operations().fork_pauses.record(nanos(paused_for));
    own_files.keep(|path| vm.backends.drives.uses_overlay(path));
    settle_swaps(vm, tasks);
    vm.backends.drives.keep_merged(&bases, forked.is_ok());
    forked?;

    let count = fork.children.len();
    let reports = tasks.run_committing(vm, None, move |token| reports.collect(count, START_TIMEOUT, token));
    let (reports, cancelled) = match reports {
        Ok(collected) => collected,
        Err(error) => {
            // The children exist, and the files are theirs.
            for files in files {
                files.keep(|_| true);
            }
            return Err(error.into());
        }
    };
    for (files, report) in files.into_iter().zip(&reports) {
        // A child that has not reported may still start.
        if report.as_ref().is_none_or(|report| report.error.is_none()) {
            files.keep_started();
        }
    }
    resumed?;
    let started = reports.iter().flatten().filter(|report| report.error.is_none()).count();
    let stats = vm.metrics.operations();
    stats.children_started.add(started as u64);
    stats.children_failed.add((count - started) as u64);
    let answer = answer(fork, &reports, cancelled, (begin, paused_for))?;
    vm.events.publish(&Event::Forked(answer.clone()));
    Ok(Reply::Json(answer))
}

fn plan_overlays(planner: &Planner, id: &str, fork: &Fork) -> Result<Plans, CommandError> {
    let mut own_files = NewFiles::default();
    let own = planner.plan(id, &fork.drives, &mut own_files)?;
    let children = fork.children.iter().map(|child| {
        let mut files = NewFiles::default();
        let plan = planner.plan(child.id.as_str(), &child.drives, &mut files);
        plan.map(|plan| (plan, files)).map_err(|error| CommandError::child(child.id.as_str(), error))
    });
    Ok(((own, own_files), children.collect::<Result<_, _>>()?))
}

fn nanos(time: Duration) -> u64 {
    u64::try_from(time.as_nanos()).unwrap_or(u64::MAX)
}

/// The part of a fork for which the guest is paused.
fn fork_paused<H: Host>(
    vm: &mut MicroVm,
    tasks: &mut Tasks<H>,
    plan: &OverlayPlan,
    mut children: Vec<ChildSpec>,
    bases: &[Drive],
) -> Result<(), CommandError> {
    let unwritten = vm.backends.drives.unwritten();
    for child in &mut children {
        bases.clone_into(&mut child.config.drives);
        child.plan.apply(&mut child.config.drives, &unwritten)?;
    }
    switch_to_overlays(vm, tasks, plan, &unwritten, bases)?;
    let machine = vm.lifecycle.paused().ok_or(CommandError::NoMachine)?;
    let state = machine.save().map_err(CommandError::fork("save the microVM"))?;
    let ram = machine.ram().clone();
    // KVM's log stays with the parent. The pages in it are marked dirty in the monitor's own log,
    // which parent and children both have.
    let written = machine.take_dirty_pages().map_err(CommandError::fork("read the dirty pages"))?;
    if let Some(written) = written {
        ram.mark_dirty_again(&written);
    }
    vm.live_snapshot.iter_mut().for_each(LiveSnapshotJob::mark_unsaved);
    tasks.check_not_ending()?;
    ram.note_fork();
    let plan = ForkPlan { children, parent: ParentState { state, ram } };
    tasks.host.fork(plan).map_err(CommandError::fork("fork this process"))
}

/// The answer to the user: how long the guest was paused, and each child or its error. An error if
/// no child lives, unless the wait for them was `cancelled`.
fn answer(
    fork: &Fork,
    reports: &[Option<Report>],
    cancelled: bool,
    (begin, paused_for): (Instant, Duration),
) -> Result<serde_json::Value, CommandError> {
    let micros = |time: Duration| u64::try_from(time.as_micros()).unwrap_or(u64::MAX);
    let mut living = 0;
    let mut first_error = None;
    let children = fork.children.iter().zip(reports).map(|(child, report)| {
        let id = child.id.as_str();
        let error = match report {
            Some(Report { pid, error: None, at }) => {
                living += 1;
                return ChildOutcome::Started {
                    id: id.to_owned(),
                    pid: *pid,
                    api_socket: child.api_socket.clone(),
                    state: if child.resume { ChildState::Running } else { ChildState::Paused },
                    ready_us: micros(at.saturating_duration_since(begin)),
                };
            }
            Some(Report { error: Some(error), .. }) => error.clone(),
            None if cancelled => {
                "this microVM was asked to end before the child had reported; it may run".to_owned()
            }
            None => {
                let timeout = START_TIMEOUT.as_secs();
                format!("it ended before it started, or did not start within {timeout} s")
            }
        };
        first_error.get_or_insert_with(|| CommandError::child(id, error.clone()));
        ChildOutcome::Failed { id: id.to_owned(), error }
    });
    let children: Vec<_> = children.collect();
    match first_error {
        Some(error) if living == 0 && !cancelled => Err(error),
        _ => serde_json::to_value(ForkOutcome { pause_us: micros(paused_for), children })
            .map_err(CommandError::Json),
    }
}
