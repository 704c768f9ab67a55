//! Disks in a fork: what was written so far becomes a base that nobody writes to any more, and each side goes on on an overlay of
//! its own.
//!
//! An overlay that nothing was written to yet is no base: whoever has it keeps it, and the others begin on what lies below it. So a
//! microVM that writes nothing can be forked and saved live any number of times. One that writes gets a layer each time; many of them are
//! [merged](super::merging) into one, while the guest runs.

use std::collections::BTreeSet;
use std::os::unix::fs::FileTypeExt;
use std::path::{Path, PathBuf};

use block::disk::{Disk, DiskOptions};
use config::{Child, Drive, DriveOverlay, Overlay};

use super::files::{NewFiles, with_number};
use crate::CommandError;
use crate::controller::{Controller, Host, State};

/// Which drives go on on a new overlay: by their place in the configuration, the overlay's file.
#[derive(Debug)]
pub(crate) struct Plan(Vec<(usize, PathBuf)>);

/// Who makes a plan, and with what.
#[derive(Debug)]
pub(crate) struct Planner {
    drives: Vec<Drive>,
    disks: Vec<Disk>,
    /// Paths that the user gave to files, so that none of them is chosen for another.
    named: BTreeSet<PathBuf>,
}

impl Planner {
    /// For these drives and their disks. All files that the command names are `named`.
    pub(crate) fn new(drives: &[Drive], disks: &[Disk], named: impl Iterator<Item = PathBuf>) -> Self {
        Planner { drives: drives.to_vec(), disks: disks.to_vec(), named: named.collect() }
    }

    /// How the microVM `id` goes on, or begins.
    pub(crate) fn plan(
        &self,
        id: &str,
        overlays: &[DriveOverlay],
        files: &mut NewFiles,
    ) -> Result<Plan, CommandError> {
        let known = |id: &String| self.drives.iter().any(|drive| drive.drive_id == *id);
        if let Some(unknown) = overlays.iter().find(|overlay| !known(&overlay.drive_id)) {
            return Err(CommandError::new(format_args!("there is no drive {}", unknown.drive_id)));
        }
        let mut plan = Vec::new();
        for (at, drive) in self.writable() {
            let path = match overlays.iter().find(|overlay| overlay.drive_id == drive.drive_id) {
                Some(overlay) => files.given(&drive.drive_id, &overlay.overlay)?,
                None => files.numbered(&drive.drive_id, &stem(drive, id)?, &self.named)?,
            };
            plan.push((at, path));
        }
        Ok(Plan(plan))
    }

    /// How a child begins.
    pub(super) fn of_child(&self, child: &Child, files: &mut NewFiles) -> Result<Plan, CommandError> {
        let id = child.id.as_str();
        self.plan(id, &child.drives, files)
            .map_err(|error| CommandError::new(format_args!("child {id}: {error}")))
    }

    /// Drives that have to go on on a new overlay. What nobody writes to is shared as it is; so is a disk without a size.
    fn writable(&self) -> impl Iterator<Item = (usize, &Drive)> {
        let drives = self.drives.iter().zip(&self.disks).enumerate();
        drives
            .filter(|(_, (_, disk))| !disk.is_read_only() && disk.size() > 0)
            .map(|(at, (drive, _))| (at, drive))
    }
}

impl Plan {
    /// How a microVM that is restored from the snapshot at `state` begins, whose drives go on as `parents` says: its overlays are to be beside its
    /// parent's. Their numbers are chosen anew at each load.
    pub(crate) fn of_saved(drives: &[Drive], parents: &Plan, state: &Path) -> Self {
        let state = state.file_name().unwrap_or_default().to_string_lossy();
        let overlays = parents.0.iter().map(|(at, path)| {
            let disk = drives[*at].path_on_host.as_deref().and_then(Path::file_name).unwrap_or_default();
            let mut name = disk.to_owned();
            name.push(format!(".{state}"));
            (*at, with_number(&path.with_file_name(name), 1))
        });
        Plan(overlays.collect())
    }

    /// The drives in it.
    pub(crate) fn drive_ids(&self, drives: &[Drive]) -> Vec<String> {
        self.0.iter().map(|(at, _)| drives[*at].drive_id.clone()).collect()
    }

    /// Writes the plan into the configuration of one who begins on `drives` as they are now: `unwritten` says by drive whether its overlay holds
    /// nothing yet.
    pub(crate) fn apply(&self, drives: &mut [Drive], unwritten: &[bool]) -> Result<(), CommandError> {
        for (at, path) in &self.0 {
            drives[*at] = on_overlay(&drives[*at], unwritten[*at], path)?;
        }
        Ok(())
    }
}

/// `drive`, with its writes from now on in a new overlay at `path`.
fn on_overlay(drive: &Drive, unwritten: bool, path: &Path) -> Result<Drive, CommandError> {
    let mut layers = Vec::new();
    if let Some(overlay) = &drive.overlay {
        layers.clone_from(&overlay.layers);
        if !unwritten {
            layers.push(overlay.path.clone());
        }
    }
    let overlay = Overlay { path: path.to_owned(), layers, size_mib: None };
    let drive = Drive { overlay: Some(overlay), ..drive.clone() };
    drive.check().map_err(|e| CommandError::new(format_args!("drive {}: {e}", drive.drive_id)))?;
    Ok(drive)
}

/// What the names of new overlays begin with: the disk's name and the id of who writes to them, beside the overlay that takes writes now,
/// else beside the disk.
pub(super) fn stem(drive: &Drive, id: &str) -> Result<PathBuf, CommandError> {
    let disk = drive.path_on_host.as_deref().unwrap_or(Path::new(""));
    let mut name = disk.file_name().unwrap_or_default().to_owned();
    name.push(format!(".{id}"));
    if let Some(overlay) = &drive.overlay {
        return Ok(overlay.path.with_file_name(name));
    }
    if std::fs::metadata(disk).is_ok_and(|file| file.file_type().is_block_device()) {
        return Err(CommandError::new(format_args!(
            "drive {} is the block device {}: it has to be told where writes go (drives[].overlay)",
            drive.drive_id,
            disk.display()
        )));
    }
    Ok(disk.with_file_name(name))
}

impl<H: Host> Controller<H> {
    /// By drive: whether its writes go to an overlay that holds nothing yet.
    pub(crate) fn unwritten(&self) -> Vec<bool> {
        self.disks.iter().map(Disk::is_unwritten).collect()
    }

    /// The drives as plans are to be applied to: as they are, but for layers that were merged by now.
    pub(crate) fn bases(&self) -> Vec<Drive> {
        self.config.drives.iter().map(|drive| self.merges.applied_to(drive)).collect()
    }

    /// Keeps what was merged and is used now: by this microVM or, if they are `begun`, by others that begin on `bases`.
    pub(crate) fn keep_merged(&self, bases: &[Drive], begun: bool) {
        self.merges.keep(|path| self.has_overlay(path) || (begun && has_overlay(bases, path)));
    }

    /// Lets this microVM, which stands still, go on on its new overlays: on all of them, or, if one cannot be opened, on none. Overlays that hold
    /// nothing yet are kept instead.
    pub(crate) fn put_overlays(
        &mut self,
        plan: &Plan,
        unwritten: &[bool],
        bases: &[Drive],
    ) -> Result<(), CommandError> {
        let mut opened = Vec::new();
        let moving = plan.0.iter().filter(|(at, _)| !unwritten[*at]);
        for (at, path) in moving {
            match self.open_on_top(*at, &bases[*at], path) {
                Ok((drive, disk)) => opened.push((*at, drive, disk)),
                // What was left behind may still freeze a disk, or hold up this thread.
                Err(error) if self.left_behind => return Err(error),
                Err(error) => {
                    opened.drain(..).for_each(|(at, _, disk)| self.write_again(at, disk));
                    return Err(error);
                }
            }
        }
        let mut opened = opened.into_iter();
        while let Some((at, drive, disk)) = opened.next() {
            let State::Paused(machine) = &self.state else { break };
            let Some(control) = machine.devices().drive(&drive.drive_id).cloned() else { continue };
            match control.replace(disk.clone()) {
                Ok(replaced) => {
                    self.disks[at] = disk;
                    self.settling.push((drive.drive_id.clone(), replaced));
                    self.config.drives[at] = drive;
                }
                Err(error) => {
                    let rest = opened.map(|(at, _, disk)| (at, disk));
                    std::iter::once((at, disk)).chain(rest).for_each(|(at, disk)| self.write_again(at, disk));
                    return Err(CommandError::new(error));
                }
            }
        }
        Ok(())
    }

    /// Makes a drive's disk a base, and opens a new overlay on it.
    fn open_on_top(&mut self, at: usize, base: &Drive, path: &Path) -> Result<(Drive, Disk), CommandError> {
        let drive = on_overlay(base, false, path)?;
        // The file was made before the guest was paused, and its name made durable then.
        let options = DiskOptions { name_is_durable: true, ..DiskOptions::of(&drive) };
        let (disk, locks) = (self.disks[at].clone(), self.disk_locks.clone());
        let opened = self.task_that_commits(None, move |_| {
            disk.freeze().and_then(|()| Disk::open_with(&options, &locks, None))
        })?;
        match opened {
            Ok(disk) => Ok((drive, disk)),
            Err(error) => {
                self.thaw(at);
                Err(CommandError::new(format_args!("drive {}: {error}", drive.drive_id)))
            }
        }
    }

    /// Undoes [`Self::open_on_top`].
    fn write_again(&self, at: usize, on_top: Disk) {
        // It holds the base's lock.
        drop(on_top);
        self.thaw(at);
    }

    fn thaw(&self, at: usize) {
        if let Err(lost) = self.disks[at].thaw() {
            log::error!("drive {} cannot be written any more: {lost}", self.config.drives[at].drive_id);
        }
    }

    /// Waits until the workers have let go of the disks that were replaced.
    pub(crate) fn settle_disks(&mut self) {
        if !matches!(self.state, State::Running(_)) {
            // They let go when they run again.
            return;
        }
        let settling = std::mem::take(&mut self.settling);
        self.wait_for_replaced(settling);
    }

    /// Whether one of the drives has the overlay at `path`, to write to or as a layer.
    pub(crate) fn has_overlay(&self, path: &Path) -> bool {
        has_overlay(&self.config.drives, path)
    }
}

/// Writes back what the guest wrote so far, so that little is left to sync while it is paused. Where
/// that fails the contents of the disk are unknown, and what it was for fails as well.
pub(crate) fn write_back_disks(disks: &[(String, Disk)]) -> Result<(), CommandError> {
    for (drive_id, disk) in disks {
        disk.write_back().map_err(|error| CommandError::new(format_args!("drive {drive_id}: {error}")))?;
    }
    Ok(())
}

fn has_overlay(drives: &[Drive], path: &Path) -> bool {
    let mut overlays = drives.iter().filter_map(|drive| drive.overlay.as_ref());
    overlays.any(|overlay| overlay.path == path || overlay.layers.iter().any(|layer| layer == path))
}
