//! The I/O workers of a machine.

use std::io;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::mpsc::{self, Receiver, RecvTimeoutError, TryRecvError};
use std::sync::{Arc, Mutex};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use super::clock::Clock;
use super::event_loop::EventLoop;
use super::mailbox::{Command, Mailbox, TaskKey};
use super::task::{Placement, Task, WorkerId};
use crate::interrupt::Interrupt;
use sync::locked;

/// The stack of a worker in bytes. Only pages that are used take memory.
const STACK: usize = 512 << 10;

/// All workers of a machine. Clones share them.
///
/// When the last clone is dropped, the workers end after their tasks have drained. The drop does
/// not wait for that; [`Workers::stop`] does.
#[derive(Clone)]
pub struct Workers {
    pool: Arc<Pool>,
}

struct Pool {
    workers: Mutex<Vec<Worker>>,
    next_key: AtomicU64,
}

struct Worker {
    mailbox: Arc<Mailbox>,
    shared: bool,
    /// `None` once joined.
    thread: Option<JoinHandle<()>>,
}

/// A task did not drain in time.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error("io worker {worker}: requests are still in flight after {waited:?}")]
pub struct PauseError {
    /// The number in the worker's name.
    pub worker: usize,
    /// The time that the pause waited.
    pub waited: Duration,
}

impl Workers {
    /// Starts `shared` shared workers; 0 counts as 1.
    pub fn start(shared: usize) -> io::Result<Self> {
        let pool = Arc::new(Pool { workers: Mutex::new(Vec::new()), next_key: AtomicU64::new(0) });
        for _ in 0..shared.max(1) {
            pool.spawn(true)?;
        }
        Ok(Workers { pool })
    }

    /// One worker without a thread, which a test polls.
    #[cfg(any(test, feature = "testing"))]
    pub(crate) fn unthreaded(mailbox: Arc<Mailbox>) -> Self {
        let worker = Worker { mailbox, shared: true, thread: None };
        let workers = Mutex::new(vec![worker]);
        Workers { pool: Arc::new(Pool { workers, next_key: AtomicU64::new(1 << 32) }) }
    }

    /// Starts a worker for the tasks with [`Placement::On`] it.
    pub fn dedicated(&self) -> io::Result<WorkerId> {
        self.pool.spawn(false)
    }

    /// Adds a task to a worker. Returns at once. If the task cannot be attached, its device needs a
    /// reset ([`Interrupt::needs_reset`]).
    pub fn add(&self, task: Box<dyn Task>, interrupt: Arc<dyn Interrupt>) -> TaskHandle {
        let key = self.pool.next_key.fetch_add(1, Ordering::Relaxed);
        let mailbox = self.pool.place(task.placement());
        mailbox.load.fetch_add(1, Ordering::Relaxed);
        if let Err(Command::Add { task, interrupt, .. }) = mailbox.post(Command::Add { key, task, interrupt })
        {
            task.detach();
            interrupt.needs_reset(&"its io worker has ended");
        }
        TaskHandle { key, mailbox }
    }

    /// Quiesces all tasks and waits until nothing is in flight, for at most `timeout`. Tasks that
    /// are added from now on do not run.
    ///
    /// After an error the tasks continue to drain. [`Workers::resume`] undoes the pause in any
    /// case.
    pub fn pause(&self, timeout: Duration) -> Result<(), PauseError> {
        let begun = Instant::now();
        let replies: Vec<_> = locked(&self.pool.workers)
            .iter()
            .map(|worker| {
                let (reply, drained) = mpsc::sync_channel(1);
                // A worker that has ended has nothing in flight.
                worker.mailbox.post(Command::Pause { reply }).is_ok().then_some(drained)
            })
            .collect();
        for (worker, drained) in replies.into_iter().enumerate() {
            let Some(drained) = drained else { continue };
            let left = timeout.saturating_sub(begun.elapsed());
            if drained.recv_timeout(left) == Err(RecvTimeoutError::Timeout) {
                return Err(PauseError { worker, waited: begun.elapsed() });
            }
        }
        Ok(())
    }

    /// Lets all tasks run again.
    pub fn resume(&self) {
        for worker in locked(&self.pool.workers).iter() {
            // A worker that has ended has nothing to resume.
            let _ = worker.mailbox.post(Command::Resume);
        }
    }

    /// Ends a worker after its tasks have drained, and waits for it.
    pub fn release(&self, worker: WorkerId) {
        let thread = locked(&self.pool.workers).get_mut(worker.0).and_then(|worker| {
            let _ = worker.mailbox.post(Command::Stop);
            worker.thread.take()
        });
        join(thread);
    }

    /// Ends all workers after their tasks have drained, and waits for them. Their tasks are
    /// detached.
    pub fn stop(self) {
        let threads: Vec<_> = {
            let mut workers = locked(&self.pool.workers);
            for worker in workers.iter() {
                let _ = worker.mailbox.post(Command::Stop);
            }
            workers.iter_mut().map(|worker| worker.thread.take()).collect()
        };
        threads.into_iter().for_each(join);
    }
}

fn join(thread: Option<JoinHandle<()>>) {
    if let Some(thread) = thread
        && thread.join().is_err()
    {
        log::error!("an io worker panicked");
    }
}

impl Pool {
    fn spawn(&self, shared: bool) -> io::Result<WorkerId> {
        let mut workers = locked(&self.workers);
        let number = workers.len();
        let mailbox = Mailbox::new()?;
        let mut event_loop = EventLoop::new(Arc::clone(&mailbox), Clock::monotonic())?;
        let thread = sync::thread::spawn(format!("io {number}"), Some(STACK), move || event_loop.run())?;
        workers.push(Worker { mailbox, shared, thread: Some(thread) });
        Ok(WorkerId(number))
    }

    fn place(&self, placement: Placement) -> Arc<Mailbox> {
        let workers = locked(&self.workers);
        let worker = match placement {
            Placement::On(WorkerId(number)) => workers.get(number),
            Placement::Shared => None,
        };
        let least = || {
            let shared = workers.iter().filter(|worker| worker.shared);
            shared.min_by_key(|worker| worker.mailbox.load.load(Ordering::Relaxed))
        };
        let worker = worker.or_else(least).expect("there is at least one shared worker");
        Arc::clone(&worker.mailbox)
    }
}

impl Drop for Pool {
    fn drop(&mut self) {
        for worker in locked(&self.workers).iter() {
            let _ = worker.mailbox.post(Command::Stop);
        }
    }
}

/// A task on a worker. If the handle is dropped, the task stays until the worker ends.
pub struct TaskHandle {
    key: TaskKey,
    mailbox: Arc<Mailbox>,
}

impl TaskHandle {
    /// Requests the removal of the task. Returns at once; the task comes back when it has drained.
    pub fn remove(self) -> Removal {
        let (reply, task) = mpsc::sync_channel(1);
        // A worker that has ended detached it.
        let _ = self.mailbox.post(Command::Remove { key: self.key, reply });
        Removal { task }
    }
}

/// The removal of a task. If it is dropped, the task is detached when it has drained.
pub struct Removal {
    task: Receiver<Box<dyn Task>>,
}

/// The progress of a [`Removal`].
pub enum Removed {
    /// The task, drained and off its worker.
    Task(Box<dyn Task>),
    /// Requests are still in flight.
    NotYet,
    /// The worker ended before and detached the task.
    Ended,
}

impl Removal {
    /// Checks whether the task is back. After [`Removed::Task`] the answer is [`Removed::Ended`].
    pub fn poll(&self) -> Removed {
        match self.task.try_recv() {
            Ok(task) => Removed::Task(task),
            Err(TryRecvError::Empty) => Removed::NotYet,
            Err(TryRecvError::Disconnected) => Removed::Ended,
        }
    }

    /// As [`Removal::poll`], but waits for at most `timeout`.
    pub fn wait(&self, timeout: Duration) -> Removed {
        match self.task.recv_timeout(timeout) {
            Ok(task) => Removed::Task(task),
            Err(RecvTimeoutError::Timeout) => Removed::NotYet,
            Err(RecvTimeoutError::Disconnected) => Removed::Ended,
        }
    }
}
