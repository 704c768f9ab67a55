//! How other threads speak to a worker.

use std::collections::VecDeque;
use std::sync::atomic::AtomicUsize;
use std::sync::mpsc::SyncSender;
use std::sync::{Arc, Mutex};

use super::Task;
use crate::device::Interrupt;
use sync::EventFd;
use sync::locked;

/// Names a task for as long as its machine lives.
pub(crate) type TaskKey = u64;

/// What a worker is asked to do. A reply that is dropped says that the worker has ended, or that the request was overtaken.
pub(crate) enum Command {
    Add { key: TaskKey, task: Box<dyn Task>, interrupt: Arc<dyn Interrupt> },
    Remove { key: TaskKey, reply: SyncSender<Box<dyn Task>> },
    Pause { reply: SyncSender<()> },
    Resume,
    Stop,
}

/// The commands that wait for a worker, and what others want to know of it.
pub(crate) struct Mailbox {
    /// None once the worker has ended.
    commands: Mutex<Option<VecDeque<Command>>>,
    pub(super) wake: EventFd,
    /// Tasks that it has, or soon will.
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

    /// Leaves a command for the worker; gives it back if the worker has ended.
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

    /// The worker ends: what nobody answered is dropped, and so is what comes.
    pub(super) fn close(&self) -> VecDeque<Command> {
        locked(&self.commands).take().unwrap_or_default()
    }
}
