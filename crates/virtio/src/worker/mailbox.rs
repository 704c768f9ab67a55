//! The commands of other threads to a worker.

use std::collections::VecDeque;
use std::sync::atomic::AtomicUsize;
use std::sync::mpsc::SyncSender;
use std::sync::{Arc, Mutex};

use super::task::Task;
use crate::interrupt::Interrupt;
use sync::EventFd;
use sync::locked;

/// The id of a task, unique in its machine.
pub(crate) type TaskKey = u64;

/// A command to a worker. A dropped reply channel means that the worker has ended, or that a later
/// command cancelled this one.
pub(crate) enum Command {
    Add { key: TaskKey, task: Box<dyn Task>, interrupt: Arc<dyn Interrupt> },
    Remove { key: TaskKey, reply: SyncSender<Box<dyn Task>> },
    Pause { reply: SyncSender<()> },
    Resume,
    Stop,
}

/// The command queue of a worker.
pub(crate) struct Mailbox {
    /// `None` when the worker has ended.
    commands: Mutex<Option<VecDeque<Command>>>,
    pub(super) wake: EventFd,
    /// The number of its tasks, those of queued `Add` commands included.
    pub(super) load: AtomicUsize,
}

impl Mailbox {
    pub(crate) fn new() -> std::io::Result<Arc<Self>> {
        Ok(Arc::new(Mailbox {
            commands: Mutex::new(Some(VecDeque::new())),
            wake: EventFd::new()?,
            load: AtomicUsize::new(0),
        }))
    }

    /// Queues a command. Returns it if the worker has ended.
    pub(crate) fn post(&self, command: Command) -> Result<(), Command> {
        match locked(&self.commands).as_mut() {
            Some(commands) => commands.push_back(command),
            None => return Err(command),
        }
        self.wake.signal();
        Ok(())
    }

    /// Takes the oldest command.
    pub(super) fn take(&self) -> Option<Command> {
        locked(&self.commands).as_mut().and_then(VecDeque::pop_front)
    }

    /// Closes the queue when the worker ends. Returns the commands that were not handled.
    pub(super) fn close(&self) -> VecDeque<Command> {
        locked(&self.commands).take().unwrap_or_default()
    }
}
