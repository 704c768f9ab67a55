//! [`Drives`]: the drives of a microVM, each with its disk.
//!
//! Opening and syncing a disk may wait for the host. So nothing here does that: the functions that
//! [`drive_commands`](crate::drive_commands) runs as tasks get clones of what they need.
//!
//! # Invariants
//!
//! - A drive has its disk open, but for the time in which [`Drives::close`] has closed it so that
//!   another one can be opened.
//! - A disk that was replaced while the guest was paused is in `swaps` until the guest runs again
//!   and its requests in flight were waited for.

use std::path::{Path, PathBuf};

use block::DiskSwap;
use block::disk::{Disk, DiskOptions, FileLocks};
use config::{Drive, check_drives};
use machine::{Notice, NoticeSink};

use crate::CommandError;
use crate::overlays::merging::Merges;
use crate::overlays::plan::Planner;

/// One drive.
#[derive(Debug)]
pub(crate) struct DriveSlot {
    pub(crate) config: Drive,
    /// `None` while another disk is being opened for the drive.
    disk: Option<Disk>,
}

/// The drives of a microVM, in the order in which they were configured.
#[derive(Debug, Default)]
pub(crate) struct Drives {
    slots: Vec<DriveSlot>,
    /// The locks that keep other monitors from the disks.
    locks: FileLocks,
    /// Disks that were replaced and may still have requests in flight, with their drives' ids.
    swaps: Vec<(String, DiskSwap)>,
    /// The layers of disks that are being merged.
    merges: Merges,
    /// Where failed disks are reported, once [`Drives::report_failures`] was called.
    notices: Option<NoticeSink>,
}

impl Drives {
    /// Opens the disks of `configs`. `names_are_durable` says whether the directory entries of new,
    /// empty overlay files are durable already.
    pub(crate) fn open(
        configs: Vec<Drive>,
        locks: &FileLocks,
        names_are_durable: bool,
    ) -> Result<Self, CommandError> {
        let slot = |config: Drive| {
            let options = DiskOptions { name_is_durable: names_are_durable, ..DiskOptions::of(&config) };
            let disk = Disk::open_with(&options, locks, None)
                .map_err(|error| CommandError::drive(&config.drive_id, error))?;
            Ok(DriveSlot { config, disk: Some(disk) })
        };
        let slots = configs.into_iter().map(slot).collect::<Result<_, CommandError>>()?;
        Ok(Drives { slots, locks: locks.clone(), ..Drives::default() })
    }

    /// Reports to `notices` each disk, present or to come, whose contents become unknown.
    pub(crate) fn report_failures(&mut self, notices: NoticeSink) {
        self.notices = Some(notices);
        self.iter().for_each(|(drive, disk)| self.report_failure_of(drive, disk));
    }

    fn report_failure_of(&self, drive: &Drive, disk: &Disk) {
        let Some(notices) = self.notices.clone() else { return };
        let device = format!("drive {}", drive.drive_id);
        disk.on_contents_unknown(Box::new(move |unknown| {
            let (device, error) = (device.clone(), unknown.to_string());
            notices.post(Notice::DeviceError { device, error, needs_reset: false, times: 1 });
        }));
    }

    /// The locks of this process's disks. Clones are the same locks.
    pub(crate) fn locks(&self) -> FileLocks {
        self.locks.clone()
    }

    /// The configuration of each drive.
    pub(crate) fn configs(&self) -> Vec<Drive> {
        self.slots.iter().map(|slot| slot.config.clone()).collect()
    }

    /// The configuration of each drive as `GET /vm/config` shows it: with the I/O engine in force,
    /// which `PUT /drives` accepts.
    pub(crate) fn shown(&self) -> Vec<Drive> {
        let shown = |slot: &DriveSlot| {
            let io_engine = slot.disk.as_ref().map(Disk::engine).or(slot.config.io_engine);
            Drive { io_engine, ..slot.config.clone() }
        };
        self.slots.iter().map(shown).collect()
    }

    /// Each drive with its disk.
    pub(crate) fn iter(&self) -> impl Iterator<Item = (&Drive, &Disk)> {
        self.slots.iter().filter_map(|slot| Some((&slot.config, slot.disk.as_ref()?)))
    }

    /// The disks with their drives' ids, for a task.
    pub(crate) fn disks_by_id(&self) -> Vec<(String, Disk)> {
        self.iter().map(|(drive, disk)| (drive.drive_id.clone(), disk.clone())).collect()
    }

    fn position(&self, id: &str) -> Option<usize> {
        self.slots.iter().position(|slot| slot.config.drive_id == id)
    }

    /// The drive `id` and its disk.
    pub(crate) fn get(&self, id: &str) -> Result<(&Drive, &Disk), CommandError> {
        let mut drives = self.iter();
        let found = drives.find(|(drive, _)| drive.drive_id == id);
        found.ok_or_else(|| CommandError::NoSuchDrive(id.to_owned()))
    }

    /// Checks that `drive` fits the other drives.
    pub(crate) fn check_put(&self, drive: &Drive) -> Result<(), CommandError> {
        let mut drives = self.configs();
        match self.position(&drive.drive_id) {
            Some(at) => drives[at] = drive.clone(),
            None => drives.push(drive.clone()),
        }
        Ok(check_drives(&drives)?)
    }

    /// Closes the disk of the drive `id`, and returns the drive's configuration. `None` if there is
    /// no such drive.
    pub(crate) fn close(&mut self, id: &str) -> Option<Drive> {
        let at = self.position(id)?;
        self.slots[at].disk = None;
        Some(self.slots[at].config.clone())
    }

    /// Adds a drive, or puts `drive` in the place of the one that has its id.
    pub(crate) fn set(&mut self, config: Drive, disk: Disk) {
        self.report_failure_of(&config, &disk);
        let at = self.position(&config.drive_id);
        let slot = DriveSlot { config, disk: Some(disk) };
        match at {
            Some(at) => self.slots[at] = slot,
            None => self.slots.push(slot),
        }
    }

    /// Removes the drive `id`.
    pub(crate) fn remove(&mut self, id: &str) {
        self.slots.retain(|slot| slot.config.drive_id != id);
    }

    /// Cancels the merge of a drive that gets another disk.
    pub(crate) fn cancel_merge(&mut self, id: &str) {
        self.merges.cancel(id);
    }

    /// Cancels all merges. For the end of the process, which waits for no thread.
    pub(crate) fn cancel_merges(&mut self) {
        self.merges = Merges::default();
    }

    /// Starts to merge the layers of drives that have many, for the microVM `vm_id`. Returns at
    /// once.
    pub(crate) fn merge_many_layers(&mut self, vm_id: &str) {
        for slot in &self.slots {
            if let Some(disk) = &slot.disk {
                self.merges.begin(vm_id, &slot.config, disk);
            }
        }
    }

    /// A planner of overlays on these drives. All files that the command names are `named`.
    pub(crate) fn planner(&self, named: impl Iterator<Item = PathBuf>) -> Planner {
        let drives = self.iter().map(|(drive, disk)| (drive.clone(), disk.clone()));
        Planner::new(drives.collect(), named)
    }

    /// By drive: whether its writes go to an overlay that holds nothing yet.
    pub(crate) fn unwritten(&self) -> Vec<bool> {
        self.slots.iter().map(|slot| slot.disk.as_ref().is_some_and(Disk::is_unwritten)).collect()
    }

    /// The configurations that overlay plans are applied to: each drive as it is, with merged
    /// layers in the place of those that they hold.
    pub(crate) fn bases(&self) -> Vec<Drive> {
        self.slots.iter().map(|slot| self.merges.applied_to(&slot.config)).collect()
    }

    /// Keeps the merged files that are used now: by this microVM or, if others have started on
    /// `bases`, by them.
    pub(crate) fn keep_merged(&self, bases: &[Drive], others_started: bool) {
        self.merges.keep(|path| self.uses_overlay(path) || (others_started && use_overlay(bases, path)));
    }

    /// Whether a drive has the overlay at `path`, to write to or as a layer.
    pub(crate) fn uses_overlay(&self, path: &Path) -> bool {
        self.slots.iter().any(|slot| uses_overlay(&slot.config, path))
    }

    /// The disk of the drive at `at`, by its place in the configuration.
    pub(crate) fn disk(&self, at: usize) -> Option<&Disk> {
        self.slots.get(at)?.disk.as_ref()
    }

    /// Notes a disk that was replaced, and may have requests in flight.
    pub(crate) fn add_swap(&mut self, id: String, swap: DiskSwap) {
        self.swaps.push((id, swap));
    }

    /// The disks that were replaced and not waited for yet.
    pub(crate) fn take_swaps(&mut self) -> Vec<(String, DiskSwap)> {
        std::mem::take(&mut self.swaps)
    }
}

fn use_overlay(drives: &[Drive], path: &Path) -> bool {
    drives.iter().any(|drive| uses_overlay(drive, path))
}

fn uses_overlay(drive: &Drive, path: &Path) -> bool {
    drive
        .overlay
        .as_ref()
        .is_some_and(|overlay| overlay.path == path || overlay.layers.iter().any(|layer| layer == path))
}
