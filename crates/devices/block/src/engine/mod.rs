//! How bytes move between files and memory: transfers, and the engines that carry them out.
//!
//! A [`Transfer`] is one operation on one file. An [`Engine`] owns it from [`push`](Engine::push) until it comes back as
//! [`Done`], whole or with an error: short reads and writes are continued and interrupted ones repeated inside.
//!
//! # I/O model
//!
//! `push` only notes a transfer, [`submit`](Engine::submit) starts those that were noted, and [`reap`](Engine::reap) gives
//! back those that are over. [`event`](Engine::event) is readable while there is something to reap. What the page
//! cache holds is often over when `submit` returns, so whoever submits reaps before waiting, and goes on while
//! [`has_more`](Engine::has_more).
//!
//! None of them waits for a disk, unless the engine was made for a worker that may: see [`Blocking`].
//!
//! # Error model
//!
//! An error is the kernel's errno for that one transfer. The end of a file before the end of a read is `EIO`: the file is
//! smaller than it was when it was opened. Engines themselves do not fail once they are built.

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
    /// Notes `transfer`; nothing starts before [`submit`](Self::submit).
    fn push(&mut self, transfer: Transfer<T>);

    /// Starts what was noted. What is carried out on this thread may be left for the next call.
    fn submit(&mut self);

    /// Appends to `done` what is over.
    fn reap(&mut self, done: &mut Vec<Done<T>>);

    /// Transfers that were pushed and not yet reaped.
    fn in_flight(&self) -> usize;

    /// Whether `submit` and `reap` have something to do at once, for which no event will come.
    fn has_more(&self) -> bool {
        self.in_flight() > 0
    }

    /// Waits until something is over, unless there is something to do at once or nothing is in flight.
    /// For threads that may block.
    fn wait(&mut self) {}

    /// Readable while there may be something to reap. `None` if all is over when `submit` returns.
    fn event(&self) -> Option<BorrowedFd<'_>> {
        None
    }
}
