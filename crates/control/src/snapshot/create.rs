//! `PUT /snapshot/create`.

use std::os::fd::AsRawFd;
use std::time::{Instant, SystemTime, UNIX_EPOCH};

use config::{ConfigError, Drive, FullVmConfig, SnapshotCreate, SnapshotError, SnapshotType, VmState};
use machine::{MachineState, Paused};
use memory::image::{self, ImageInfo, Observer, Written};
use memory::{GuestRam, PageSet};
use snapshot::{AtomicFile, Header, Staged, Writer};

use super::job::{self, Job, Worker};
use super::{KIND, SavedConfig};
use crate::controller::{Controller, Host, State};
use crate::fork::disks::{Plan, Planner};
use crate::fork::files::NewFiles;
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
        if snapshot::same_place(&create.snapshot_path, &create.mem_file_path) {
            let path = create.snapshot_path.clone();
            return Err(ConfigError::from(SnapshotError::OneFile { path }).into());
        }
        if create.live {
            let begun = self.begin_job(create);
            self.merge_many_layers();
            return begun;
        }
        let State::Paused(machine) = &self.state else {
            return Err(CommandError::new(format_args!(
                "PUT /snapshot/create needs a paused microVM, and it is {} (live snapshots need not: \"live\": true)",
                self.phase().name()
            )));
        };
        self.sync_disks()?;
        let (picture, taken) =
            self.picture(machine, create.snapshot_type, self.config.clone(), Vec::new())?;
        let ram = machine.ram().clone();
        let written = picture
            .write(&ram, create, &())
            .and_then(|(memory, state)| snapshot::commit_pair(memory, state).map_err(CommandError::new));
        if let (Err(_), Some(taken)) = (&written, taken) {
            ram.put_back(&taken);
        }
        written.map(|()| Reply::Empty)
    }

    /// Begins a job: the guest stands still for a moment, and goes on as it was.
    fn begin_job(&mut self, create: &SnapshotCreate) -> Result<Reply, CommandError> {
        if let Some(machine) = self.machine() {
            machine.ram().fork_check().map_err(CommandError::new)?;
        }
        let paths = [&create.snapshot_path, &create.mem_file_path];
        for path in paths {
            // What cannot be written is found before anything is changed.
            AtomicFile::create(path).map_err(CommandError::new)?;
        }
        // Disks as they are at that moment become a base, as in a fork: this microVM goes on on overlays.
        let named = create.drives.iter().map(|overlay| &overlay.overlay).chain(paths).cloned();
        let mut files = NewFiles::default();
        let planner = Planner::new(&self.config.drives, &self.disks, named);
        let plan = planner.plan(&self.identity.id, &create.drives, &mut files)?;
        let saved = Plan::of_saved(&self.config.drives, &plan, &create.snapshot_path);
        let ends =
            job::pair(create).map_err(|e| CommandError::new(format_args!("cannot make a pipe: {e}")))?;

        let bases = self.bases();
        saved.apply(&mut bases.clone(), &self.unwritten())?;
        self.write_back_disks()?;
        let was_running = matches!(self.state, State::Running(_));
        let begin = Instant::now();
        self.set_vm_state(VmState::Paused)?;
        let job = self.split_job(create, ends, (&plan, &saved), bases.clone());
        let resumed = if was_running { self.set_vm_state(VmState::Resumed) } else { Ok(()) };
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
        let mut kept = ram.descriptors();
        kept.extend(worker.descriptors().map(|fd| fd.as_raw_fd()));
        let (child_ram, child_create) = (ram.clone(), create.clone());
        let write = Box::new(move || worker.run(&picture, &child_ram, &child_create));
        let forked = self.host.fork_writer(kept, write);
        if let Some(pages) = taken {
            match &forked {
                Ok(()) => job.has_taken(ram, pages),
                Err(_) => ram.put_back(&pages),
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
            (SnapshotType::Diff, None) => Some(machine.ram().own_pages().map_err(CommandError::new)?),
        };
        let config =
            SavedConfig { config, pci: self.platform.pci, id: self.identity.id.clone(), fresh_overlays };
        let created_by = format!("{} {}", self.identity.app_name, self.identity.version);
        Ok((Picture { config, machine: state, created_by, pages }, taken))
    }

    /// Lets the disks' files hold what the guest wrote.
    fn sync_disks(&self) -> Result<(), CommandError> {
        for (drive, disk) in self.config.drives.iter().zip(&self.disks) {
            disk.sync().map_err(|e| CommandError::new(format_args!("drive {}: {e}", drive.drive_id)))?;
        }
        Ok(())
    }
}

impl Picture {
    /// Writes both files, whole and on disk, under temporary names.
    pub(crate) fn write(
        &self,
        ram: &GuestRam,
        create: &SnapshotCreate,
        observer: &dyn Observer,
    ) -> Result<(Staged, Staged), CommandError> {
        let Written { file: memory, info, .. } = match &self.pages {
            None => image::write_full(ram, &create.mem_file_path, observer),
            Some(pages) => image::write_diff(ram, &create.mem_file_path, pages, observer),
        }
        .map_err(CommandError::new)?;
        let state = self.stage_state(&info, create).map_err(CommandError::new)?;
        Ok((memory, state))
    }

    fn stage_state(&self, info: &ImageInfo, create: &SnapshotCreate) -> Result<Staged, snapshot::WriteError> {
        let now = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default().as_millis();
        let now = u64::try_from(now).unwrap_or(u64::MAX);
        let mut writer = Writer::new(&Header::new(KIND, &self.created_by, now))?;
        writer.put(&self.config)?;
        writer.put(info)?;
        writer.put(&self.machine)?;
        writer.stage(&create.snapshot_path)
    }
}
