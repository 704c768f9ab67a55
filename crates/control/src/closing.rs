//! The end of the disks, when the process ends in order: overlays are closed, so that they hold on any host what was written to them.
//!
//! The end waits for a disk only so long. What cannot be closed in time is left as a killed monitor leaves it: nothing that was
//! flushed is lost, and nothing else as long as the host is not started anew.

use std::sync::mpsc;
use std::thread;
use std::time::{Duration, Instant};

use block::disk::Disk;

use crate::controller::State;
use crate::{Controller, Host};

impl<H: Host> Controller<H> {
    /// Closes the overlays, of a guest that runs, stands still or never was. For the end of the process: nothing is taken from the queues of the
    /// guest's devices any more. Waits at most `patience` for all of them together.
    ///
    /// Disks without an overlay have what was written to them already; what the guest did not flush is the kernel's to write, as of any file.
    pub fn close_disks(&self, patience: Duration) {
        // Of a machine that was lost nobody knows what it still does.
        if matches!(self.state, State::Lost) {
            return;
        }
        self.report_unknown_disks();
        if !self.disks.iter().any(Disk::has_overlay) {
            return;
        }
        let begun = Instant::now();
        // Half of it for requests in flight: a disk that hangs must not keep others from being closed.
        if let Some(Err(busy)) = self.machine().map(|machine| machine.devices().still(patience / 2)) {
            log::warn!("{busy}");
        }
        let (reply, replies) = mpsc::channel();
        let mut left: Vec<String> = Vec::new();
        for (drive, disk) in self.config.drives.iter().zip(&self.disks) {
            if !disk.has_overlay() || disk.check().is_err() {
                continue;
            }
            let id = drive.drive_id.clone();
            let control = self.machine().and_then(|machine| machine.devices().drive(&id));
            left.push(id.clone());
            if control.is_some_and(|control| !control.is_quiesced()) {
                continue;
            }
            let (disk, reply) = (disk.clone(), reply.clone());
            // Who gave up waiting does not need the answer.
            let close = move || drop(reply.send((id, disk.close())));
            // On a thread of its own, which may hang: then the process ends without it.
            let thread = thread::Builder::new().name("io close".into());
            if thread.spawn(close.clone()).is_err() {
                close();
            }
        }
        drop(reply);
        while let Ok((id, closed)) = replies.recv_timeout(patience.saturating_sub(begun.elapsed())) {
            left.retain(|other| *other != id);
            if let Err(error) = closed {
                log::error!("drive {id}: {error}");
            }
        }
        for id in left {
            log::error!(
                "drive {id}: its overlay could not be closed in time; what was not flushed may be lost if the host goes down"
            );
        }
    }

    /// Says which disks hold nobody knows what: they cannot be closed, and those without an overlay are not, but whoever uses them next has to know.
    fn report_unknown_disks(&self) {
        for (drive, disk) in self.config.drives.iter().zip(&self.disks) {
            if let Err(unknown) = disk.check() {
                log::error!("drive {}: {unknown}", drive.drive_id);
            }
        }
    }
}
