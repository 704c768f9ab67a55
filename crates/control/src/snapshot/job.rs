//! A snapshot that a fork of this process writes while the guest runs on (`"live": true`, an extension).
//!
//! # How
//!
//! The machine stands still for as long as a fork takes. The fork has the guest's memory as it was, copy-on-write, and nothing else to do
//! than to write it and end. It says how far it is through a pipe; closing the other pipe with a byte in it tells it to stop.
//!
//! # Invariants
//!
//! - One job at a time. Its files appear when they are whole; a job that is cancelled, fails or is killed leaves none.
//! - What a Diff would have saved is put back when its job fails.

use std::io::Read;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Instant;

use config::SnapshotCreate;
use memory::image::Observer;
use memory::{GuestRam, PageSet};
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::pipe::{PipeFlags, pipe_with};
use serde::{Deserialize, Serialize};
use serde_json::json;

use super::create::Picture;
use crate::Reply;

/// The fork says how far it is whenever so many more bytes are written, or a [`STEPS`]th of all.
const REPORT_EVERY: u64 = 16 << 20;
/// Most steps. Their lines and the last one fit into the smallest pipe that the kernel gives a user who has many, of 4096 bytes: so a fork
/// that nobody listens to writes its snapshot all the same, and ends.
const STEPS: u64 = 32;
/// Longest text of an error, in characters of at most four bytes.
const MAX_ERROR: usize = 400;

/// A job, as the microVM's own process knows it.
#[derive(Debug)]
pub(crate) struct Job {
    create: SnapshotCreate,
    began: Instant,
    /// How long the guest stood still, in microseconds.
    pause_us: u64,
    lines: std::fs::File,
    /// What of a line has come.
    partial: Vec<u8>,
    cancel: Option<OwnedFd>,
    progress: (u64, u64),
    end: Option<End>,
    /// Pages that count as saved if it succeeds.
    taken: Option<(GuestRam, PageSet)>,
}

/// How a job ended, and after how long in microseconds.
#[derive(Debug, Clone, PartialEq, Eq)]
enum End {
    Done(u64),
    Cancelled(u64),
    Failed(u64, String),
}

/// What the fork says: how far it is, or how it ended and after how long in microseconds.
#[derive(Debug, Serialize, Deserialize)]
enum Line {
    Progress(u64, u64),
    Done(u64),
    Cancelled(u64),
    Failed(u64, String),
}

/// The fork's ends.
#[derive(Debug)]
pub(crate) struct Worker {
    lines: OwnedFd,
    cancel: OwnedFd,
    began: Instant,
    reported: AtomicU64,
}

/// A job and its fork's ends, not begun yet.
pub(crate) fn pair(create: &SnapshotCreate) -> std::io::Result<(Job, Worker)> {
    let (lines, to_parent) = pipe_with(PipeFlags::CLOEXEC)?;
    rustix::io::ioctl_fionbio(&lines, true)?;
    let (cancelled, cancel) = pipe_with(PipeFlags::CLOEXEC)?;
    let began = Instant::now();
    let job = Job {
        create: create.clone(),
        began,
        pause_us: 0,
        lines: lines.into(),
        partial: Vec::new(),
        cancel: Some(cancel),
        progress: (0, 0),
        end: None,
        taken: None,
    };
    Ok((job, Worker { lines: to_parent, cancel: cancelled, began, reported: AtomicU64::new(0) }))
}

impl Job {
    /// Says how long the guest stood still.
    pub(crate) fn set_pause(&mut self, pause_us: u64) {
        self.pause_us = pause_us;
    }

    /// These pages count as saved from here on, unless it fails.
    pub(crate) fn has_taken(&mut self, ram: GuestRam, pages: PageSet) {
        self.taken = Some((ram, pages));
    }

    /// Lets the pages that it has taken count as not saved, if it goes on: a fork of the guest does not learn how it ends.
    pub(crate) fn count_as_unsaved(&mut self) {
        if self.is_running()
            && let Some((ram, pages)) = &self.taken
        {
            ram.mark_dirty_again(pages);
        }
    }

    /// Whether it goes on. Takes in what the fork has said.
    pub(crate) fn is_running(&mut self) -> bool {
        self.take_in();
        self.end.is_none()
    }

    /// Tells the fork to stop.
    pub(crate) fn cancel(&mut self) {
        if let Some(cancel) = self.cancel.take() {
            // A fork that has ended does not listen.
            let _ = rustix::io::write(&cancel, b"x");
        }
    }

    /// What the user is told.
    pub(crate) fn describe(&mut self) -> Reply {
        self.take_in();
        let (state, elapsed, error) = match &self.end {
            None => ("Running", micros(self.began), None),
            Some(End::Done(us)) => ("Done", *us, None),
            Some(End::Cancelled(us)) => ("Cancelled", *us, None),
            Some(End::Failed(us, error)) => ("Failed", *us, Some(error)),
        };
        let mut description = json!({
            "state": state,
            "snapshot_path": self.create.snapshot_path,
            "mem_file_path": self.create.mem_file_path,
            "snapshot_type": self.create.snapshot_type,
            "bytes_done": self.progress.0,
            "bytes_total": self.progress.1,
            "pause_us": self.pause_us,
            "elapsed_us": elapsed,
        });
        if let Some(error) = error {
            description["error"] = json!(error);
        }
        Reply::Json(description)
    }

    fn take_in(&mut self) {
        if self.end.is_some() {
            return;
        }
        let mut buffer = [0; 4096];
        let ended = loop {
            match self.lines.read(&mut buffer) {
                Ok(0) => break true,
                Ok(count) => self.partial.extend_from_slice(&buffer[..count]),
                Err(e) if e.kind() == std::io::ErrorKind::Interrupted => {}
                Err(e) => break e.kind() != std::io::ErrorKind::WouldBlock,
            }
        };
        let whole = self.partial.iter().rposition(|byte| *byte == b'\n').map_or(0, |at| at + 1);
        let lines: Vec<u8> = self.partial.drain(..whole).collect();
        for line in lines.split(|byte| *byte == b'\n') {
            match serde_json::from_slice(line) {
                Ok(Line::Progress(done, total)) => self.progress = (done, total),
                Ok(Line::Done(elapsed)) => {
                    self.progress.0 = self.progress.1;
                    self.end = Some(End::Done(elapsed));
                }
                Ok(Line::Cancelled(elapsed)) => self.end = Some(End::Cancelled(elapsed)),
                Ok(Line::Failed(elapsed, error)) => self.end = Some(End::Failed(elapsed, error)),
                Err(_) => {}
            }
        }
        if ended && self.end.is_none() {
            self.end = Some(End::Failed(micros(self.began), "its process ended before it was done".into()));
        }
        match (&self.end, self.taken.take()) {
            (Some(End::Cancelled(_) | End::Failed(..)), Some((ram, pages))) => ram.mark_dirty_again(&pages),
            (None, taken) => self.taken = taken,
            _ => {}
        }
    }
}

fn micros(since: Instant) -> u64 {
    u64::try_from(since.elapsed().as_micros()).unwrap_or(u64::MAX)
}

impl Worker {
    /// The descriptors that the fork keeps.
    pub(crate) fn descriptors(&self) -> [BorrowedFd<'_>; 2] {
        [self.lines.as_fd(), self.cancel.as_fd()]
    }

    /// Writes the snapshot, and says how it went. Runs in the fork.
    pub(crate) fn run(self, picture: &Picture, ram: &GuestRam, create: &SnapshotCreate) -> bool {
        let written = picture.write_and_commit(ram, create, &self);
        let elapsed = micros(self.began);
        let line = match &written {
            Ok(()) => Line::Done(elapsed),
            Err(_) if self.cancelled() => Line::Cancelled(elapsed),
            Err(error) => Line::Failed(elapsed, error.to_string().chars().take(MAX_ERROR).collect()),
        };
        match &written {
            Ok(()) => log::info!("the live snapshot {} is written", create.snapshot_path.display()),
            Err(error) => log::error!("the live snapshot {}: {error}", create.snapshot_path.display()),
        }
        self.say(&line);
        written.is_ok()
    }

    fn say(&self, line: &Line) {
        if let Ok(mut text) = serde_json::to_string(line) {
            text.push('\n');
            // A parent that is gone does not wait; the snapshot is written all the same.
            let _ = rustix::io::write(&self.lines, text.as_bytes());
        }
    }
}

impl Observer for Worker {
    fn progress(&self, done: u64, total: u64) {
        let step = REPORT_EVERY.max(total / STEPS);
        let before = self.reported.load(Ordering::Relaxed);
        if before == 0 || done >= before + step {
            self.reported.store(done.max(1), Ordering::Relaxed);
            self.say(&Line::Progress(done, total));
        }
    }

    fn cancelled(&self) -> bool {
        let now = Timespec { tv_sec: 0, tv_nsec: 0 };
        let mut fds = [PollFd::new(&self.cancel, PollFlags::IN)];
        // A parent that is gone (hang-up) is no reason to stop.
        poll(&mut fds, Some(&now)).is_ok_and(|ready| ready > 0) && fds[0].revents().contains(PollFlags::IN)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn job() -> (Job, Worker) {
        let create = SnapshotCreate {
            snapshot_path: "s".into(),
            mem_file_path: "m".into(),
            snapshot_type: config::SnapshotType::Full,
            live: true,
            drives: Vec::new(),
        };
        pair(&create).unwrap()
    }

    fn state(job: &mut Job) -> serde_json::Value {
        let Reply::Json(description) = job.describe() else { panic!("no description") };
        description
    }

    #[test]
    fn a_job_tells_how_far_it_is_and_how_it_ends() {
        let (mut job, worker) = job();
        assert_eq!(state(&mut job)["state"], "Running");
        worker.progress(1 << 20, 1 << 30);
        assert_eq!(state(&mut job)["bytes_done"], 1 << 20);
        worker.say(&Line::Done(7));
        let end = state(&mut job);
        assert_eq!(
            (&end["state"], &end["elapsed_us"]),
            (&"Done".into(), &7.into()),
            "when it ended, not when it was asked"
        );
        assert!(!job.is_running());
    }

    #[test]
    fn a_process_that_ends_without_a_word_has_failed_and_its_pages_are_put_back() {
        let ram = GuestRam::map(16, config::HugePages::None, true).unwrap();
        let (mut job, worker) = job();
        job.taken = Some((ram.clone(), ram.all_pages()));
        drop(worker);
        assert_eq!(state(&mut job)["state"], "Failed");
        assert_eq!(ram.take_monitor_dirty_pages().unwrap().count(), 4096);
    }

    #[test]
    fn cancelling_is_seen_and_a_parent_that_ends_is_not_taken_for_it() {
        let (mut first, worker) = job();
        assert!(!worker.cancelled());
        first.cancel();
        assert!(worker.cancelled());
        let (second, worker) = job();
        drop(second);
        assert!(!worker.cancelled());
    }

    #[test]
    fn a_fork_of_the_guest_counts_what_a_job_has_taken_as_unsaved() {
        let ram = GuestRam::map(16, config::HugePages::None, true).unwrap();
        let (mut job, worker) = job();
        job.has_taken(ram.clone(), ram.all_pages());
        job.count_as_unsaved();
        assert_eq!(ram.take_monitor_dirty_pages().unwrap().count(), 4096);
        worker.say(&Line::Done(1));
        job.count_as_unsaved();
        assert_eq!(ram.take_monitor_dirty_pages().unwrap().count(), 0, "it is saved");
    }

    #[test]
    fn a_parent_that_does_not_look_does_not_hold_up_the_writer_however_small_the_pipe() {
        let (mut job, worker) = job();
        rustix::pipe::fcntl_setpipe_size(&worker.lines, 4096).unwrap();
        let total = 1 << 40;
        for done in (0..=total).step_by(1 << 26) {
            worker.progress(done, total);
        }
        worker.say(&Line::Failed(u64::MAX, "\u{10ffff}".repeat(MAX_ERROR)));
        assert_eq!(state(&mut job)["state"], "Failed");
    }
}
