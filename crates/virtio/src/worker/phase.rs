//! The state machines of tasks and of their worker: which calls are due, and when a pause is done.
//!
//! They have no descriptors, threads or tasks, so that a model checker can run these transitions
//! (`crate::model`). The event loop has a [`TaskState`] for each task and a [`WorkerState`] for
//! itself. It asks them what to do, and does it.
//!
//! # Invariants
//!
//! - A task is asked to quiesce only while it runs, and to resume only while it does not. It may
//!   still be draining then: a pause that takes too long is undone.
//! - A task is [`Phase::Quiesced`] only if it was drained since it last ran. Only then it is given
//!   back.
//! - A pause is answered only while it lasts, and only when every task is drained.

/// The phase of a task in its protocol.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub(crate) enum Phase {
    /// It gets kicks and timers.
    Running,
    /// It was asked to quiesce and has requests in flight.
    Draining,
    /// Nothing is in flight.
    Quiesced,
}

/// The state of one task.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub(crate) struct TaskState {
    phase: Phase,
    /// `attach` failed: the task is not called again.
    failed: bool,
    /// Its removal was requested.
    removing: bool,
}

/// What happens to a task that has drained.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum DrainOutcome {
    /// It stays on the worker.
    Stays,
    /// It is given back to the caller that removes it.
    Leaves,
}

/// What to do with a task whose removal was requested.
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
    /// The state of a task that was just added.
    pub(crate) fn new() -> Self {
        TaskState { phase: Phase::Quiesced, failed: false, removing: false }
    }

    /// `attach` failed.
    pub(crate) fn fail(&mut self) {
        self.failed = true;
    }

    /// Whether it gets kicks and timers now.
    pub(crate) fn is_running(self) -> bool {
        self.phase == Phase::Running && !self.failed
    }

    /// Whether it gets events of its backend: also while it drains, and when it is drained.
    pub(crate) fn gets_backend_events(self) -> bool {
        !self.failed
    }

    pub(crate) fn is_quiesced(self) -> bool {
        self.phase == Phase::Quiesced
    }

    /// Lets it run. Returns whether the task must be resumed.
    pub(crate) fn start(&mut self) -> bool {
        let starts = self.phase != Phase::Running && !self.removing && !self.failed;
        if starts {
            self.phase = Phase::Running;
        }
        starts
    }

    /// Makes it drain. Returns whether the task must be asked to quiesce.
    pub(crate) fn quiesce(&mut self) -> bool {
        let quiesces = self.phase == Phase::Running;
        if quiesces {
            self.phase = Phase::Draining;
        }
        quiesces
    }

    /// Records that the removal of the task is requested.
    pub(crate) fn request_removal(&mut self) -> RemoveAction {
        self.removing = true;
        match self.phase {
            Phase::Running => RemoveAction::Quiesce,
            Phase::Draining => RemoveAction::Wait,
            Phase::Quiesced => RemoveAction::Now,
        }
    }

    /// Follows each call of the task. `Some` if it was draining and is drained now.
    pub(crate) fn called(&mut self, is_drained: impl FnOnce() -> bool) -> Option<DrainOutcome> {
        if self.phase != Phase::Draining || !is_drained() {
            return None;
        }
        self.phase = Phase::Quiesced;
        Some(if self.removing { DrainOutcome::Leaves } else { DrainOutcome::Stays })
    }
}

/// Whether the tasks of a worker may run.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Hash)]
pub(crate) struct WorkerState {
    paused: bool,
    stopping: bool,
}

impl WorkerState {
    /// Pauses all tasks.
    pub(crate) fn pause(&mut self) {
        self.paused = true;
    }

    /// Pauses all tasks for good; the worker ends when they are drained.
    pub(crate) fn stop(&mut self) {
        self.paused = true;
        self.stopping = true;
    }

    /// Lets all tasks run. Returns false if the worker is ending.
    pub(crate) fn resume(&mut self) -> bool {
        if !self.stopping {
            self.paused = false;
        }
        !self.stopping
    }

    /// Whether an added task may run at once.
    pub(crate) fn may_run(self) -> bool {
        !self.paused
    }

    /// Whether a pause is complete.
    pub(crate) fn pause_is_complete(self, mut tasks: impl Iterator<Item = TaskState>) -> bool {
        self.paused && tasks.all(TaskState::is_quiesced)
    }

    /// Whether the worker ends now: it is stopped and all tasks are drained.
    pub(crate) fn ends(self, mut tasks: impl Iterator<Item = TaskState>) -> bool {
        self.stopping && tasks.all(TaskState::is_quiesced)
    }
}
