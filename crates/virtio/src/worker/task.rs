//! The [`Task`] trait: the part of a device that runs on a worker.

use std::io;

use super::context::{Context, Event, Token};

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
