//! What a worker decides: who is called when, when all are still, and who is told.
//!
//! Plain state machines without descriptors, threads or tasks, so that a model checker can run these very transitions
//! (`crate::model`). The event_loop holds a [`TaskState`] for each task and a [`WorkerState`] for itself, asks them what to do, and does it.
//!
//! # Invariants
//!
//! - A task is asked to quiesce only when it runs, and to resume only when it does not. It may still be draining then: a pause that
//!   takes too long is undone.
//! - It is [`Phase::Still`] only if it was drained since it ran last. Only then it is given back.
//! - A pause is answered only while it lasts, and only when every task is still.

/// How far a task is in its protocol.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub(crate) enum Phase {
    /// It gets kicks and timers.
    Running,
    /// It was asked to quiesce and has something in flight.
    Draining,
    /// Nothing is in flight.
    Still,
}

/// One task's way through its protocol.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub(crate) struct TaskState {
    phase: Phase,
    /// It could not be attached: it is never called again.
    failed: bool,
    /// Somebody wants it back.
    leaving: bool,
}

/// What became of a task that was drained.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum DrainOutcome {
    /// It stays, still.
    Stays,
    /// It is to be given back.
    Leaves,
}

/// What to do with a task that is wanted back.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum RemoveAction {
    /// Ask it to quiesce.
    Quiesce,
    /// It is draining already.
    Wait,
    /// Give it back.
    Now,
}

impl TaskState {
    /// A task that was just added.
    pub(crate) fn new() -> Self {
        TaskState { phase: Phase::Still, failed: false, leaving: false }
    }

    /// It could not be attached.
    pub(crate) fn fail(&mut self) {
        self.failed = true;
    }

    /// Whether kicks and timers are for it now.
    pub(crate) fn is_running(self) -> bool {
        self.phase == Phase::Running && !self.failed
    }

    /// Whether events of its back end are for it: also while it drains, and when it is still.
    pub(crate) fn hears_events(self) -> bool {
        !self.failed
    }

    pub(crate) fn is_still(self) -> bool {
        self.phase == Phase::Still
    }

    /// It may work. True if it is to be restored.
    pub(crate) fn start(&mut self) -> bool {
        let starts = self.phase != Phase::Running && !self.leaving && !self.failed;
        if starts {
            self.phase = Phase::Running;
        }
        starts
    }

    /// It shall be still. True if it is to be asked to quiesce.
    pub(crate) fn quiesce(&mut self) -> bool {
        let quiesces = self.phase == Phase::Running;
        if quiesces {
            self.phase = Phase::Draining;
        }
        quiesces
    }

    /// Somebody wants it back.
    pub(crate) fn leave(&mut self) -> RemoveAction {
        self.leaving = true;
        match self.phase {
            Phase::Running => RemoveAction::Quiesce,
            Phase::Draining => RemoveAction::Wait,
            Phase::Still => RemoveAction::Now,
        }
    }

    /// It was called, and says whether it is drained. `Some` if that was what it was waited for.
    pub(crate) fn called(&mut self, is_drained: impl FnOnce() -> bool) -> Option<DrainOutcome> {
        if self.phase != Phase::Draining || !is_drained() {
            return None;
        }
        self.phase = Phase::Still;
        Some(if self.leaving { DrainOutcome::Leaves } else { DrainOutcome::Stays })
    }
}

/// Whether a worker's tasks may work.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Hash)]
pub(crate) struct WorkerState {
    paused: bool,
    stopping: bool,
}

impl WorkerState {
    /// All tasks shall be still.
    pub(crate) fn pause(&mut self) {
        self.paused = true;
    }

    /// All tasks shall be still for good, and the worker ends then.
    pub(crate) fn stop(&mut self) {
        self.paused = true;
        self.stopping = true;
    }

    /// All tasks may work. False if the worker is ending.
    pub(crate) fn resume(&mut self) -> bool {
        if !self.stopping {
            self.paused = false;
        }
        !self.stopping
    }

    /// Whether a task that is added may work at once.
    pub(crate) fn lets_work(self) -> bool {
        !self.paused
    }

    /// Whether those who wait for a pause are told now.
    pub(crate) fn is_over(self, mut tasks: impl Iterator<Item = TaskState>) -> bool {
        self.paused && tasks.all(TaskState::is_still)
    }

    /// Whether the worker ends now.
    pub(crate) fn ends(self, mut tasks: impl Iterator<Item = TaskState>) -> bool {
        self.stopping && tasks.all(TaskState::is_still)
    }
}
