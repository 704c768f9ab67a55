//! Operations on a microVM that are timed and counted: pauses, snapshots, forks.

use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use config::{SnapshotType, VmState};
use sync::{Counter, Latency};

use super::report::{Group, Value};
use crate::Command;

/// An operation of which `latencies_us` has the last duration. A live snapshot is none: it
/// continues after its command.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Operation {
    CreateFull,
    CreateDiff,
    Load,
    Pause,
    Resume,
}

/// The operations, with the names of their durations as the client and as the monitor saw them, in
/// the order of a line.
const OPERATIONS: [(Operation, &str, &str); 5] = [
    (Operation::CreateFull, "full_create_snapshot", "vmm_full_create_snapshot"),
    (Operation::CreateDiff, "diff_create_snapshot", "vmm_diff_create_snapshot"),
    (Operation::Load, "load_snapshot", "vmm_load_snapshot"),
    (Operation::Pause, "pause_vm", "vmm_pause_vm"),
    (Operation::Resume, "resume_vm", "vmm_resume_vm"),
];

impl Operation {
    /// The operation that `command` asks for.
    pub(crate) fn of(command: &Command) -> Option<Self> {
        match command {
            Command::CreateSnapshot(create) if create.live => None,
            Command::CreateSnapshot(create) => Some(match create.snapshot_type {
                SnapshotType::Full => Operation::CreateFull,
                SnapshotType::Diff => Operation::CreateDiff,
            }),
            Command::LoadSnapshot(_) => Some(Operation::Load),
            Command::SetVmState(VmState::Paused) => Some(Operation::Pause),
            Command::SetVmState(VmState::Resumed) => Some(Operation::Resume),
            _ => None,
        }
    }
}

impl Operation {
    /// Firecracker's name of the operation in the log.
    pub(crate) fn name_in_log(self) -> &'static str {
        match self {
            Operation::CreateFull => "create full snapshot",
            Operation::CreateDiff => "create diff snapshot",
            Operation::Load => "load snapshot",
            Operation::Pause => "pause vm",
            Operation::Resume => "resume vm",
        }
    }
}

/// The last duration of each operation that succeeded, in microseconds; 0 if there was none.
#[derive(Debug, Default)]
pub(crate) struct Durations([AtomicU64; OPERATIONS.len()]);

impl Durations {
    /// Sets the duration of an operation that succeeded.
    pub(crate) fn set(&self, operation: Operation, took: Duration) {
        let micros = u64::try_from(took.as_micros()).unwrap_or(u64::MAX);
        self.0[operation as usize].store(micros, Ordering::Relaxed);
    }

    fn get(&self, at: usize) -> Value {
        Value::Micros(self.0[at].load(Ordering::Relaxed))
    }
}

/// The group `latencies_us`: durations as clients saw them, and without the way to and from them.
pub(super) fn latencies(of_clients: &Durations, of_monitor: &Durations) -> Group {
    let clients = OPERATIONS.iter().enumerate().map(|(at, names)| (names.1, of_clients.get(at)));
    let monitors = OPERATIONS.iter().enumerate().map(|(at, names)| (names.2, of_monitor.get(at)));
    Group::new("latencies_us", clients.chain(monitors).collect())
}

/// What the main thread counts and times.
#[derive(Debug, Default)]
pub(crate) struct OperationStats {
    /// Operations on the main thread.
    pub(crate) durations: Durations,
    /// Forks that returned children.
    pub(crate) forks: Counter,
    /// Forks that failed.
    pub(crate) fork_fails: Counter,
    /// Children that started.
    pub(crate) children_started: Counter,
    /// Children that did not start, or did not say so in time.
    pub(crate) children_failed: Counter,
    /// Pauses of the guest for a fork.
    pub(crate) fork_pauses: Latency,
    /// Live snapshots that were begun.
    pub(crate) live_snapshots: Counter,
    /// Pauses of the guest for a live snapshot.
    pub(crate) live_snapshot_pauses: Latency,
}

impl OperationStats {
    /// The groups of operations that Firecracker does not have.
    pub(super) fn own_groups(&self) -> [Group; 2] {
        [
            Group::new(
                "fork",
                vec![
                    ("count", Value::Count(self.forks.get())),
                    ("fails", Value::Count(self.fork_fails.get())),
                    ("children_started_count", Value::Count(self.children_started.get())),
                    ("children_fails", Value::Count(self.children_failed.get())),
                    ("pause_agg", Value::Latency(self.fork_pauses.get())),
                ],
            ),
            Group::new(
                "live_snapshot",
                vec![
                    ("count", Value::Count(self.live_snapshots.get())),
                    ("pause_agg", Value::Latency(self.live_snapshot_pauses.get())),
                ],
            ),
        ]
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn each_operation_has_its_own_duration() {
        for (at, (operation, ..)) in OPERATIONS.iter().enumerate() {
            assert_eq!(*operation as usize, at);
        }
        let (clients, monitor) = (Durations::default(), Durations::default());
        clients.set(Operation::Pause, Duration::from_micros(7));
        monitor.set(Operation::Resume, Duration::from_nanos(8999));
        let group = latencies(&clients, &monitor);
        let set: Vec<_> = group.fields.iter().filter(|(_, value)| *value != Value::Micros(0)).collect();
        assert_eq!(set, [&("pause_vm", Value::Micros(7)), &("vmm_resume_vm", Value::Micros(8))]);
    }
}
