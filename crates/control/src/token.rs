//! [`Token`]: how the main thread cancels a task, and learns its progress.

use std::os::fd::{AsFd, BorrowedFd};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::Duration;

use memory::image::Observer;
use sync::EventFd;

/// How long a task may take to stop after a signal has asked the process to end.
pub(crate) const CANCEL_TIMEOUT: Duration = Duration::from_secs(2);

/// Why a task has no result.
#[derive(Debug, thiserror::Error)]
pub enum TaskError {
    /// The host is out of threads or descriptors. Nothing was done.
    #[error("cannot start a thread for this command: {0}")]
    Start(#[source] std::io::Error),
    /// The task was cancelled. Dropping its result undid what it did.
    #[error("the command was cancelled")]
    Cancelled,
    /// The process ends, and the task did not stop in time.
    #[error(
        "the command was cancelled: the microVM is ending, and the host did not answer within {} s",
        CANCEL_TIMEOUT.as_secs()
    )]
    Abandoned,
}

/// The cancellation and the progress of one task. Clones are the same token.
#[derive(Debug, Clone)]
pub(crate) struct Token(Arc<Shared>);

#[derive(Debug)]
struct Shared {
    cancelled: AtomicBool,
    /// Readable once the task is cancelled, for a task that waits for a descriptor.
    stop: EventFd,
    done: AtomicU64,
    total: AtomicU64,
}

impl Token {
    pub(crate) fn new() -> std::io::Result<Self> {
        Ok(Token(Arc::new(Shared {
            cancelled: AtomicBool::new(false),
            stop: EventFd::new()?,
            done: AtomicU64::new(0),
            total: AtomicU64::new(0),
        })))
    }

    /// Tells the task to stop.
    pub(crate) fn cancel(&self) {
        self.0.cancelled.store(true, Ordering::Release);
        self.0.stop.signal();
    }

    /// Fails once the task is cancelled. For between two steps that do not check it themselves.
    pub(crate) fn check(&self) -> Result<(), TaskError> {
        if self.cancelled() { Err(TaskError::Cancelled) } else { Ok(()) }
    }

    /// The bytes done and the bytes in total that the task reported last.
    pub(crate) fn bytes(&self) -> (u64, u64) {
        (self.0.done.load(Ordering::Relaxed), self.0.total.load(Ordering::Relaxed))
    }
}

impl AsFd for Token {
    /// Readable once the task is cancelled.
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
