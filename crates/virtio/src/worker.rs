//! I/O workers: threads named `io N` that run the tasks of devices.
//!
//! # The protocol of a task
//!
//! ```text
//!          add                       quiesce                    resume
//!  caller -----> attach -> resume -> running -----> draining -----------------> running
//!     ^                                                |  is_drained
//!     |  remove: quiesce, drain, then back             v
//!     +-------------------------------------------- drained
//! ```
//!
//! - A task runs on one worker from `add` to `remove`. All calls come from that thread.
//! - [`Task::attach`] registers descriptors and does nothing else. [`Task::resume`] starts work *as
//!   if every queue had been kicked*. `add` calls both (`resume` only when the workers are not
//!   paused).
//! - From [`Task::quiesce`] to [`Task::resume`] the task gets no kick and no timer, and takes no
//!   new request. Other events (completions) are delivered until [`Task::is_drained`], which is
//!   asked after each event of the task.
//! - Draining is asynchronous: the other tasks of the worker run meanwhile.
//! - A removed task is drained, watches nothing, and goes back to the caller.
//!
//! # Rules
//!
//! - A task never blocks. One that must asks for a worker of its own: [`Placement::On`].
//! - A task never panics over guest input.
//! - A task never takes the lock of a transport: a vCPU thread may hold it and wait for the task.
//! - The work of one call is bounded by the size of the queues. A task with more work asks to be
//!   called again ([`Context::reschedule`]), so that the other tasks get their turn.
//!
//! # Cost
//!
//! A kick costs one `epoll_wait` and no read: kick eventfds are watched edge-triggered, and their
//! counters are never reset. An idle worker sleeps. The timer is armed only while a task needs it.

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

/// The parts of a worker, for a worker without a thread.
#[cfg(any(test, feature = "testing"))]
pub(crate) mod testing {
    pub(crate) use super::context::Clock;
    pub(crate) use super::event_loop::EventLoop;
    pub(crate) use super::mailbox::{Command, Mailbox};
}

/// Nanoseconds of the monotonic clock.
pub type Nanos = u64;

/// A task's number for a descriptor that it watches. Unique within the task.
pub type Token = u32;

/// A dedicated worker. It is created before the guest runs: a seccomp filter forbids threads later.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct WorkerId(pub(crate) usize);

/// The worker that a task needs.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Placement {
    /// The shared worker with the fewest tasks.
    Shared,
    /// A dedicated worker, for a task that blocks.
    On(WorkerId),
}

/// The part of a device that runs on a worker: its queues and its backend. For the protocol see the
/// module.
pub trait Task: Send {
    /// Registers the descriptors that the task watches: kicks, and those of the backend.
    ///
    /// After an error the device needs a reset. The task stays on the worker and is not called
    /// again until it is removed.
    fn attach(&mut self, cx: &mut Context<'_>) -> io::Result<()>;

    /// The queue that was registered with `token` by [`Context::watch_kick`] was kicked.
    fn kicked(&mut self, cx: &mut Context<'_>, token: Token);

    /// A descriptor that was registered by [`Context::watch`] is ready.
    fn ready(&mut self, cx: &mut Context<'_>, event: Event);

    /// The timer of [`Context::set_timer`] expired (it is no longer set), or the task asked for
    /// this call by [`Context::reschedule`].
    fn timer(&mut self, _cx: &mut Context<'_>) {}

    /// Take no new requests. Requests in flight complete.
    fn quiesce(&mut self, cx: &mut Context<'_>);

    /// Whether nothing is in flight and all completions are published to the driver.
    fn is_drained(&self) -> bool;

    /// Start or resume work: look at every queue as if it had been kicked, and set the timers.
    fn resume(&mut self, cx: &mut Context<'_>);

    /// The worker that the task needs.
    fn placement(&self) -> Placement {
        Placement::Shared
    }

    /// Ends the task, which is drained and off its worker. It returns its backend to the device.
    fn detach(self: Box<Self>);
}
