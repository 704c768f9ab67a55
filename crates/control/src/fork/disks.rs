//! Disks in a fork: what was written so far becomes a base that nobody writes to any more, and each side goes on on an overlay of
//! its own.

use std::os::unix::fs::FileTypeExt;
use std::path::{Path, PathBuf};

use config::{Child, Drive, DriveOverlay, Overlay};
use virtio::block::disk::{Disk, DiskOptions};

use crate::CommandError;
use crate::controller::{Controller, Host, REPLACE_PATIENCE, State};

/// Most tries for a free name.
const MAX_NAMES: u32 = 10_000;

/// The drives that go on on an overlay, by their place in the configuration.
#[derive(Debug)]
pub(crate) struct Plan(Vec<(usize, Drive)>);

impl Plan {
    /// How the parent goes on.
    pub(crate) fn of_parent(
        drives: &[Drive],
        disks: &[Disk],
        id: &str,
        overlays: &[DriveOverlay],
    ) -> Result<Self, CommandError> {
        Self::new(drives, disks, id, overlays)
    }

    /// How a microVM that is restored from the snapshot at `state` begins, unless it is told otherwise.
    pub(crate) fn of_saved(drives: &[Drive], disks: &[Disk], state: &Path) -> Result<Self, CommandError> {
        let name = state.file_name().unwrap_or_default().to_string_lossy();
        Self::new(drives, disks, &name, &[])
    }

    /// How a child begins.
    pub(super) fn of_child(drives: &[Drive], disks: &[Disk], child: &Child) -> Result<Self, CommandError> {
        let id = child.id.as_str();
        Self::new(drives, disks, id, &child.drives)
            .map_err(|error| CommandError::new(format_args!("child {id}: {error}")))
    }

    fn new(
        drives: &[Drive],
        disks: &[Disk],
        id: &str,
        overlays: &[DriveOverlay],
    ) -> Result<Self, CommandError> {
        if let Some(unknown) = overlays.iter().find(|o| drives.iter().all(|d| d.drive_id != o.drive_id)) {
            return Err(CommandError::new(format_args!("there is no drive {}", unknown.drive_id)));
        }
        let mut plan = Vec::new();
        for (at, (drive, disk)) in drives.iter().zip(disks).enumerate() {
            // What nobody writes to is shared as it is; so is a disk without a size.
            if disk.is_read_only() || disk.size() == 0 {
                continue;
            }
            let path = match overlays.iter().find(|overlay| overlay.drive_id == drive.drive_id) {
                Some(overlay) => given(&drive.drive_id, &overlay.overlay)?,
                None => default_name(drive, id)?,
            };
            let mut layers = Vec::new();
            if let Some(overlay) = &drive.overlay {
                layers.clone_from(&overlay.layers);
                layers.push(overlay.path.clone());
            }
            let drive = Drive { overlay: Some(Overlay { path, layers, size_mib: None }), ..drive.clone() };
            drive.check().map_err(|e| CommandError::new(format_args!("drive {}: {e}", drive.drive_id)))?;
            plan.push((at, drive));
        }
        Ok(Plan(plan))
    }

    /// The drives in it.
    pub(crate) fn drive_ids(&self) -> Vec<String> {
        self.0.iter().map(|(_, drive)| drive.drive_id.clone()).collect()
    }

    /// Writes the plan into a configuration.
    pub(crate) fn apply(self, drives: &mut [Drive]) {
        for (at, drive) in self.0 {
            drives[at] = drive;
        }
    }
}

/// An overlay that the user named.
fn given(drive_id: &str, path: &Path) -> Result<PathBuf, CommandError> {
    if std::fs::metadata(path).is_ok_and(|file| file.len() > 0) {
        return Err(CommandError::new(format_args!(
            "drive {drive_id}: the overlay {} exists already",
            path.display()
        )));
    }
    Ok(path.to_owned())
}

/// Beside the disk, with the id of who writes to it: the first of `DISK.ID.1`, `DISK.ID.2`, ... that does not exist.
fn default_name(drive: &Drive, id: &str) -> Result<PathBuf, CommandError> {
    let disk = drive.path_on_host.as_deref().unwrap_or(Path::new(""));
    if std::fs::metadata(disk).is_ok_and(|file| file.file_type().is_block_device()) {
        return Err(CommandError::new(format_args!(
            "drive {} is the block device {}: a fork has to be told where its writes go (drives[].overlay)",
            drive.drive_id,
            disk.display()
        )));
    }
    let name = |number: u32| {
        let mut name = disk.as_os_str().to_owned();
        name.push(format!(".{id}.{number}"));
        PathBuf::from(name)
    };
    (1..MAX_NAMES).map(name).find(|path| !path.exists()).ok_or_else(|| {
        CommandError::new(format_args!(
            "drive {}: too many overlays beside {}",
            drive.drive_id,
            disk.display()
        ))
    })
}

impl<H: Host> Controller<H> {
    /// Lets this microVM, which stands still, go on on its new overlays.
    pub(crate) fn put_overlays(&mut self, plan: &Plan) -> Result<(), CommandError> {
        for (at, drive) in &plan.0 {
            let State::Paused(machine) = &self.state else { break };
            let failed =
                |e: &dyn std::fmt::Display| CommandError::new(format_args!("drive {}: {e}", drive.drive_id));
            let Some(control) = machine.devices().drive(&drive.drive_id).cloned() else { continue };
            self.disks[*at].freeze().map_err(|e| failed(&e))?;
            let replaced = Disk::open(&DiskOptions::of(drive))
                .map_err(|e| failed(&e))
                .and_then(|disk| Ok((disk.clone(), control.replace(disk).map_err(|e| failed(&e))?)));
            match replaced {
                Ok((disk, replaced)) => {
                    self.disks[*at] = disk;
                    self.config.drives[*at] = drive.clone();
                    self.settling.push((drive.drive_id.clone(), replaced));
                }
                Err(error) => {
                    if let Err(lost) = self.disks[*at].thaw() {
                        log::error!("drive {} cannot be written any more: {lost}", drive.drive_id);
                    }
                    return Err(error);
                }
            }
        }
        Ok(())
    }

    /// Waits until the workers have let go of the disks that were replaced.
    pub(crate) fn settle_disks(&mut self) {
        if !matches!(self.state, State::Running(_)) {
            // They let go when they run again.
            return;
        }
        for (drive_id, mut replaced) in self.settling.drain(..) {
            if let Err(still) = replaced.wait(REPLACE_PATIENCE) {
                log::warn!("drive {drive_id}: {still}; it is closed when they have ended");
            }
        }
    }
}
