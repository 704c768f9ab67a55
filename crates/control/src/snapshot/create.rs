//! `PUT /snapshot/create`.
//!
//! Both targets are checked before anything is paused, synced or written. What waits for disks is a
//! [task](crate::task): questions are answered meanwhile, and a snapshot that is cancelled leaves
//! the guest, its dirty pages and the old files as they were.

use std::os::fd::AsRawFd;
use std::time::{Instant, SystemTime, UNIX_EPOCH};

use block::disk::Disk;
use config::{ConfigError, Drive, FullVmConfig, SnapshotCreate, SnapshotError, SnapshotType};
use machine::{MachineState, Paused};
use memory::image::{self, ImageError, ImageInfo, Observer, WrittenImage};
use memory::{GuestRam, PageSet};
use snapshot::{AtomicFile, Header, Staged, Writer};

use super::job::{self, Job, Worker};
use super::{KIND, SavedConfig};
use crate::controller::{Controller, Host, State};
use crate::fork::disks::{Plan, Planner, write_back_disks};
use crate::fork::files::NewFiles;
use crate::task::{self, Token};
use crate::{CommandError, Reply};

/// All that goes into a snapshot but the memory's contents.
pub(crate) struct Picture {
    pub(crate) config: SavedConfig,
    pub(crate) machine: MachineState,
    pub(crate) created_by: String,
    /// The pages of a Diff; `None` for a Full snapshot.
    pub(crate) pages: Option<PageSet>,
}

impl<H: Host> Controller<H> {
    /// Saves the microVM: a paused one at once, a live one in a job.
    pub(crate) fn create_snapshot(&mut self, create: &SnapshotCreate) -> Result<Reply, CommandError> {
        if let Some(job) = &mut self.job
            && job.is_running()
        {
            return Err(CommandError::new(
                "a live snapshot is being written: GET /snapshot/job tells how far it is",
            ));
        }
        if !create.live && !matches!(self.state, State::Paused(_)) {
            return Err(CommandError::new(format_args!(
                "PUT /snapshot/create needs a paused microVM, and it is {} (live snapshots need not: \"live\": true)",
                self.phase().name()
            )));
        }
        let drives = self.config.drives.clone();
        let targets = create.clone();
        // On a file system that does not answer, this waits as well.
        self.task(Some(&job_of(create)), move |_| check_targets(&targets, &drives))??;
        if create.live {
            let begun = self.begin_job(create);
            self.merge_many_layers();
            return begun;
        }
        let disks = self.disks_by_id();
        self.task(Some(&job_of(create)), move |token| sync_disks(&disks, token))??;
        let State::Paused(machine) = &self.state else {
            return Err(CommandError::new("there is no machine to save"));
        };
        let (picture, taken) =
            self.picture(machine, create.snapshot_type, self.config.clone(), Vec::new())?;
        let ram = machine.ram().clone();
        let (of_task, targets) = (ram.clone(), create.clone());
        let written = self
            .task_that_commits(Some(&job_of(create)), move |token| {
                picture.write_and_commit(&of_task, &targets, token)
            })
            .map_err(CommandError::from)
            .flatten();
        if let (Err(_), Some(taken)) = (&written, taken) {
            ram.mark_dirty_again(&taken);
        }
        written.map(|()| Reply::Empty)
    }

    /// The disks of the drives, with the drives' ids: for a task.
    pub(crate) fn disks_by_id(&self) -> Vec<(String, Disk)> {
        let ids = self.config.drives.iter().map(|drive| drive.drive_id.clone());
        ids.zip(self.disks.iter().cloned()).collect()
    }

    /// Begins a job: the guest stands still for a moment, and goes on as it was.
    fn begin_job(&mut self, create: &SnapshotCreate) -> Result<Reply, CommandError> {
        if let Some(machine) = self.machine() {
            machine.ram().fork_check().map_err(CommandError::new)?;
        }
        let paths = [&create.snapshot_path, &create.mem_file_path];
        // Disks as they are at that moment become a base, as in a fork: this microVM goes on on overlays.
        let named = create.drives.iter().map(|overlay| &overlay.overlay).chain(paths).cloned();
        let planner = Planner::new(&self.config.drives, &self.disks, named);
        let (id, of_task) = (self.identity.id.clone(), create.drives.clone());
        let (plan, files) = self.task(None, move |_| {
            let mut files = NewFiles::default();
            planner.plan(&id, &of_task, &mut files).map(|plan| (plan, files))
        })??;
        let saved = Plan::of_saved(&self.config.drives, &plan, &create.snapshot_path);
        let ends =
            job::pair(create).map_err(|e| CommandError::new(format_args!("cannot make a pipe: {e}")))?;

        let bases = self.bases();
        saved.apply(&mut bases.clone(), &self.unwritten())?;
        let disks = self.disks_by_id();
        self.task(None, move |_| write_back_disks(&disks))??;
        let was_running = matches!(self.state, State::Running(_));
        let begin = Instant::now();
        self.pause()?;
        let job = self.split_job(create, ends, (&plan, &saved), bases.clone());
        let resumed = if was_running { self.resume_after_pause() } else { Ok(()) };
        let pause_us = u64::try_from(begin.elapsed().as_micros()).unwrap_or(u64::MAX);
        files.keep(|path| self.has_overlay(path));
        self.settle_disks();
        self.keep_merged(&bases, job.is_ok());
        let mut job = job?;
        job.set_pause(pause_us);
        let reply = job.describe();
        self.job = Some(job);
        resumed?;
        Ok(reply)
    }

    /// What happens while the guest stands still.
    fn split_job(
        &mut self,
        create: &SnapshotCreate,
        (mut job, worker): (Job, Worker),
        (plan, saved): (&Plan, &Plan),
        bases: Vec<Drive>,
    ) -> Result<Job, CommandError> {
        let unwritten = self.unwritten();
        self.put_overlays(plan, &unwritten, &bases)?;
        let mut config = FullVmConfig { drives: bases, ..self.config.clone() };
        saved.apply(&mut config.drives, &unwritten)?;
        let State::Paused(machine) = &self.state else {
            return Err(CommandError::new("there is no machine to save"));
        };
        let fresh = saved.drive_ids(&config.drives);
        let (picture, taken) = self.picture(machine, create.snapshot_type, config, fresh)?;
        let ram = machine.ram().clone();
        ram.note_fork();
        let mut kept = ram.descriptors();
        kept.extend(worker.descriptors().map(|fd| fd.as_raw_fd()));
        let (child_ram, child_create) = (ram.clone(), create.clone());
        let write = Box::new(move || worker.run(&picture, &child_ram, &child_create));
        let forked = self.host.fork_writer(kept, write);
        if let Some(pages) = taken {
            match &forked {
                Ok(()) => job.has_taken(ram, pages),
                Err(_) => ram.mark_dirty_again(&pages),
            }
        }
        match forked {
            Ok(()) => Ok(job),
            Err(error) => Err(CommandError::new(format_args!("cannot fork this process: {error}"))),
        }
    }

    /// Takes the picture of a machine that stands still. The pages that were written so far (second) count as saved from here on: whoever fails
    /// to save them puts them back.
    fn picture(
        &self,
        machine: &Paused,
        kind: SnapshotType,
        config: FullVmConfig,
        fresh_overlays: Vec<String>,
    ) -> Result<(Picture, Option<PageSet>), CommandError> {
        let state = machine.save().map_err(CommandError::new)?;
        // Also for a Full snapshot: the next Diff is on top of this one.
        let taken = machine.take_dirty_pages().map_err(CommandError::new)?;
        let pages = match (kind, &taken) {
            (SnapshotType::Full, _) => None,
            (SnapshotType::Diff, Some(taken)) => Some(taken.clone()),
            (SnapshotType::Diff, None) => Some(machine.ram().changed_pages().map_err(CommandError::new)?),
        };
        let config =
            SavedConfig { config, pci: self.platform.pci, id: self.identity.id.clone(), fresh_overlays };
        let created_by = format!("{} {}", self.identity.app_name, self.identity.version);
        Ok((Picture { config, machine: state, created_by, pages }, taken))
    }
}

/// Lets the disks' files hold what the guest wrote.
fn sync_disks(disks: &[(String, Disk)], token: &Token) -> Result<(), CommandError> {
    for (id, disk) in disks {
        token.check()?;
        disk.sync().map_err(|e| CommandError::new(format_args!("drive {id}: {e}")))?;
    }
    Ok(())
}

/// What clients see of a snapshot that is being written.
fn job_of(create: &SnapshotCreate) -> task::Job {
    task::Job { snapshot_path: create.snapshot_path.clone(), mem_file_path: create.mem_file_path.clone() }
}

/// Refuses targets that cannot be written, or that are not to be: each must be possible as a new
/// file, and neither may be the other or a disk.
fn check_targets(create: &SnapshotCreate, drives: &[Drive]) -> Result<(), CommandError> {
    let SnapshotCreate { snapshot_path, mem_file_path, .. } = create;
    if snapshot::is_same_path(snapshot_path, mem_file_path) {
        return Err(ConfigError::from(SnapshotError::SameFile { path: snapshot_path.clone() }).into());
    }
    for (field, path) in [("mem_file_path", mem_file_path), ("snapshot_path", snapshot_path)] {
        for drive in drives {
            let overlay = drive.overlay.iter().flat_map(|o| std::iter::once(&o.path).chain(&o.layers));
            if drive.path_on_host.iter().chain(overlay).any(|disk| snapshot::is_same_path(path, disk)) {
                return Err(CommandError::new(format_args!(
                    "{field} {}: it is a file of drive {}; name another file",
                    path.display(),
                    drive.drive_id
                )));
            }
        }
        if let Some(overlay) = create.drives.iter().find(|by| snapshot::is_same_path(path, &by.overlay)) {
            return Err(CommandError::new(format_args!(
                "{field} {}: it is also to be the overlay of drive {}; name another file",
                path.display(),
                overlay.drive_id
            )));
        }
        AtomicFile::create(path).map_err(CommandError::new)?;
    }
    Ok(())
}

impl Picture {
    /// Writes both files, and gives them their names as one step.
    pub(crate) fn write_and_commit(
        &self,
        ram: &GuestRam,
        create: &SnapshotCreate,
        observer: &dyn Observer,
    ) -> Result<(), CommandError> {
        // Before the memory, which is the long part: a state that has no place is found now.
        let state = AtomicFile::create(&create.snapshot_path).map_err(CommandError::new)?;
        let WrittenImage { file: memory, info, .. } = match &self.pages {
            None => image::write_full(ram, &create.mem_file_path, observer),
            Some(pages) => image::write_diff(ram, &create.mem_file_path, pages, observer),
        }
        .map_err(CommandError::new)?;
        let state = self.stage_state(&info, state).map_err(CommandError::new)?;
        if observer.cancelled() {
            return Err(CommandError::new(ImageError::Cancelled { path: create.mem_file_path.clone() }));
        }
        memory.commit_with(state).map_err(CommandError::new)
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
