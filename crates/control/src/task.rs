//! Long commands: the part that may wait for the host runs on a thread of its own, and the main
//! thread stays answerable.
//!
//! # How
//!
//! ```text
//! main thread                                    task thread ("task")
//!   Controller::task(kind, work) --- spawns --->   work(&Token)
//!   poll: the task's end                             reads, writes, syncs, waits for a page server
//!         requests of API clients                    asks the token at each step whether to stop
//!         a signal that ends the process
//!   <------------------- its result ------------   ends
//! ```
//!
//! The task owns all that it works with (clones of disks and memory, paths, saved state). It never
//! has the [`Controller`]: that stays on the main thread, which answers questions from it
//! ([`Controller::answer`]) while the task runs.
//!
//! # Invariants
//!
//! - One task at a time, and no other command is carried out meanwhile. Questions are answered at
//!   once. All other requests wait, and are taken afterwards in the order in which they arrived.
//! - A task is cancelled by a signal that ends the process, and, if it has a [`Job`], by `DELETE
//!   /snapshot/job`. A cancelled task stops at its next step of at most a few MiB or one system
//!   call, and undoes what it did: its command is an error, and everything is as before.
//! - A signal ends the process in bounded time. A task that has not ended [`CANCEL_TIMEOUT`] after
//!   the signal is stuck in a system call; it is left behind ([`TaskError::Abandoned`]) and ends
//!   with the process. A stuck writer is like one that was killed: a snapshot's files have
//!   no name yet (see [`snapshot::AtomicFile`]) and go with it, and a Diff in place is completed by the
//!   next command that reads it. An empty overlay that was made for a load stays behind.
//!
//! # Errors
//!
//! [`TaskError`], where there is no result: the host has no thread, or the task was left behind. A
//! panic of the task is one of the main thread.

use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::thread::{self, JoinHandle};
use std::time::{Duration, Instant};

use memory::image::Observer;
use rustix::event::{EventfdFlags, PollFd, PollFlags, Timespec, eventfd, poll};
use serde_json::json;

use crate::api::Request;
use crate::controller::{Controller, Host};
use crate::{Command, CommandError, Reply};

/// How long a task may take to stop once the process is to end.
pub(crate) const CANCEL_TIMEOUT: Duration = Duration::from_secs(2);

/// The thread's name.
const THREAD_NAME: &str = "task";

/// Tells a task to stop, and the main thread how far the task is. Clones are the same token.
#[derive(Debug, Clone)]
pub(crate) struct Token(Arc<Shared>);

#[derive(Debug)]
struct Shared {
    cancelled: AtomicBool,
    /// Readable once the task is to stop, for one that waits for a descriptor.
    stop: OwnedFd,
    done: AtomicU64,
    total: AtomicU64,
}

impl Token {
    pub(crate) fn new() -> std::io::Result<Self> {
        let stop = eventfd(0, EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK)?;
        let (done, total) = (AtomicU64::new(0), AtomicU64::new(0));
        Ok(Token(Arc::new(Shared { cancelled: AtomicBool::new(false), stop, done, total })))
    }

    pub(crate) fn cancel(&self) {
        self.0.cancelled.store(true, Ordering::Release);
        // A counter far below its limit takes it.
        let _ = rustix::io::write(&self.0.stop, &1_u64.to_ne_bytes());
    }

    /// An error if the task is to stop: for between two steps that cannot be told to stop
    /// themselves.
    pub(crate) fn check(&self) -> Result<(), CommandError> {
        if self.cancelled() { Err(CommandError::new("the command was cancelled")) } else { Ok(()) }
    }
}

impl AsFd for Token {
    /// Readable once the task is to stop.
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.0.stop.as_fd()
    }
}

impl Observer for Token {
    fn progress(&self, done: u64, total: u64) {
        self.0.done.store(done, Ordering::Relaxed);
        self.0.total.store(total, Ordering::Relaxed);
    }

    fn cancelled(&self) -> bool {
        self.0.cancelled.load(Ordering::Acquire)
    }
}

/// What clients see of a task as `/snapshot/job`, and may cancel.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Job {
    /// The state file.
    pub(crate) snapshot_path: PathBuf,
    /// The memory file, or the socket of its page server.
    pub(crate) mem_file_path: PathBuf,
}

/// Why a task has no result.
#[derive(Debug, thiserror::Error)]
pub(crate) enum TaskError {
    /// The host is out of threads or descriptors; nothing was done.
    #[error("cannot start a thread for this command: {0}")]
    Start(#[source] std::io::Error),
    /// The task was cancelled. What it returned is dropped: its command has done nothing.
    #[error("the command was cancelled")]
    Cancelled,
    /// The process ends, and the task did not stop in time.
    #[error("the command was cancelled: the microVM is ending, and the host did not answer within {} s", CANCEL_TIMEOUT.as_secs())]
    Abandoned,
}

impl From<TaskError> for CommandError {
    fn from(error: TaskError) -> CommandError {
        CommandError::new(error)
    }
}

/// A task that was started.
struct Running<T> {
    thread: JoinHandle<T>,
    /// Readable once the thread has done its work.
    ended: OwnedFd,
    token: Token,
}

/// Writes to its descriptor when it is dropped, by a panic too.
struct Ended(OwnedFd);

impl Drop for Ended {
    fn drop(&mut self) {
        // A counter that is 0 takes it.
        let _ = rustix::io::write(&self.0, &1_u64.to_ne_bytes());
    }
}

impl<T: Send + 'static> Running<T> {
    fn start(work: impl FnOnce(&Token) -> T + Send + 'static) -> std::io::Result<Self> {
        let ended = eventfd(0, EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK)?;
        let end = Ended(ended.try_clone()?);
        let token = Token::new()?;
        let given = token.clone();
        let thread = thread::Builder::new().name(THREAD_NAME.into()).spawn(move || {
            let _end = end;
            work(&given)
        })?;
        Ok(Running { thread, ended, token })
    }
}

impl<H: Host> Controller<H> {
    /// Runs `work` on a thread of its own, and answers questions until it has ended. If it was
    /// cancelled meanwhile, that is the result, whether or not the work has noticed.
    pub(crate) fn task<T: Send + 'static>(
        &mut self,
        job: Option<&Job>,
        work: impl FnOnce(&Token) -> T + Send + 'static,
    ) -> Result<T, TaskError> {
        self.run_task(job, Some(CANCEL_TIMEOUT), work)
            .and_then(|(result, cancelled)| if cancelled { Err(TaskError::Cancelled) } else { Ok(result) })
    }

    /// The same for work that changes something that its end does not undo. It asks the token itself
    /// before that, and its result counts.
    pub(crate) fn task_that_commits<T: Send + 'static>(
        &mut self,
        job: Option<&Job>,
        work: impl FnOnce(&Token) -> T + Send + 'static,
    ) -> Result<T, TaskError> {
        self.run_task(job, Some(CANCEL_TIMEOUT), work).map(|(result, _)| result)
    }

    /// The same for work that takes bounded time by itself and must not be left behind: a signal
    /// cancels it, and waits for its end.
    pub(crate) fn task_to_the_end<T: Send + 'static>(
        &mut self,
        work: impl FnOnce(&Token) -> T + Send + 'static,
    ) -> Result<T, TaskError> {
        self.run_task(None, None, work).map(|(result, _)| result)
    }

    /// Fails once a signal has asked this process to end: for between two steps of a command.
    pub(crate) fn check_not_ending(&self) -> Result<(), TaskError> {
        let Some(fd) = self.host.asked_to_end() else { return Ok(()) };
        let now = Timespec { tv_sec: 0, tv_nsec: 0 };
        let mut fds = [PollFd::from_borrowed_fd(fd, PollFlags::IN)];
        // A poll that fails tells nothing: the next step looks again.
        let ending = poll(&mut fds, Some(&now)).is_ok_and(|ready| ready > 0);
        if ending { Err(TaskError::Cancelled) } else { Ok(()) }
    }

    /// What the work returns, and whether it was cancelled by its end.
    fn run_task<T: Send + 'static>(
        &mut self,
        job: Option<&Job>,
        limit: Option<Duration>,
        work: impl FnOnce(&Token) -> T + Send + 'static,
    ) -> Result<(T, bool), TaskError> {
        let running = Running::start(work).map_err(TaskError::Start)?;
        let mut waiting = Vec::new();
        let has_ended = self.attend(job, limit, &running, &mut waiting);
        if let Some(requests) = &self.requests {
            requests.put_back(waiting);
        }
        if !has_ended {
            log::error!("a command did not stop within {} s, and is left behind", CANCEL_TIMEOUT.as_secs());
            self.left_behind = true;
            return Err(TaskError::Abandoned);
        }
        let result = running.thread.join().unwrap_or_else(|panic| std::panic::resume_unwind(panic));
        Ok((result, running.token.cancelled()))
    }

    /// Serves until the task has ended, which is true, or is to be left behind. Requests that have
    /// to wait are `waiting` then.
    fn attend<T>(
        &self,
        job: Option<&Job>,
        limit: Option<Duration>,
        running: &Running<T>,
        waiting: &mut Vec<Request>,
    ) -> bool {
        let Running { ended, token, .. } = running;
        let begun = Instant::now();
        let (mut is_ending, mut deadline) = (false, None::<Instant>);
        loop {
            // The signal's descriptor stays readable: the event loop reads it.
            let stop = if is_ending { None } else { self.host.asked_to_end() };
            let mut fds = vec![PollFd::new(ended, PollFlags::IN)];
            fds.extend(stop.map(|fd| PollFd::from_borrowed_fd(fd, PollFlags::IN)));
            let stop_at = stop.map(|_| 1);
            fds.extend(self.requests.as_ref().map(|r| PollFd::from_borrowed_fd(r.as_fd(), PollFlags::IN)));
            let left = deadline.map(|deadline| deadline.saturating_duration_since(Instant::now()));
            let timeout = left.map(|left| Timespec::try_from(left).expect("a few seconds fit"));
            match poll(&mut fds, timeout.as_ref()) {
                Ok(_) | Err(rustix::io::Errno::INTR) => {}
                // The kernel has no memory: wait for the end and nothing else.
                Err(_) => return true,
            }
            if !fds[0].revents().is_empty() {
                return true;
            }
            if stop_at.is_some_and(|at| !fds[at].revents().is_empty()) {
                is_ending = true;
                token.cancel();
                deadline = limit.map(|limit| Instant::now() + limit);
            }
            if left.is_some_and(|left| left.is_zero()) {
                return false;
            }
            if let Some(request) = self.requests.as_ref().and_then(crate::api::Requests::try_recv) {
                match self.answer_meanwhile(&request.command, job, token, begun) {
                    Some(result) => request.reply_to.send(result),
                    None => waiting.push(request),
                }
            }
        }
    }

    /// The answer to a command that need not wait for the task.
    fn answer_meanwhile(
        &self,
        command: &Command,
        job: Option<&Job>,
        token: &Token,
        begun: Instant,
    ) -> Option<Result<Reply, CommandError>> {
        match (command, job) {
            (Command::DescribeJob, Some(job)) => Some(Ok(Reply::Json(json!({
                "state": "Running",
                "snapshot_path": job.snapshot_path,
                "mem_file_path": job.mem_file_path,
                "bytes_done": token.0.done.load(Ordering::Relaxed),
                "bytes_total": token.0.total.load(Ordering::Relaxed),
                "elapsed_us": u64::try_from(begun.elapsed().as_micros()).unwrap_or(u64::MAX),
            })))),
            (Command::CancelJob, Some(_)) => {
                token.cancel();
                Some(Ok(Reply::Empty))
            }
            // A live snapshot's, which is written meanwhile: asking it takes the controller.
            (Command::DescribeJob | Command::CancelJob, None) => None,
            (question, _) => self.answer(question),
        }
    }
}

#[cfg(test)]
#[path = "task_tests.rs"]
mod tests;
