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

mod clock;
mod context;
mod event_loop;
mod mailbox;
pub(crate) mod phase;
mod pool;
mod task;
#[cfg(test)]
mod tests;

pub use clock::{Nanos, monotonic};
pub use context::{Context, Event, Interest, MAX_TOKEN, Token};
pub use pool::{PauseError, Removal, Removed, TaskHandle, Workers};
pub use task::{Placement, Task, WorkerId};

/// The parts of a worker, for a worker without a thread.
#[cfg(any(test, feature = "testing"))]
pub(crate) mod testing {
    pub(crate) use super::clock::Clock;
    pub(crate) use super::event_loop::EventLoop;
    pub(crate) use super::mailbox::{Command, Mailbox};
}
