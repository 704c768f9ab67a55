//! The end of the disks when the process ends in order: overlays are closed, so that they hold on
//! any host what was written to them.
//!
//! The end waits for a disk only for a limited time. An overlay that cannot be closed in time is
//! left as a killed monitor leaves it: what was flushed is not lost, and the rest is lost only if
//! the host goes down.

use std::sync::mpsc;
use std::time::{Duration, Instant};

use machine::machine::Machine;

use crate::drives::Drives;
use crate::microvm::MicroVm;

/// Closes the overlays of a guest that runs, is paused or was never started. For the end of the
/// process: nothing is taken from the queues of the guest's devices any more.
///
/// Waits at most `limit` for all of them together. Disks without an overlay need no close: what the
/// guest did not flush is the kernel's to write, as of any file.
pub(crate) fn close_disks(vm: &MicroVm, limit: Duration) {
    // A machine that was lost may still write.
    if vm.lifecycle.is_stopped() {
        return;
    }
    let drives = &vm.backends.drives;
    report_unknown_contents(drives);
    if !drives.iter().any(|(_, disk)| disk.has_overlay()) {
        return;
    }
    let begun = Instant::now();
    let devices = vm.lifecycle.machine().map(Machine::devices);
    // Half of it for requests in flight: a disk that hangs must not keep others from being closed.
    if let Some(Err(busy)) = devices.map(|devices| devices.quiesce(limit / 2)) {
        log::warn!("{busy}");
    }
    let (reply, replies) = mpsc::channel();
    let mut left: Vec<String> = Vec::new();
    for (drive, disk) in drives.iter() {
        if !disk.has_overlay() || disk.check().is_err() {
            continue;
        }
        let id = drive.drive_id.clone();
        let control = devices.and_then(|devices| devices.drive(&id));
        left.push(id.clone());
        if control.is_some_and(|control| !control.is_quiesced()) {
            continue;
        }
        let (disk, reply) = (disk.clone(), reply.clone());
        // The waiter may have timed out; ignore the send error.
        let close = move || drop(reply.send((id, disk.close())));
        // On a thread of its own, because it may hang. The process ends without it then.
        if sync::thread::spawn("io close", None, close.clone()).is_err() {
            close();
        }
    }
    drop(reply);
    while let Ok((id, closed)) = replies.recv_timeout(limit.saturating_sub(begun.elapsed())) {
        left.retain(|other| *other != id);
        if let Err(error) = closed {
            log::error!("drive {id}: {error}");
        }
    }
    for id in left {
        log::error!(
            "drive {id}: its overlay could not be closed in time; writes that were not flushed may be lost if the host goes down"
        );
    }
}

/// Logs the disks whose contents are unknown, also those without an overlay: the next user of such
/// a disk has to know it.
fn report_unknown_contents(drives: &Drives) {
    for (drive, disk) in drives.iter() {
        if let Err(unknown) = disk.check() {
            log::error!("drive {}: {unknown}", drive.drive_id);
        }
    }
}
