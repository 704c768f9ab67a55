//! Io workers: threads named `io N` that run devices' tasks.
//!
//! # The protocol of a task
//!
//! ```text
//!          add                       quiesce                    resume
//!  caller -----> attach -> resume -> running -----> draining -----------------> running
//!     ^                                                |  is_drained
//!     |  remove: quiesce, drain, then back             v
//!     +--------------------------------------------- still
//! ```
//!
//! - A task runs on one worker from `add` to `remove`; all calls come from that thread, one at a time.
//! - [`Task::attach`] registers descriptors and does nothing else. [`Task::resume`] starts work *as if everything
//!   had been kicked*: it looks at every queue. Both are called on `add` (`resume` only once the workers are not paused).
//! - From [`Task::quiesce`] to [`Task::resume`] no kick and no timer is delivered; a task takes no new request, and other
//!   events (completions) go on until [`Task::is_drained`]. It is asked after each event of the task.
//! - Draining is asynchronous: other tasks of the worker go on meanwhile.
//! - A removed task is still, watches nothing any more, and goes back to the caller.
//!
//! # Rules
//!
//! A task never blocks (one that must, asks for a worker of its own: [`Placement::On`]), never panics over what a guest says,
//! and never takes the lock of a transport: a vCPU thread may be waiting for the task with that lock held. What a guest may make
//! a task do in one call is bounded by the size of its queues; a task that has more to do asks to be called again
//! ([`Context::reschedule`]) so that others get their turn.
//!
//! # Cost
//!
//! A kick is one `epoll_wait` and no read: kicks are watched edge-triggered and their counters are never reset. A worker with nothing
//! to do sleeps; the timer is armed only while a task asks for it.

mod context;
mod event_loop;
mod mailbox;
pub(crate) mod phase;
mod pool;
#[cfg(test)]
mod tests;

use std::io;

pub use context::{Context, Event, Interest, MAX_TOKEN, monotonic};
pub use pool::{OnStart, PauseError, Removal, Removed, TaskHandle, Workers, WorkersConfig};

/// The parts of a worker, for one without a thread.
#[cfg(any(test, feature = "testing"))]
pub(crate) mod testing {
    pub(crate) use super::context::Clock;
    pub(crate) use super::event_loop::EventLoop;
    pub(crate) use super::mailbox::{Command, Mailbox};
}

/// Nanoseconds of the monotonic clock.
pub type Nanos = u64;

/// A task's own name for a descriptor that it watches. Unique within the task.
pub type Token = u32;

/// A dedicated worker, made before the guest runs (threads cannot be made later, under the sandbox).
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct WorkerId(pub(crate) usize);

/// Where a task wants to run.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Placement {
    /// On any of the shared workers: the one with the fewest tasks.
    Shared,
    /// On this worker, which the owner of the machine made for it: for tasks that block.
    On(WorkerId),
}

/// Work that a device does on an io worker: its queues and its back end. See the module for the protocol.
pub trait Task: Send {
    /// Registers what the task watches: kicks, and descriptors of the back end.
    ///
    /// An error makes the device need a reset; the task stays with the worker, silent, until it is removed.
    fn attach(&mut self, cx: &mut Context<'_>) -> io::Result<()>;

    /// The queue that was registered with `token` by [`Context::watch_kick`] was kicked.
    fn kicked(&mut self, cx: &mut Context<'_>, token: Token);

    /// A descriptor that was registered by [`Context::watch`] is ready.
    fn ready(&mut self, cx: &mut Context<'_>, event: Event);

    /// The time that was set by [`Context::set_timer`] has come (it is not set any more), or [`Context::reschedule`] is due.
    fn timer(&mut self, _cx: &mut Context<'_>) {}

    /// Take no new request from now on. What is in flight completes.
    fn quiesce(&mut self, cx: &mut Context<'_>);

    /// Whether nothing is in flight and all that completed was published to the driver.
    fn is_drained(&self) -> bool;

    /// Work (again): look at every queue as if it had been kicked, and set timers that are still needed.
    fn resume(&mut self, cx: &mut Context<'_>);

    /// Where to run.
    fn placement(&self) -> Placement {
        Placement::Shared
    }

    /// The task is at its end: it is off its worker and still. Puts its back end where its device finds it again.
    fn detach(self: Box<Self>);
}
