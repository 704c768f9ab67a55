//! The synchronous engine: `preadv` and `pwritev` on a thread of its own, one transfer after the other.
//!
//! For kernels without `io_uring`, and for those who ask for it. The worker that pushes and reaps never waits for the
//! disk; this thread does. It ends with the engine, after what was started.
//!
//! # Where unsafe is
//!
//! This is a leaf module that hands guest memory to the kernel: `preadv` and `pwritev` take addresses.
#![expect(unsafe_code, reason = "preadv and pwritev take the addresses of guest memory")]

use std::collections::VecDeque;
use std::fs::File;
use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};
use std::sync::{Arc, Condvar, Mutex, MutexGuard};
use std::thread::JoinHandle;

use rustix::event::EventfdFlags;
use rustix::fs::FallocateFlags;
use rustix::io::Errno;

use super::engine::{Done, Op, Progress, Transfer};

/// The front of the engine: what the worker holds.
#[derive(Debug)]
pub(super) struct SyncEngine<T: Send + 'static> {
    shared: Arc<Shared<T>>,
    thread: Option<JoinHandle<()>>,
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
    event: OwnedFd,
}

#[derive(Debug)]
struct Queues<T> {
    start: VecDeque<Transfer<T>>,
    done: Vec<Done<T>>,
    stop: bool,
}

impl<T> Shared<T> {
    fn queues(&self) -> MutexGuard<'_, Queues<T>> {
        self.queues.lock().expect("the engine's thread does not panic")
    }
}

impl<T: Send + 'static> SyncEngine<T> {
    /// Starts the thread, which keeps `files` open; a transfer's file is an index into them.
    pub(super) fn new(files: Vec<Arc<File>>) -> io::Result<Self> {
        let event = rustix::event::eventfd(0, EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK)?;
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
        Ok(SyncEngine { shared, thread: Some(thread), noted: Vec::new(), in_flight: 0 })
    }

    pub(super) fn push(&mut self, transfer: Transfer<T>) {
        self.noted.push(transfer);
        self.in_flight += 1;
    }

    pub(super) fn submit(&mut self) {
        if !self.noted.is_empty() {
            self.shared.queues().start.extend(self.noted.drain(..));
            self.shared.work.notify_one();
        }
    }

    pub(super) fn reap(&mut self, done: &mut Vec<Done<T>>) {
        let mut queues = self.shared.queues();
        if !queues.done.is_empty() {
            // Under the lock, so that the event is set again for what comes later.
            let mut count = [0; 8];
            let _ = rustix::io::read(&self.shared.event, &mut count);
            self.in_flight -= queues.done.len();
            done.append(&mut queues.done);
        }
    }

    pub(super) fn in_flight(&self) -> usize {
        self.in_flight
    }

    pub(super) fn wait(&mut self) {
        self.submit();
        let mut queues = self.shared.queues();
        while queues.done.is_empty() && self.in_flight > 0 {
            queues = self.shared.over.wait(queues).expect("the engine's thread does not panic");
        }
    }

    pub(super) fn fd(&self) -> BorrowedFd<'_> {
        self.shared.event.as_fd()
    }
}

impl<T: Send + 'static> Drop for SyncEngine<T> {
    fn drop(&mut self) {
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
                // The counter is read together with `done`, so it cannot be full.
                let _ = rustix::io::write(&shared.event, &1u64.to_ne_bytes());
            }
            shared.over.notify_one();
        } else if queues.stop {
            return;
        } else {
            queues = shared.work.wait(queues).expect("the engine does not panic");
        }
    }
}

/// Does all of one transfer.
fn carry_out<T>(transfer: &mut Transfer<T>, files: &[Arc<File>]) -> Result<(), Errno> {
    let file = &*files[usize::from(transfer.file())];
    loop {
        let result = match transfer.op() {
            Op::Read | Op::Write => read_or_write(transfer, file),
            Op::Sync => errno_of(rustix::fs::fdatasync(file)),
            Op::PunchHole => {
                let mode = FallocateFlags::PUNCH_HOLE | FallocateFlags::KEEP_SIZE;
                errno_of(rustix::fs::fallocate(file, mode, transfer.offset(), transfer.left()))
            }
            Op::ZeroRange => {
                let mode = FallocateFlags::ZERO_RANGE | FallocateFlags::KEEP_SIZE;
                errno_of(rustix::fs::fallocate(file, mode, transfer.offset(), transfer.left()))
            }
        };
        if let Progress::Over(result) = transfer.advance(result) {
            return result;
        }
    }
}

fn errno_of(result: Result<(), Errno>) -> i32 {
    result.map_or_else(|errno| -errno.raw_os_error(), |()| 0)
}

/// One `preadv` or `pwritev`: the count, or a negative errno.
fn read_or_write<T>(transfer: &Transfer<T>, file: &File) -> i32 {
    let segments = transfer.segments();
    let iov = segments.as_ptr().cast::<libc::iovec>();
    let count = segments.len() as i32;
    let offset = transfer.offset() as i64;
    let moved = if transfer.op() == Op::Read {
        // SAFETY: `Segment` has the layout of `iovec`. A transfer's segments are valid while it lives, and those of a read
        // are guest RAM, which no Rust reference points into (invariant of `Transfer`).
        unsafe { libc::preadv(file.as_raw_fd(), iov, count, offset) }
    } else {
        // SAFETY: `Segment` has the layout of `iovec`. A transfer's segments are valid while it lives; they are only read.
        unsafe { libc::pwritev(file.as_raw_fd(), iov, count, offset) }
    };
    match i32::try_from(moved) {
        Ok(-1) => -io::Error::last_os_error().raw_os_error().unwrap_or(libc::EIO),
        Ok(moved) => moved,
        // More than the kernel moves at once (2^31 - 4096).
        Err(_) => -libc::EIO,
    }
}
