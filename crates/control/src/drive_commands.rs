//! What commands do to drives, as far as it waits for the host: opening disks, syncing them, and
//! switching to new overlays.
//!
//! # Errors
//!
//! A drive whose new disk cannot be opened keeps its old one. [`put`] has to close the old disk
//! first, because an overlay is locked while it is open: if that cannot be opened again either, the
//! drive is removed, and the log says so. [`switch_to_overlays`] switches all drives or none.

use std::path::Path;
use std::time::Duration;

use block::DiskSwap;
use block::disk::{Disk, DiskOptions};
use config::{Drive, DriveUpdate};
use machine::devices::limits;
use virtio::worker::monotonic;

use crate::CommandError;
use crate::drives::Drives;
use crate::host::Host;
use crate::microvm::MicroVm;
use crate::overlays::plan::{OverlayPlan, on_overlay};
use crate::reopen::{Reopened, open_or_reopen};
use crate::task::Tasks;

/// How long a change of a drive waits for requests in flight on its old disk.
const SWAP_TIMEOUT: Duration = Duration::from_secs(5);

/// Adds a drive before the start, or replaces the one with its id. Opens its disk.
pub(crate) fn put<H: Host>(
    vm: &mut MicroVm,
    tasks: &mut Tasks<H>,
    drive: &Drive,
) -> Result<(), CommandError> {
    vm.backends.drives.check_put(drive)?;
    let Some(old) = vm.backends.drives.close(&drive.drive_id) else {
        let disk = open(vm, tasks, drive, None)?;
        vm.backends.drives.set(drive.clone(), disk);
        return Ok(());
    };
    match open_or_reopen(drive, &old, |drive| open(vm, tasks, drive, None)) {
        Reopened::New(disk) => {
            vm.backends.drives.set(drive.clone(), disk);
            Ok(())
        }
        Reopened::Old(disk, error) => {
            vm.backends.drives.set(old, disk);
            Err(error)
        }
        Reopened::Nothing { error, lost } => {
            log::error!("{lost}; the drive is removed");
            vm.backends.drives.remove(&drive.drive_id);
            Err(error)
        }
    }
}

/// Opens the disk of `drive` in a task. It comes in the place of `replaces`.
fn open<H: Host>(
    vm: &MicroVm,
    tasks: &mut Tasks<H>,
    drive: &Drive,
    replaces: Option<Disk>,
) -> Result<Disk, CommandError> {
    let (options, locks) = (DiskOptions::of(drive), vm.backends.drives.locks());
    let opened = tasks.run(vm, None, move |_| Disk::open_with(&options, &locks, replaces.as_ref()))?;
    opened.map_err(|error| CommandError::drive(&drive.drive_id, error))
}

/// Changes the disk or the rate limits of a drive of a started guest.
pub(crate) fn patch<H: Host>(
    vm: &mut MicroVm,
    tasks: &mut Tasks<H>,
    update: &DriveUpdate,
) -> Result<(), CommandError> {
    let id = &update.drive_id;
    let (old, old_disk) = vm.backends.drives.get(id)?;
    let control = vm.lifecycle.machine().and_then(|machine| machine.devices().drive(id)).cloned();
    let control = control.ok_or_else(|| CommandError::NoSuchDrive(id.clone()))?;
    if update.is_empty() {
        return Err(CommandError::EmptyDriveUpdate(id.clone()));
    }
    let drive = old.updated(update)?;
    let mut disk = old_disk.clone();
    let mut swaps = Vec::new();
    if update.path_on_host.is_some() || update.overlay.is_some() {
        // An overlay that is written to fits the one disk that it was created on. So the same paths
        // mean the same disk.
        let same = disk.has_overlay() && DiskOptions::of(&drive) == DiskOptions::of(old);
        if same {
            // The disk stays, so unknown contents stay unknown.
            disk.check().map_err(|error| CommandError::drive(id, error))?;
        } else {
            disk = open(vm, tasks, &drive, Some(disk))?;
            let swap =
                control.replace(disk.clone()).map_err(|error| CommandError::DriveSwap(error.into()))?;
            vm.backends.drives.cancel_merge(id);
            swaps.push((id.clone(), swap));
        }
    }
    vm.backends.drives.set(drive, disk);
    wait_for_swaps(vm, tasks, swaps);
    if update.rate_limiter.is_some() {
        control.update_limits(limits(update.rate_limiter.as_ref()), monotonic());
    }
    Ok(())
}

/// Waits for the requests in flight on disks that were replaced, if the guest runs: the workers
/// give an old disk back only then.
pub(crate) fn settle_swaps<H: Host>(vm: &mut MicroVm, tasks: &mut Tasks<H>) {
    if vm.lifecycle.is_running() {
        let swaps = vm.backends.drives.take_swaps();
        wait_for_swaps(vm, tasks, swaps);
    }
}

fn wait_for_swaps<H: Host>(vm: &MicroVm, tasks: &mut Tasks<H>, swaps: Vec<(String, DiskSwap)>) {
    if swaps.is_empty() {
        return;
    }
    let waited = tasks.run(vm, None, move |_| {
        for (drive_id, mut swap) in swaps {
            if let Err(busy) = swap.wait(SWAP_TIMEOUT) {
                log::warn!("drive {drive_id}: {busy}; it is closed when they have ended");
            }
        }
    });
    if let Err(error) = waited {
        log::warn!("the requests in flight on replaced disks are not waited for: {error}");
    }
}

/// Writes back what the guest wrote so far, so that little is left to sync while it is paused.
///
/// If it fails, the contents of the disk are unknown, and the command that needs it fails too.
pub(crate) fn write_back<H: Host>(vm: &MicroVm, tasks: &mut Tasks<H>) -> Result<(), CommandError> {
    let disks = vm.backends.drives.disks_by_id();
    tasks.run(vm, None, move |_| {
        let mut disks = disks.iter();
        disks.try_for_each(|(id, disk)| disk.write_back().map_err(|error| CommandError::drive(id, error)))
    })?
}

/// Switches the drives of a paused guest to the new overlays of `plan`: all of them or, if one
/// cannot be opened, none. Overlays that hold nothing yet (`unwritten`, by drive) are kept instead.
///
/// `bases` are the drives' configurations that the new overlays are put on.
pub(crate) fn switch_to_overlays<H: Host>(
    vm: &mut MicroVm,
    tasks: &mut Tasks<H>,
    plan: &OverlayPlan,
    unwritten: &[bool],
    bases: &[Drive],
) -> Result<(), CommandError> {
    let mut opened = Vec::new();
    for (at, path) in plan.to_switch(unwritten) {
        match open_on_top(vm, tasks, at, &bases[at], path) {
            Ok((drive, disk)) => opened.push((at, drive, disk)),
            // The task that was left behind may still freeze a disk, and a thaw could block this
            // thread.
            Err(error) if tasks.left_behind() => return Err(error),
            Err(error) => {
                let drives = &vm.backends.drives;
                for (at, _, disk) in opened {
                    undo_open_on_top(drives, at, disk);
                }
                return Err(error);
            }
        }
    }
    let mut opened = opened.into_iter();
    while let Some((at, drive, disk)) = opened.next() {
        let Some(machine) = vm.lifecycle.paused() else { break };
        let Some(control) = machine.devices().drive(&drive.drive_id).cloned() else { continue };
        match control.replace(disk.clone()) {
            Ok(swap) => {
                vm.backends.drives.add_swap(drive.drive_id.clone(), swap);
                vm.backends.drives.set(drive, disk);
            }
            Err(error) => {
                let drives = &vm.backends.drives;
                undo_open_on_top(drives, at, disk);
                opened.for_each(|(at, _, disk)| undo_open_on_top(drives, at, disk));
                return Err(CommandError::DriveSwap(error.into()));
            }
        }
    }
    Ok(())
}

/// Freezes the disk of the drive at `at`, and opens a new overlay on it.
fn open_on_top<H: Host>(
    vm: &MicroVm,
    tasks: &mut Tasks<H>,
    at: usize,
    base: &Drive,
    path: &Path,
) -> Result<(Drive, Disk), CommandError> {
    let drive = on_overlay(base, false, path)?;
    let drives = &vm.backends.drives;
    let disk = drives.disk(at).ok_or_else(|| CommandError::NoSuchDrive(drive.drive_id.clone()))?.clone();
    // The file was created, and its directory entry made durable, before the guest was paused.
    let options = DiskOptions { name_is_durable: true, ..DiskOptions::of(&drive) };
    let locks = drives.locks();
    let opened = tasks.run_committing(vm, None, move |_| {
        disk.freeze().and_then(|()| Disk::open_with(&options, &locks, None))
    })?;
    match opened {
        Ok(disk) => Ok((drive, disk)),
        Err(error) => {
            thaw(drives, at);
            Err(CommandError::drive(&drive.drive_id, error))
        }
    }
}

/// Undoes [`open_on_top`].
fn undo_open_on_top(drives: &Drives, at: usize, on_top: Disk) {
    // It has the base's lock.
    drop(on_top);
    thaw(drives, at);
}

fn thaw(drives: &Drives, at: usize) {
    let drive = drives.iter().nth(at);
    if let Some((drive, Err(lost))) = drive.map(|(drive, disk)| (drive, disk.thaw())) {
        log::error!("drive {}: it cannot be written any more: {lost}", drive.drive_id);
    }
}
