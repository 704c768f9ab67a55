//! [`OverlayPlan`]: on which new overlays a microVM, its children or later loads continue.
//!
//! An overlay that nothing was written to yet becomes no base: its owner keeps it, and the others
//! continue on what lies below it. So a microVM that writes nothing can be forked and saved live
//! any number of times. One that writes gets a layer each time; many layers are
//! [merged](super::merging) into one while the guest runs.

use std::collections::BTreeSet;
use std::os::unix::fs::FileTypeExt;
use std::path::{Path, PathBuf};

use block::disk::Disk;
use config::{Drive, DriveOverlay, Overlay};

use super::files::{NewFiles, with_number};
use crate::CommandError;

/// The drives that continue on a new overlay: by their place in the configuration, the overlay's
/// file.
#[derive(Debug)]
pub(crate) struct OverlayPlan(Vec<(usize, PathBuf)>);

/// The data that plans are made from. It is owned, so that a task can make them.
#[derive(Debug)]
pub(crate) struct Planner {
    drives: Vec<(Drive, Disk)>,
    /// Paths that the user gave to files, so that none of them is chosen for another.
    named: BTreeSet<PathBuf>,
}

impl Planner {
    /// Plans for these drives. All files that the command names are `named`.
    pub(crate) fn new(drives: Vec<(Drive, Disk)>, named: impl Iterator<Item = PathBuf>) -> Self {
        Planner { drives, named: named.collect() }
    }

    /// Plans the overlays of the microVM `id`, which is there or is to be created. Creates their
    /// files.
    pub(crate) fn plan(
        &self,
        id: &str,
        overlays: &[DriveOverlay],
        files: &mut NewFiles,
    ) -> Result<OverlayPlan, CommandError> {
        let known = |id: &String| self.drives.iter().any(|(drive, _)| drive.drive_id == *id);
        if let Some(unknown) = overlays.iter().find(|overlay| !known(&overlay.drive_id)) {
            return Err(CommandError::NoSuchDrive(unknown.drive_id.clone()));
        }
        let mut plan = Vec::new();
        for (at, drive) in self.writable() {
            let path = match overlays.iter().find(|overlay| overlay.drive_id == drive.drive_id) {
                Some(overlay) => files.given(&drive.drive_id, &overlay.overlay)?,
                None => files.numbered(&drive.drive_id, &stem(drive, id)?, &self.named)?,
            };
            plan.push((at, path));
        }
        Ok(OverlayPlan(plan))
    }

    /// The drives that need a new overlay. Read-only disks are shared as they are; so are disks
    /// without a size.
    fn writable(&self) -> impl Iterator<Item = (usize, &Drive)> {
        let drives = self.drives.iter().enumerate();
        drives
            .filter(|(_, (_, disk))| !disk.is_read_only() && disk.size() > 0)
            .map(|(at, (drive, _))| (at, drive))
    }
}

impl OverlayPlan {
    /// The overlays of a microVM that is restored from the live snapshot at `state`, whose drives
    /// are `drives` and whose parent continues as `parents` says.
    ///
    /// They lie beside the parent's overlays. Each load chooses their numbers.
    pub(crate) fn of_saved(drives: &[Drive], parents: &OverlayPlan, state: &Path) -> Self {
        let state = state.file_name().unwrap_or_default().to_string_lossy();
        let overlays = parents.0.iter().map(|(at, path)| {
            let disk = drives[*at].path_on_host.as_deref().and_then(Path::file_name).unwrap_or_default();
            let mut name = disk.to_owned();
            name.push(format!(".{state}"));
            (*at, with_number(&path.with_file_name(name), 1))
        });
        OverlayPlan(overlays.collect())
    }

    /// The ids of the drives that get a new overlay.
    pub(crate) fn drive_ids(&self, drives: &[Drive]) -> Vec<String> {
        self.0.iter().map(|(at, _)| drives[*at].drive_id.clone()).collect()
    }

    /// The drives that get a new overlay because theirs was written to, by their place in the
    /// configuration.
    pub(crate) fn to_switch<'a>(
        &'a self,
        unwritten: &'a [bool],
    ) -> impl Iterator<Item = (usize, &'a Path)> + 'a {
        self.0.iter().filter(|(at, _)| !unwritten[*at]).map(|(at, path)| (*at, path.as_path()))
    }

    /// Writes the plan into `drives`, the configuration of a microVM that continues on the present
    /// disks. `unwritten` says by drive whether its overlay holds nothing yet.
    pub(crate) fn apply(&self, drives: &mut [Drive], unwritten: &[bool]) -> Result<(), CommandError> {
        for (at, path) in &self.0 {
            drives[*at] = on_overlay(&drives[*at], unwritten[*at], path)?;
        }
        Ok(())
    }
}

/// Returns `drive` with its writes from now on in a new overlay at `path`.
pub(crate) fn on_overlay(drive: &Drive, unwritten: bool, path: &Path) -> Result<Drive, CommandError> {
    let mut layers = Vec::new();
    if let Some(overlay) = &drive.overlay {
        layers.clone_from(&overlay.layers);
        if !unwritten {
            layers.push(overlay.path.clone());
        }
    }
    let overlay = Overlay { path: path.to_owned(), layers, size_mib: None };
    let drive = Drive { overlay: Some(overlay), ..drive.clone() };
    drive.check().map_err(|error| CommandError::drive(&drive.drive_id, error))?;
    Ok(drive)
}

/// The beginning of the names of new overlays: the disk's name and the id of the microVM that
/// writes to them. They lie beside the overlay that takes writes now, else beside the disk.
pub(super) fn stem(drive: &Drive, id: &str) -> Result<PathBuf, CommandError> {
    let disk = drive.path_on_host.as_deref().unwrap_or(Path::new(""));
    let mut name = disk.file_name().unwrap_or_default().to_owned();
    name.push(format!(".{id}"));
    if let Some(overlay) = &drive.overlay {
        return Ok(overlay.path.with_file_name(name));
    }
    if std::fs::metadata(disk).is_ok_and(|file| file.file_type().is_block_device()) {
        let disk = disk.display();
        let source = format!("{disk} is a block device; name a file for its writes (drives[].overlay)");
        return Err(CommandError::drive(&drive.drive_id, source));
    }
    Ok(disk.with_file_name(name))
}
