//! The synchronous engine: `preadv` and `pwritev` on a thread of its own, one transfer after the other.
//!
//! For kernels without `io_uring`, and for those who ask for it, on workers that have other things to do. The worker that pushes and reaps never waits for the
//! disk; this thread does. It ends with the engine, after what was started.

use std::collections::VecDeque;
use std::fmt;
use std::fs::File;
use std::io;
use std::mem::ManuallyDrop;
use std::os::fd::{AsFd, BorrowedFd};
use std::sync::{Arc, Condvar, Mutex, MutexGuard};
use std::thread::JoinHandle;

use super::Engine;
use super::blocking::carry_out;
use super::transfer::{Done, Transfer};
use crate::creator_pid::Owner;
use sync::EventFd;
use sync::locked;

/// The front of the engine: what the worker holds.
#[derive(Debug)]
pub(crate) struct SyncEngine<T: Send + 'static> {
    owner: Owner,
    shared: Arc<Shared<T>>,
    /// Not dropped in a fork, where there is no such thread.
    thread: ManuallyDrop<Option<JoinHandle<()>>>,
    noted: Vec<Transfer<T>>,
    in_flight: usize,
}

#[derive(Debug)]
struct Shared<T> {
    queues: Mutex<Queues<T>>,
    /// Signalled when `queues` got something to start, or `stop`.
    work: Condvar,
    /// Signalled when `queues` got something that is over.
    over: Condvar,
    /// Readable while `queues.done` is not empty.
    event: EventFd,
}

#[derive(Debug)]
struct Queues<T> {
    start: VecDeque<Transfer<T>>,
    done: Vec<Done<T>>,
    stop: bool,
}

impl<T> Shared<T> {
    fn queues(&self) -> MutexGuard<'_, Queues<T>> {
        locked(&self.queues)
    }
}

impl<T: Send + 'static> SyncEngine<T> {
    /// Starts the thread, which keeps `files` open; a transfer's file is an index into them.
    pub(crate) fn new(files: Vec<Arc<File>>) -> io::Result<Self> {
        let event = EventFd::new()?;
        let shared = Arc::new(Shared {
            queues: Mutex::new(Queues { start: VecDeque::new(), done: Vec::new(), stop: false }),
            work: Condvar::new(),
            over: Condvar::new(),
            event,
        });
        let thread = std::thread::Builder::new().name("io sync".into()).spawn({
            let shared = Arc::clone(&shared);
            move || run(&shared, &files)
        })?;
        let thread = ManuallyDrop::new(Some(thread));
        Ok(SyncEngine { owner: Owner::here(), shared, thread, noted: Vec::new(), in_flight: 0 })
    }
}

impl<T: fmt::Debug + Send + 'static> Engine<T> for SyncEngine<T> {
    fn push(&mut self, transfer: Transfer<T>) {
        self.noted.push(transfer);
        self.in_flight += 1;
    }

    fn submit(&mut self) {
        if !self.noted.is_empty() {
            self.shared.queues().start.extend(self.noted.drain(..));
            self.shared.work.notify_one();
        }
    }

    fn reap(&mut self, done: &mut Vec<Done<T>>) {
        let mut queues = self.shared.queues();
        if !queues.done.is_empty() {
            // Under the lock, so that the event is set again for what comes later.
            self.shared.event.take();
            self.in_flight -= queues.done.len();
            done.append(&mut queues.done);
        }
    }

    fn in_flight(&self) -> usize {
        self.in_flight
    }

    fn has_more(&self) -> bool {
        !self.noted.is_empty()
    }

    fn wait(&mut self) {
        self.submit();
        let mut queues = self.shared.queues();
        while queues.done.is_empty() && self.in_flight > 0 {
            queues = self.shared.over.wait(queues).expect("the engine's thread does not panic");
        }
    }

    fn event(&self) -> Option<BorrowedFd<'_>> {
        Some(self.shared.event.as_fd())
    }
}

impl<T: Send + 'static> Drop for SyncEngine<T> {
    fn drop(&mut self) {
        if !self.owner.is_here() {
            // In a fork. The share that the thread had of `shared` is never given back, so no descriptor is closed either.
            return;
        }
        self.shared.queues().stop = true;
        self.shared.work.notify_one();
        if let Some(thread) = self.thread.take() {
            thread.join().expect("the engine's thread does not panic");
        }
    }
}

/// The thread: takes what is to start until it is told to stop and nothing is left.
fn run<T>(shared: &Shared<T>, files: &[Arc<File>]) {
    let mut queues = shared.queues();
    loop {
        if let Some(mut transfer) = queues.start.pop_front() {
            drop(queues);
            let result = carry_out(&mut transfer, files);
            queues = shared.queues();
            queues.done.push(transfer.finish(result));
            if queues.done.len() == 1 {
                shared.event.signal();
            }
            shared.over.notify_one();
        } else if queues.stop {
            return;
        } else {
            queues = shared.work.wait(queues).expect("the engine does not panic");
        }
    }
}
