//! The workers of a machine.

use std::io;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::mpsc::{self, Receiver, RecvTimeoutError, TryRecvError};
use std::sync::{Arc, Mutex};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use super::context::Clock;
use super::event_loop::EventLoop;
use super::mailbox::{Command, Mailbox, TaskKey};
use super::{Placement, Task, WorkerId};
use crate::device::Interrupt;
use sync::locked;

/// Stack of a worker, in bytes. Only what is used takes memory.
const STACK: usize = 512 << 10;

/// Called on each worker's thread, with its number, before it does anything: the place for a sandbox.
pub type OnStart = Arc<dyn Fn(usize) + Send + Sync>;

/// How many workers there are and how they work.
#[derive(Clone, Default)]
pub struct WorkersConfig {
    /// Workers that tasks share; at least one is made.
    pub shared: usize,
    /// See [`OnStart`].
    pub on_start: Option<OnStart>,
}

/// All workers of a machine. Clones are the same workers.
///
/// Dropping the last clone tells them to end when their tasks have drained, and does not wait; [`Workers::stop`] waits.
#[derive(Clone)]
pub struct Workers {
    pool: Arc<Pool>,
}

struct Pool {
    config: WorkersConfig,
    workers: Mutex<Vec<Worker>>,
    next_key: AtomicU64,
}

struct Worker {
    mailbox: Arc<Mailbox>,
    shared: bool,
    /// None once joined.
    thread: Option<JoinHandle<()>>,
}

/// A task could not be stilled in time.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error("io worker {worker} still has requests in flight after {waited:?}")]
pub struct PauseError {
    /// The number in the worker's name.
    pub worker: usize,
    /// How long it was waited for.
    pub waited: Duration,
}

impl Workers {
    /// Starts the shared workers.
    pub fn start(config: WorkersConfig) -> io::Result<Self> {
        let pool = Arc::new(Pool { workers: Mutex::new(Vec::new()), next_key: AtomicU64::new(0), config });
        for _ in 0..pool.config.shared.max(1) {
            pool.spawn(true)?;
        }
        Ok(Workers { pool })
    }

    /// One worker, which a test runs on its own thread.
    #[cfg(any(test, feature = "testing"))]
    pub(crate) fn unthreaded(mailbox: Arc<Mailbox>) -> Self {
        let worker = Worker { mailbox, shared: true, thread: None };
        let workers = Mutex::new(vec![worker]);
        let config = WorkersConfig::default();
        Workers { pool: Arc::new(Pool { workers, next_key: AtomicU64::new(1 << 32), config }) }
    }

    /// Starts a worker that only tasks placed [`Placement::On`] it run on.
    pub fn dedicated(&self) -> io::Result<WorkerId> {
        self.pool.spawn(false)
    }

    /// Gives a task to a worker; returns at once. `interrupt` hears of it if the task cannot be attached.
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

    /// Quiesces all tasks and waits until nothing is in flight, for at most `patience`. Tasks that are added from now on stay still.
    ///
    /// On an error the tasks go on draining; [`Workers::resume`] undoes all of it.
    pub fn pause(&self, patience: Duration) -> Result<(), PauseError> {
        let begun = Instant::now();
        let replies: Vec<_> = locked(&self.pool.workers)
            .iter()
            .map(|worker| {
                let (reply, still) = mpsc::sync_channel(1);
                // A worker that has ended has nothing in flight.
                worker.mailbox.post(Command::Pause { reply }).is_ok().then_some(still)
            })
            .collect();
        for (worker, still) in replies.into_iter().enumerate() {
            let Some(still) = still else { continue };
            let left = patience.saturating_sub(begun.elapsed());
            if still.recv_timeout(left) == Err(RecvTimeoutError::Timeout) {
                return Err(PauseError { worker, waited: begun.elapsed() });
            }
        }
        Ok(())
    }

    /// Lets all tasks work again.
    pub fn resume(&self) {
        for worker in locked(&self.pool.workers).iter() {
            // A worker that has ended has nothing to resume.
            let _ = worker.mailbox.post(Command::Resume);
        }
    }

    /// Ends one worker once its tasks have drained, and waits for it.
    pub fn release(&self, worker: WorkerId) {
        let thread = locked(&self.pool.workers).get_mut(worker.0).and_then(|worker| {
            let _ = worker.mailbox.post(Command::Stop);
            worker.thread.take()
        });
        join(thread);
    }

    /// Ends all workers once their tasks have drained, and waits for them. The tasks that they still have are detached.
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
        log::error!("an io worker had panicked");
    }
}

impl Pool {
    fn spawn(&self, shared: bool) -> io::Result<WorkerId> {
        let mut workers = locked(&self.workers);
        let number = workers.len();
        let mailbox = Mailbox::new()?;
        let mut event_loop = EventLoop::new(Arc::clone(&mailbox), Clock::monotonic())?;
        let on_start = self.config.on_start.clone();
        let thread =
            std::thread::Builder::new().name(format!("io {number}")).stack_size(STACK).spawn(move || {
                if let Some(on_start) = on_start {
                    on_start(number);
                }
                event_loop.run();
            })?;
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

/// A task that a worker has. Dropping the handle leaves it there until the worker ends.
pub struct TaskHandle {
    key: TaskKey,
    mailbox: Arc<Mailbox>,
}

impl TaskHandle {
    /// Asks for the task back. Returns at once; the task comes when it has drained.
    pub fn remove(self) -> Removal {
        let (reply, task) = mpsc::sync_channel(1);
        // A worker that has ended detached it.
        let _ = self.mailbox.post(Command::Remove { key: self.key, reply });
        Removal { task }
    }
}

/// A task on its way back from its worker. Dropping it lets the task end by itself.
pub struct Removal {
    task: Receiver<Box<dyn Task>>,
}

/// How far a [`Removal`] is.
pub enum Removed {
    /// Here it is, drained and off its worker.
    Task(Box<dyn Task>),
    /// It still has something in flight.
    NotYet,
    /// Its worker has ended before, and detached it.
    Ended,
}

impl Removal {
    /// Whether it is back. After [`Removed::Task`] the answer is [`Removed::Ended`].
    pub fn poll(&self) -> Removed {
        match self.task.try_recv() {
            Ok(task) => Removed::Task(task),
            Err(TryRecvError::Empty) => Removed::NotYet,
            Err(TryRecvError::Disconnected) => Removed::Ended,
        }
    }

    /// As [`Removal::poll`], but waits up to `patience` for it.
    pub fn wait(&self, patience: Duration) -> Removed {
        match self.task.recv_timeout(patience) {
            Ok(task) => Removed::Task(task),
            Err(RecvTimeoutError::Timeout) => Removed::NotYet,
            Err(RecvTimeoutError::Disconnected) => Removed::Ended,
        }
    }
}
