//! Engines: they carry out transfers between files and memory.
//!
//! A [`Transfer`] is one operation on one file. An [`Engine`] owns it from [`push`](Engine::push)
//! until it is returned as [`Done`], complete or with an error. Short reads and writes are
//! continued, and interrupted ones repeated, by the engine.
//!
//! | engine             | carries transfers out                     | `io_engine`          |
//! |--------------------|-------------------------------------------|----------------------|
//! | [`Uring`]          | in the kernel; some on the calling thread | `Async`, the default |
//! | [`BlockingEngine`] | on the calling thread, which may block    | `Sync`               |
//!
//! [`BlockingEngine`] needs a dedicated worker. [`Uring`] serves a disk on any worker.
//!
//! # I/O model
//!
//! `push` queues a transfer, [`submit`](Engine::submit) starts the queued ones, and
//! [`reap`](Engine::reap) returns those that are complete. [`event`](Engine::event) is readable
//! while there is something to reap. Transfers from the page cache are often complete when `submit`
//! returns. So the caller reaps before it waits, and repeats while [`has_more`](Engine::has_more).
//!
//! An engine never blocks on the disk, unless it was built with [`Blocking::Allowed`].
//!
//! # Error model
//!
//! The error of a transfer is the kernel's errno. A read past the end of the file is `EIO`: the
//! file was truncated after it was opened. Engines do not fail once they are built.

mod blocking;
#[cfg(any(test, feature = "testing"))]
mod draining_uring;
mod transfer;
mod uring;

use std::fmt;
use std::os::fd::BorrowedFd;

pub(crate) use blocking::BlockingEngine;
#[cfg(test)]
pub(crate) use blocking::carry_out;
#[cfg(any(test, feature = "testing"))]
pub(crate) use draining_uring::DrainingUring;
pub use transfer::Blocking;
#[cfg(test)]
pub(crate) use transfer::Op;
pub(crate) use transfer::{Done, MAX_ZEROS, Transfer};
pub(crate) use uring::Uring;
pub use uring::UringError;

/// Carries out transfers, each tagged with a `T`.
pub(crate) trait Engine<T>: fmt::Debug + Send {
    /// Queues `transfer`. Nothing starts before [`submit`](Self::submit).
    fn push(&mut self, transfer: Transfer<T>);

    /// Starts queued transfers. Some of those that run on this thread may be left for the next
    /// call.
    fn submit(&mut self);

    /// Appends the completed transfers to `done`.
    fn reap(&mut self, done: &mut Vec<Done<T>>);

    /// Transfers that were pushed and not yet reaped.
    fn in_flight(&self) -> usize;

    /// Whether `submit` and `reap` have work for which no event will come.
    fn has_more(&self) -> bool {
        self.in_flight() > 0
    }

    /// Waits until a transfer is complete, unless the engine [has more](Self::has_more) or nothing
    /// is in flight. Blocks.
    fn wait(&mut self) {}

    /// Readable while there may be something to reap. `None` for an engine that completes
    /// everything in `submit`.
    fn event(&self) -> Option<BorrowedFd<'_>> {
        None
    }
}
