//! [`LiveSnapshotJob`]: a snapshot that a fork of this process writes while the guest runs
//! (`"live": true`, an extension).
//!
//! # How
//!
//! The guest is paused for as long as the fork takes. The forked process has the guest's memory as
//! it was, copy-on-write. It writes the snapshot and ends ([`SnapshotWriter`]). It reports its
//! progress through one pipe, and reads from another one: a byte there tells it to stop.
//!
//! # Invariants
//!
//! - One job at a time. Its files get their names when they are complete. A job that is cancelled,
//!   fails or is killed leaves none.
//! - The pages that a Diff would have saved are marked dirty again when the job fails.

use std::io::Read;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::path::Path;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Instant;

use config::{SnapshotCreate, SnapshotJob, SnapshotJobState};
use memory::image::Observer;
use memory::{GuestRam, PageSet};
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::pipe::{PipeFlags, pipe_with};
use serde::{Deserialize, Serialize};
use serde_json::{Value, json};

use crate::CommandError;

/// The writer reports its progress after so many bytes, or a [`STEPS`]th of all if that is more.
const REPORT_EVERY: u64 = 16 << 20;
/// How often the progress of a job is published as an event.
const PUBLISHED_STEPS: u64 = 8;
/// Most reports of progress. Their lines and the last one fit into 4096 bytes, the smallest pipe
/// that the kernel creates (for a user who has many). So a writer whose parent does not read still
/// writes its snapshot, and ends.
const STEPS: u64 = 32;
/// Longest text of an error, in characters of at most four bytes.
const MAX_ERROR: usize = 400;

/// The job, in the microVM's own process.
#[derive(Debug)]
pub(crate) struct LiveSnapshotJob {
    create: SnapshotCreate,
    began: Instant,
    /// How long the guest was paused, in microseconds.
    pause_us: u64,
    lines: std::fs::File,
    /// The beginning of a line whose rest has not arrived.
    partial: Vec<u8>,
    cancel: Option<OwnedFd>,
    progress: (u64, u64),
    end: Option<End>,
    /// The bytes done when the job was last published; `None` once its end was.
    published: Option<u64>,
    /// The pages that count as saved if the job succeeds.
    taken: Option<(GuestRam, PageSet)>,
}

/// How a job ended, and after how long in microseconds.
#[derive(Debug, Clone, PartialEq, Eq)]
enum End {
    Done(u64),
    Cancelled(u64),
    Failed(u64, String),
}

/// A line of the writer: bytes done and in total, or how it ended after how many microseconds.
#[derive(Debug, Serialize, Deserialize)]
enum Line {
    Progress(u64, u64),
    Done(u64),
    Cancelled(u64),
    Failed(u64, String),
}

/// The job's end in the forked process.
#[derive(Debug)]
pub(crate) struct SnapshotWriter {
    lines: OwnedFd,
    cancel: OwnedFd,
    began: Instant,
    reported: AtomicU64,
}

/// A job and its writer, before the fork.
pub(crate) fn pair(create: &SnapshotCreate) -> std::io::Result<(LiveSnapshotJob, SnapshotWriter)> {
    let (lines, to_parent) = pipe_with(PipeFlags::CLOEXEC)?;
    rustix::io::ioctl_fionbio(&lines, true)?;
    let (cancelled, cancel) = pipe_with(PipeFlags::CLOEXEC)?;
    let began = Instant::now();
    let job = LiveSnapshotJob {
        create: create.clone(),
        began,
        pause_us: 0,
        lines: lines.into(),
        partial: Vec::new(),
        cancel: Some(cancel),
        progress: (0, 0),
        end: None,
        published: Some(0),
        taken: None,
    };
    Ok((job, SnapshotWriter { lines: to_parent, cancel: cancelled, began, reported: AtomicU64::new(0) }))
}

impl LiveSnapshotJob {
    /// The job after the fork: the guest was paused for `pause_us` microseconds, and the pages in
    /// `taken` count as saved from now on, unless the job fails.
    pub(crate) fn started(mut self, pause_us: u64, taken: Option<(GuestRam, PageSet)>) -> Self {
        self.pause_us = pause_us;
        self.taken = taken;
        self
    }

    /// Marks the pages that a running job has taken as dirty again. For a fork of the guest, which
    /// does not learn how the job ends.
    pub(crate) fn mark_unsaved(&mut self) {
        if self.is_running()
            && let Some((ram, pages)) = &self.taken
        {
            ram.mark_dirty_again(pages);
        }
    }

    /// Whether the job is still running. Reads the writer's lines.
    pub(crate) fn is_running(&mut self) -> bool {
        self.read_lines();
        self.end.is_none()
    }

    /// Tells the writer to stop.
    pub(crate) fn cancel(&mut self) {
        if let Some(cancel) = self.cancel.take() {
            // The writer may have ended; ignore the error.
            let _ = rustix::io::write(&cancel, b"x");
        }
    }

    /// Readable when the writer has reported something. `None` once the job has ended.
    pub(crate) fn lines_fd(&self) -> Option<BorrowedFd<'_>> {
        self.end.is_none().then(|| self.lines.as_fd())
    }

    /// The job's description if clients that watch the microVM are to get it: each time that
    /// another [`PUBLISHED_STEPS`]th is done, and at its end.
    pub(crate) fn news(&mut self) -> Option<Value> {
        self.read_lines();
        let (done, total) = self.progress;
        let (published, ended) = (self.published?, self.end.is_some());
        if !ended && done.saturating_sub(published) < (total / PUBLISHED_STEPS).max(1) {
            return None;
        }
        self.published = (!ended).then_some(done);
        Some(self.description())
    }

    /// The answer to `GET /snapshot/job`.
    pub(crate) fn describe(&mut self) -> Value {
        self.read_lines();
        self.description()
    }

    /// The job as far as the writer's lines were read.
    pub(crate) fn description(&self) -> Value {
        let (state, elapsed, error) = match &self.end {
            None => (SnapshotJobState::Running, micros(self.began), None),
            Some(End::Done(us)) => (SnapshotJobState::Done, *us, None),
            Some(End::Cancelled(us)) => (SnapshotJobState::Cancelled, *us, None),
            Some(End::Failed(us, error)) => (SnapshotJobState::Failed, *us, Some(error.clone())),
        };
        json!(SnapshotJob {
            state,
            snapshot_path: self.create.snapshot_path.clone(),
            mem_file_path: self.create.mem_file_path.clone(),
            snapshot_type: Some(self.create.snapshot_type),
            bytes_done: self.progress.0,
            bytes_total: self.progress.1,
            pause_us: Some(self.pause_us),
            elapsed_us: elapsed,
            error,
        })
    }

    /// Reads the lines that have arrived.
    fn read_lines(&mut self) {
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

impl SnapshotWriter {
    /// The descriptors that the forked process keeps.
    pub(crate) fn descriptors(&self) -> [BorrowedFd<'_>; 2] {
        [self.lines.as_fd(), self.cancel.as_fd()]
    }

    /// Runs `write`, which writes the snapshot at `path`, and reports how it went. Called in the
    /// forked process.
    pub(crate) fn run(
        self,
        path: &Path,
        write: impl FnOnce(&dyn Observer) -> Result<(), CommandError>,
    ) -> bool {
        let written = write(&self);
        let elapsed = micros(self.began);
        let line = match &written {
            Ok(()) => Line::Done(elapsed),
            Err(_) if self.cancelled() => Line::Cancelled(elapsed),
            Err(error) => Line::Failed(elapsed, error.to_string().chars().take(MAX_ERROR).collect()),
        };
        match &written {
            Ok(()) => log::info!("the live snapshot {} is written", path.display()),
            Err(error) => log::error!("the live snapshot {}: {error}", path.display()),
        }
        self.report(&line);
        written.is_ok()
    }

    fn report(&self, line: &Line) {
        if let Ok(mut text) = serde_json::to_string(line) {
            text.push('\n');
            // The parent may have ended. The snapshot is written all the same.
            let _ = rustix::io::write(&self.lines, text.as_bytes());
        }
    }
}

impl Observer for SnapshotWriter {
    fn progress(&self, done: u64, total: u64) {
        let step = REPORT_EVERY.max(total / STEPS);
        let before = self.reported.load(Ordering::Relaxed);
        if before == 0 || done >= before + step {
            self.reported.store(done.max(1), Ordering::Relaxed);
            self.report(&Line::Progress(done, total));
        }
    }

    fn cancelled(&self) -> bool {
        let now = Timespec { tv_sec: 0, tv_nsec: 0 };
        let mut fds = [PollFd::new(&self.cancel, PollFlags::IN)];
        // A parent that has ended (hang-up) is no reason to stop.
        poll(&mut fds, Some(&now)).is_ok_and(|ready| ready > 0) && fds[0].revents().contains(PollFlags::IN)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn job() -> (LiveSnapshotJob, SnapshotWriter) {
        let create = SnapshotCreate {
            snapshot_path: "s".into(),
            mem_file_path: "m".into(),
            snapshot_type: config::SnapshotType::Full,
            live: true,
            drives: Vec::new(),
        };
        pair(&create).unwrap()
    }

    fn state(job: &mut LiveSnapshotJob) -> Value {
        job.describe()
    }

    #[test]
    fn progress_is_published_in_a_few_steps_and_the_end_once() {
        for (total, step) in [(8_000, 10), (3, 1), (0, 1)] {
            let (mut job, writer) = job();
            let mut published = Vec::new();
            for done in (0..=total).step_by(step) {
                writer.report(&Line::Progress(done, total));
                published.extend(job.news());
            }
            assert!(published.len() <= PUBLISHED_STEPS as usize, "{published:?}");
            assert!(published.iter().all(|job| job["state"] == "Running" && job["bytes_done"] != 0));
            assert!(job.lines_fd().is_some());
            writer.report(&Line::Done(7));
            assert_eq!(job.news().unwrap()["state"], "Done");
            assert!(job.news().is_none() && job.lines_fd().is_none());
        }
    }

    #[test]
    fn job_describes_its_progress_and_its_end() {
        let (mut job, writer) = job();
        assert_eq!(state(&mut job)["state"], "Running");
        writer.progress(1 << 20, 1 << 30);
        assert_eq!(state(&mut job)["bytes_done"], 1 << 20);
        writer.report(&Line::Done(7));
        let end = state(&mut job);
        assert_eq!(
            (&end["state"], &end["elapsed_us"]),
            (&"Done".into(), &7.into()),
            "the time of the end, not of the question"
        );
        assert!(!job.is_running());
    }

    #[test]
    fn writer_that_dies_fails_the_job_and_its_pages_are_dirty() {
        let ram = GuestRam::map(16, config::HugePages::None, true).unwrap();
        let (mut job, writer) = job();
        job.taken = Some((ram.clone(), ram.all_pages()));
        drop(writer);
        assert_eq!(state(&mut job)["state"], "Failed");
        assert_eq!(ram.take_monitor_dirty_pages().unwrap().count(), 4096);
    }

    #[test]
    fn writer_stops_when_cancelled_and_not_when_its_parent_ends() {
        let (mut first, writer) = job();
        assert!(!writer.cancelled());
        first.cancel();
        assert!(writer.cancelled());
        let (second, writer) = job();
        drop(second);
        assert!(!writer.cancelled());
    }

    #[test]
    fn pages_of_a_running_job_are_marked_dirty_for_a_fork() {
        let ram = GuestRam::map(16, config::HugePages::None, true).unwrap();
        let (job, writer) = job();
        let mut job = job.started(0, Some((ram.clone(), ram.all_pages())));
        job.mark_unsaved();
        assert_eq!(ram.take_monitor_dirty_pages().unwrap().count(), 4096);
        writer.report(&Line::Done(1));
        job.mark_unsaved();
        assert_eq!(ram.take_monitor_dirty_pages().unwrap().count(), 0, "it is saved");
    }

    #[test]
    fn writer_never_waits_for_a_parent_that_does_not_read() {
        let (mut job, writer) = job();
        rustix::pipe::fcntl_setpipe_size(&writer.lines, 4096).unwrap();
        let total = 1 << 40;
        for done in (0..=total).step_by(1 << 26) {
            writer.progress(done, total);
        }
        writer.report(&Line::Failed(u64::MAX, "\u{10ffff}".repeat(MAX_ERROR)));
        assert_eq!(state(&mut job)["state"], "Failed");
    }
}
