//! Long commands: the part that may wait for the host runs on a thread of its own, and the main
//! thread stays answerable.
//!
//! # How
//!
//! ```text
//! main thread                                    task thread ("task")
//!   Tasks::run(questions, paths, work) --spawns-->  work(&Token)
//!   poll: the task's end                              reads, writes, syncs, waits for a server
//!         requests of API clients                     asks the token at each step whether to stop
//!         a signal that ends the process
//!   <------------------- its result ------------    ends
//! ```
//!
//! The task owns all that it works with (clones of disks and memory, paths, saved state). The
//! microVM stays on the main thread, which answers [`Questions`] from it while the task runs.
//!
//! # Invariants
//!
//! - One task at a time, and no other command is carried out meanwhile. Questions are answered at
//!   once. All other requests wait, and are taken afterwards in the order in which they arrived.
//! - A task is cancelled by a signal that ends the process, and, if it has [`SnapshotPaths`], by
//!   `DELETE /snapshot/job`. A cancelled task stops at its next step of at most a few MiB or one
//!   system call, and undoes what it did. A task that commits something checks its token before,
//!   and its result counts from then on ([`Tasks::run_committing`]).
//! - A signal ends the process in bounded time. A task that has not ended [`CANCEL_TIMEOUT`] after
//!   the signal is stuck in a system call: it is left behind ([`TaskError::Abandoned`]) and ends
//!   with the process. A stuck writer is like one that was killed. A snapshot's files have no name
//!   yet (see [`snapshot::AtomicFile`]) and disappear with it, and a Diff in place is completed by
//!   the next command that reads it. An empty overlay that was created for a load remains. Only a
//!   pause is not left behind: it ends by itself ([`Tasks::run_to_end`]).
//!
//! # Errors
//!
//! [`TaskError`], where there is no result. A panic of the task is one of the main thread.

use std::os::fd::AsFd;
use std::path::PathBuf;
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use config::{SnapshotJob, SnapshotJobState};
use memory::image::Observer;
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use serde_json::json;
use sync::EventFd;

use crate::api::{Request, Requests};
use crate::host::Host;
use crate::token::{CANCEL_TIMEOUT, TaskError, Token};
use crate::{Command, CommandError, Reply};

/// The thread's name.
const THREAD_NAME: &str = "task";

/// What answers questions while a task runs.
pub(crate) trait Questions {
    /// Writes metrics that are due. Returns how long the main thread may wait until the next call;
    /// `None` for any time.
    fn tick(&self) -> Option<Duration> {
        None
    }

    /// Answers a command that changes nothing and is possible in every phase. `None` for all other
    /// commands.
    fn answer(&self, command: &Command) -> Option<Result<Reply, CommandError>>;
}

/// The files of a task that clients see as `/snapshot/job`, and may cancel.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct SnapshotPaths {
    /// The state file.
    pub(crate) snapshot_path: PathBuf,
    /// The memory file, or the socket of its page server.
    pub(crate) mem_file_path: PathBuf,
}

/// Runs tasks. Has what the main thread attends to meanwhile: the process and the API's requests.
#[derive(Debug)]
pub(crate) struct Tasks<H> {
    pub(crate) host: H,
    /// The requests of API clients, if there is an API.
    pub(crate) requests: Option<Requests>,
    left_behind: bool,
}

/// A task that was started.
struct Started<T> {
    thread: JoinHandle<T>,
    /// Readable once the thread has done its work.
    ended: EventFd,
    token: Token,
}

/// Signals its eventfd when it is dropped, by a panic too.
struct Ended(EventFd);

impl Drop for Ended {
    fn drop(&mut self) {
        self.0.signal();
    }
}

impl<T: Send + 'static> Started<T> {
    fn start(work: impl FnOnce(&Token) -> T + Send + 'static) -> std::io::Result<Self> {
        let ended = EventFd::new()?;
        let end = Ended(ended.try_clone()?);
        let token = Token::new()?;
        let of_task = token.clone();
        let thread = sync::thread::spawn(THREAD_NAME, None, move || {
            let _end = end;
            work(&of_task)
        })?;
        Ok(Started { thread, ended, token })
    }
}

impl<H: Host> Tasks<H> {
    /// No task, and no API yet.
    pub(crate) fn new(host: H) -> Self {
        Tasks { host, requests: None, left_behind: false }
    }

    /// Whether a task was left behind, which may still use what it was given. The process is ending
    /// then.
    pub(crate) fn left_behind(&self) -> bool {
        self.left_behind
    }

    /// Runs `work` on a thread of its own, and answers questions until it has ended. Fails if it
    /// was cancelled, even where the work has not noticed.
    pub(crate) fn run<T: Send + 'static>(
        &mut self,
        questions: &dyn Questions,
        paths: Option<&SnapshotPaths>,
        work: impl FnOnce(&Token) -> T + Send + 'static,
    ) -> Result<T, TaskError> {
        self.run_within(Some(CANCEL_TIMEOUT), questions, paths, work)
            .and_then(|(result, cancelled)| if cancelled { Err(TaskError::Cancelled) } else { Ok(result) })
    }

    /// As [`run`](Self::run), for work that commits something that dropping its result does not
    /// undo. The work asks the token before it commits, and its result counts even if it was
    /// cancelled later.
    pub(crate) fn run_committing<T: Send + 'static>(
        &mut self,
        questions: &dyn Questions,
        paths: Option<&SnapshotPaths>,
        work: impl FnOnce(&Token) -> T + Send + 'static,
    ) -> Result<T, TaskError> {
        self.run_within(Some(CANCEL_TIMEOUT), questions, paths, work).map(|(result, _)| result)
    }

    /// As [`run`](Self::run), for work that takes bounded time by itself and must not be left
    /// behind: a signal cancels it, and waits for its end.
    pub(crate) fn run_to_end<T: Send + 'static>(
        &mut self,
        questions: &dyn Questions,
        work: impl FnOnce(&Token) -> T + Send + 'static,
    ) -> Result<T, TaskError> {
        self.run_within(None, questions, None, work).map(|(result, _)| result)
    }

    /// Fails once a signal has asked this process to end. For between two steps of a command.
    pub(crate) fn check_not_ending(&self) -> Result<(), TaskError> {
        let Some(fd) = self.host.asked_to_end() else { return Ok(()) };
        let now = Timespec { tv_sec: 0, tv_nsec: 0 };
        let mut fds = [PollFd::from_borrowed_fd(fd, PollFlags::IN)];
        // If the poll fails, the next step looks again.
        let ending = poll(&mut fds, Some(&now)).is_ok_and(|ready| ready > 0);
        if ending { Err(TaskError::Cancelled) } else { Ok(()) }
    }

    /// Returns the result of the work, and whether it was cancelled before it ended. `limit` is how
    /// long it may take to stop after a signal.
    fn run_within<T: Send + 'static>(
        &mut self,
        limit: Option<Duration>,
        questions: &dyn Questions,
        paths: Option<&SnapshotPaths>,
        work: impl FnOnce(&Token) -> T + Send + 'static,
    ) -> Result<(T, bool), TaskError> {
        let task = Started::start(work).map_err(TaskError::Start)?;
        let responder = Responder { questions, paths, token: &task.token, begun: Instant::now() };
        let mut waiting = Vec::new();
        let has_ended = self.attend(&responder, &task.ended, limit, &mut waiting);
        if let Some(requests) = &self.requests {
            requests.requeue(waiting);
        }
        if !has_ended {
            log::error!("a command did not stop within {} s, and is left behind", CANCEL_TIMEOUT.as_secs());
            self.left_behind = true;
            return Err(TaskError::Abandoned);
        }
        let result = task.thread.join().unwrap_or_else(|panic| std::panic::resume_unwind(panic));
        Ok((result, task.token.cancelled()))
    }

    /// Serves until the task has ended (true), or is to be left behind (false). Requests that have
    /// to wait for its end are added to `waiting`.
    fn attend(
        &self,
        responder: &Responder<'_>,
        ended: &EventFd,
        limit: Option<Duration>,
        waiting: &mut Vec<Request>,
    ) -> bool {
        let (mut is_ending, mut deadline) = (false, None::<Instant>);
        loop {
            // The signal's descriptor stays readable: the event loop reads it.
            let stop = if is_ending { None } else { self.host.asked_to_end() };
            let mut fds = vec![PollFd::new(ended, PollFlags::IN)];
            fds.extend(stop.map(|fd| PollFd::from_borrowed_fd(fd, PollFlags::IN)));
            let stop_at = stop.map(|_| 1);
            fds.extend(self.requests.as_ref().map(|r| PollFd::from_borrowed_fd(r.as_fd(), PollFlags::IN)));
            let left = deadline.map(|deadline| deadline.saturating_duration_since(Instant::now()));
            let wait = left.into_iter().chain(responder.questions.tick()).min();
            let timeout = wait.map(|wait| Timespec::try_from(wait).expect("a few minutes fit"));
            match poll(&mut fds, timeout.as_ref()) {
                Ok(_) | Err(rustix::io::Errno::INTR) => {}
                // The kernel has no memory. The join waits for the task, and nothing is answered.
                Err(_) => return true,
            }
            if !fds[0].revents().is_empty() {
                return true;
            }
            if stop_at.is_some_and(|at| !fds[at].revents().is_empty()) {
                is_ending = true;
                responder.token.cancel();
                deadline = limit.map(|limit| Instant::now() + limit);
            }
            if left.is_some_and(|left| left.is_zero()) {
                return false;
            }
            if let Some(request) = self.requests.as_ref().and_then(Requests::try_recv) {
                match responder.answer(&request.command) {
                    Some(result) => request.reply_to.send(result),
                    None => waiting.push(request),
                }
            }
        }
    }
}

/// Answers questions on the main thread while a task runs.
struct Responder<'a> {
    questions: &'a dyn Questions,
    paths: Option<&'a SnapshotPaths>,
    token: &'a Token,
    begun: Instant,
}

impl Responder<'_> {
    /// The answer to a command that need not wait for the task.
    fn answer(&self, command: &Command) -> Option<Result<Reply, CommandError>> {
        match (command, self.paths) {
            (Command::DescribeJob, Some(paths)) => {
                let (done, total) = self.token.bytes();
                Some(Ok(Reply::Json(json!(SnapshotJob {
                    state: SnapshotJobState::Running,
                    snapshot_path: paths.snapshot_path.clone(),
                    mem_file_path: paths.mem_file_path.clone(),
                    snapshot_type: None,
                    bytes_done: done,
                    bytes_total: total,
                    pause_us: None,
                    elapsed_us: u64::try_from(self.begun.elapsed().as_micros()).unwrap_or(u64::MAX),
                    error: None,
                }))))
            }
            (Command::CancelJob, Some(_)) => {
                self.token.cancel();
                Some(Ok(Reply::Empty))
            }
            // They are about the live snapshot, which can only be asked for after this command.
            (Command::DescribeJob | Command::CancelJob, None) => None,
            (question, _) => self.questions.answer(question),
        }
    }
}

#[cfg(test)]
#[path = "task_tests.rs"]
mod tests;
