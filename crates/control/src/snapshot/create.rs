//! `PUT /snapshot/create`.
//!
//! Both targets are checked before anything is paused, synced or written. What waits for disks is a
//! [task](crate::task): questions are answered meanwhile. A snapshot that is cancelled leaves the
//! guest, its dirty pages and the old files as they were.

use std::os::fd::AsRawFd;
use std::time::{Instant, SystemTime, UNIX_EPOCH};

use block::disk::Disk;
use config::{ConfigError, Drive, FullVmConfig, SnapshotCreate, SnapshotError, SnapshotType};
use machine::{MachineState, Paused};
use memory::image::{self, ImageError, ImageInfo, Observer, WrittenImage};
use memory::{GuestRam, PageSet};
use serde_json::json;
use snapshot::{AtomicFile, Header, Staged, Writer};

use super::config::{KIND, SavedConfig};
use crate::drive_commands::{settle_swaps, switch_to_overlays, write_back};
use crate::events::Event;
use crate::host::Host;
use crate::live_snapshot::{self, LiveSnapshotJob, SnapshotWriter};
use crate::microvm::MicroVm;
use crate::overlays::files::NewFiles;
use crate::overlays::plan::OverlayPlan;
use crate::pause::{pause, resume_after_pause};
use crate::task::{SnapshotPaths, Tasks};
use crate::token::Token;
use crate::{CommandError, Reply};

/// Everything that goes into a snapshot, without the memory's contents.
struct SnapshotContents {
    config: SavedConfig,
    machine: MachineState,
    created_by: String,
    /// The pages of a Diff; `None` for a Full snapshot.
    pages: Option<PageSet>,
}

/// Saves the microVM: a paused one at once, a live one in a job.
pub(crate) fn create<H: Host>(
    vm: &mut MicroVm,
    tasks: &mut Tasks<H>,
    create: &SnapshotCreate,
) -> Result<Reply, CommandError> {
    if vm.live_snapshot.as_mut().is_some_and(LiveSnapshotJob::is_running) {
        return Err(CommandError::SnapshotJobRunning);
    }
    // The end of the last job, before another one takes its place.
    vm.publish_snapshot_job();
    if !create.live && vm.lifecycle.paused().is_none() {
        return Err(CommandError::SnapshotNotPaused { phase: vm.lifecycle.phase().name() });
    }
    let (targets, drives) = (create.clone(), vm.backends.drives.configs());
    // On a file system that does not answer, this waits as well.
    tasks.run(vm, Some(&paths_of(create)), move |_| check_targets(&targets, &drives))??;
    if !create.live {
        let begun = Instant::now();
        publish(vm, create, begun, None);
        let created = create_paused(vm, tasks, create);
        publish(vm, create, begun, Some(&created));
        return created;
    }
    let created = create_live(vm, tasks, create);
    vm.backends.drives.merge_many_layers(&vm.instance.identity().id);
    created
}

/// Publishes that a snapshot of a paused guest has begun, or how it has ended.
fn publish(
    vm: &MicroVm,
    create: &SnapshotCreate,
    begun: Instant,
    ended: Option<&Result<Reply, CommandError>>,
) {
    let state = match ended {
        None => "Running",
        Some(Ok(_)) => "Done",
        Some(Err(error)) if error.is_cancelled() => "Cancelled",
        Some(Err(_)) => "Failed",
    };
    let mut description = json!({
        "state": state,
        "snapshot_path": create.snapshot_path.to_string_lossy(),
        "mem_file_path": create.mem_file_path.to_string_lossy(),
        "snapshot_type": create.snapshot_type,
        "elapsed_us": u64::try_from(begun.elapsed().as_micros()).unwrap_or(u64::MAX),
    });
    if let Some(Err(error)) = ended {
        description["error"] = error.to_string().into();
    }
    vm.events.publish(&Event::Snapshot(description));
}

fn create_paused<H: Host>(
    vm: &MicroVm,
    tasks: &mut Tasks<H>,
    create: &SnapshotCreate,
) -> Result<Reply, CommandError> {
    let paths = paths_of(create);
    let disks = vm.backends.drives.disks_by_id();
    tasks.run(vm, Some(&paths), move |token| sync_disks(&disks, token))??;
    let machine = vm.lifecycle.paused().ok_or(CommandError::NoMachine)?;
    let (contents, taken) = capture(vm, machine, create.snapshot_type, vm.backends.config(), Vec::new())?;
    let ram = machine.ram().clone();
    let (of_task, targets) = (ram.clone(), create.clone());
    let written = tasks
        .run_committing(vm, Some(&paths), move |token| contents.write_and_commit(&of_task, &targets, token))
        .map_err(CommandError::from)
        .flatten();
    if let (Err(_), Some(taken)) = (&written, taken) {
        ram.mark_dirty_again(&taken);
    }
    written.map(|()| Reply::Empty)
}

/// Starts a job. The guest is paused for a moment, and then runs or is paused as before.
fn create_live<H: Host>(
    vm: &mut MicroVm,
    tasks: &mut Tasks<H>,
    create: &SnapshotCreate,
) -> Result<Reply, CommandError> {
    if let Some(machine) = vm.lifecycle.machine() {
        machine.ram().fork_check()?;
    }
    let paths = [&create.snapshot_path, &create.mem_file_path];
    // The disks as they are at that moment become bases, as in a fork. This microVM continues on
    // overlays.
    let named = create.drives.iter().map(|overlay| &overlay.overlay).chain(paths).cloned();
    let planner = vm.backends.drives.planner(named);
    let (id, overlays) = (vm.instance.identity().id.clone(), create.drives.clone());
    let (plan, files) = tasks.run(vm, None, move |_| {
        let mut files = NewFiles::default();
        planner.plan(&id, &overlays, &mut files).map(|plan| (plan, files))
    })??;
    let saved = OverlayPlan::of_saved(&vm.backends.drives.configs(), &plan, &create.snapshot_path);
    let (job, writer) = live_snapshot::pair(create).map_err(CommandError::fork("create a pipe"))?;

    let bases = vm.backends.drives.bases();
    saved.apply(&mut bases.clone(), &vm.backends.drives.unwritten())?;
    write_back(vm, tasks)?;
    let was_running = vm.lifecycle.is_running();
    let begin = Instant::now();
    pause(vm, tasks)?;
    let forked = fork_writer(vm, tasks, create, writer, (&plan, &saved), bases.clone());
    let resumed = if was_running { resume_after_pause(vm, tasks) } else { Ok(()) };
    let pause_us = u64::try_from(begin.elapsed().as_micros()).unwrap_or(u64::MAX);
    files.keep(|path| vm.backends.drives.uses_overlay(path));
    settle_swaps(vm, tasks);
    vm.backends.drives.keep_merged(&bases, forked.is_ok());
    let forked = forked?;
    let stats = vm.metrics.operations();
    stats.live_snapshots.add(1);
    stats.live_snapshot_pauses.record(pause_us.saturating_mul(1000));
    let mut job = job.started(pause_us, forked);
    vm.events.publish(&Event::Snapshot(job.description()));
    let description = job.describe();
    vm.live_snapshot = Some(job);
    resumed?;
    Ok(Reply::Json(description))
}

/// The part of a live snapshot for which the guest is paused. Returns the pages that count as saved
/// if the job succeeds.
fn fork_writer<H: Host>(
    vm: &mut MicroVm,
    tasks: &mut Tasks<H>,
    create: &SnapshotCreate,
    writer: SnapshotWriter,
    (plan, saved): (&OverlayPlan, &OverlayPlan),
    bases: Vec<Drive>,
) -> Result<Option<(GuestRam, PageSet)>, CommandError> {
    let unwritten = vm.backends.drives.unwritten();
    switch_to_overlays(vm, tasks, plan, &unwritten, &bases)?;
    let mut config = FullVmConfig { drives: bases, ..vm.backends.config() };
    saved.apply(&mut config.drives, &unwritten)?;
    let machine = vm.lifecycle.paused().ok_or(CommandError::NoMachine)?;
    let fresh = saved.drive_ids(&config.drives);
    let (contents, taken) = capture(vm, machine, create.snapshot_type, config, fresh)?;
    let ram = machine.ram().clone();
    ram.note_fork();
    let mut kept = ram.descriptors();
    kept.extend(writer.descriptors().map(|fd| fd.as_raw_fd()));
    let (childs_ram, create) = (ram.clone(), create.clone());
    let write = Box::new(move || {
        writer
            .run(&create.snapshot_path, |observer| contents.write_and_commit(&childs_ram, &create, observer))
    });
    match tasks.host.fork_writer(kept, write) {
        Ok(()) => Ok(taken.map(|pages| (ram, pages))),
        Err(error) => {
            if let Some(pages) = taken {
                ram.mark_dirty_again(&pages);
            }
            Err(CommandError::fork("fork this process")(error))
        }
    }
}

/// Saves the state of a paused machine.
///
/// Also returns the pages that were written so far, if that is tracked. They count as saved from
/// now on: a caller that fails to save them marks them dirty again.
fn capture(
    vm: &MicroVm,
    machine: &Paused,
    kind: SnapshotType,
    config: FullVmConfig,
    fresh_overlays: Vec<String>,
) -> Result<(SnapshotContents, Option<PageSet>), CommandError> {
    let state = machine.save().map_err(CommandError::snapshot)?;
    // Also for a Full snapshot: the next Diff is on top of this one.
    let taken = machine.take_dirty_pages().map_err(CommandError::snapshot)?;
    let pages = match (kind, &taken) {
        (SnapshotType::Full, _) => None,
        (SnapshotType::Diff, Some(taken)) => Some(taken.clone()),
        (SnapshotType::Diff, None) => Some(machine.ram().changed_pages().map_err(CommandError::snapshot)?),
    };
    let config =
        SavedConfig { config, pci: vm.platform.pci, id: vm.instance.identity().id.clone(), fresh_overlays };
    let created_by = format!("{} {}", vm.instance.identity().app_name, vm.instance.identity().version);
    Ok((SnapshotContents { config, machine: state, created_by, pages }, taken))
}

/// Syncs the disks, so that their files hold what the guest wrote.
fn sync_disks(disks: &[(String, Disk)], token: &Token) -> Result<(), CommandError> {
    for (id, disk) in disks {
        token.check()?;
        disk.sync().map_err(|error| CommandError::drive(id, error))?;
    }
    Ok(())
}

/// The files that clients see in `GET /snapshot/job` while the snapshot is written.
fn paths_of(create: &SnapshotCreate) -> SnapshotPaths {
    SnapshotPaths { snapshot_path: create.snapshot_path.clone(), mem_file_path: create.mem_file_path.clone() }
}

/// Checks that both targets can be created as new files, and that neither is the other one or a
/// file of a drive.
fn check_targets(create: &SnapshotCreate, drives: &[Drive]) -> Result<(), CommandError> {
    let SnapshotCreate { snapshot_path, mem_file_path, .. } = create;
    if snapshot::is_same_path(snapshot_path, mem_file_path) {
        return Err(ConfigError::from(SnapshotError::SameFile { path: snapshot_path.clone() }).into());
    }
    for (field, path) in [("mem_file_path", mem_file_path), ("snapshot_path", snapshot_path)] {
        let taken = |role, drive_id: &str| CommandError::SnapshotTarget {
            field,
            path: path.clone(),
            role,
            drive_id: drive_id.to_owned(),
        };
        for drive in drives {
            let overlay = drive.overlay.iter().flat_map(|o| std::iter::once(&o.path).chain(&o.layers));
            if drive.path_on_host.iter().chain(overlay).any(|disk| snapshot::is_same_path(path, disk)) {
                return Err(taken("a file of", &drive.drive_id));
            }
        }
        if let Some(overlay) = create.drives.iter().find(|by| snapshot::is_same_path(path, &by.overlay)) {
            return Err(taken("also to be the overlay of", &overlay.drive_id));
        }
        AtomicFile::create(path).map_err(CommandError::snapshot)?;
    }
    Ok(())
}

impl SnapshotContents {
    /// Writes both files, and gives them their names in one step.
    pub(crate) fn write_and_commit(
        &self,
        ram: &GuestRam,
        create: &SnapshotCreate,
        observer: &dyn Observer,
    ) -> Result<(), CommandError> {
        // Before the memory, which takes long: a state file that cannot be created is found now.
        let state = AtomicFile::create(&create.snapshot_path).map_err(CommandError::snapshot)?;
        let WrittenImage { file: memory, info, .. } = match &self.pages {
            None => image::write_full(ram, &create.mem_file_path, observer),
            Some(pages) => image::write_diff(ram, &create.mem_file_path, pages, observer),
        }
        .map_err(CommandError::snapshot)?;
        let state = self.stage_state(&info, state).map_err(CommandError::snapshot)?;
        if observer.cancelled() {
            return Err(CommandError::snapshot(ImageError::Cancelled { path: create.mem_file_path.clone() }));
        }
        memory.commit_with(state).map_err(CommandError::snapshot)
    }

    fn stage_state(&self, info: &ImageInfo, file: AtomicFile) -> Result<Staged, snapshot::WriteError> {
        let now = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default().as_millis();
        let now = u64::try_from(now).unwrap_or(u64::MAX);
        let mut writer = Writer::new(&Header::new(KIND, &self.created_by, now))?;
        writer.put(&self.config)?;
        writer.put(info)?;
        writer.put(&self.machine)?;
        writer.stage(file)
    }
}
