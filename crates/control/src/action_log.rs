//! The log's lines about how long commands took: `'pause vm' VMM action took 812 us.` Tools match
//! them, so words and names are Firecracker's.

use std::time::Instant;

use config::{SnapshotType, VmState};

use crate::Command;

/// A command that is being run.
#[derive(Debug)]
pub(crate) struct ActionLog {
    name: Option<&'static str>,
    begun: Instant,
}

impl ActionLog {
    /// Begins to measure.
    pub(crate) fn begin(command: &Command) -> Self {
        ActionLog { name: timed_action(command), begun: Instant::now() }
    }

    /// Logs that the command succeeded, if its duration is logged at all.
    pub(crate) fn end(self) {
        if let Some(name) = self.name {
            let took = self.begun.elapsed().as_micros();
            log::info!(target: "vmm::rpc_interface", "'{name}' VMM action took {took} us.");
        }
    }
}

/// Firecracker's name of a command whose duration is logged.
pub(crate) fn timed_action(command: &Command) -> Option<&'static str> {
    match command {
        Command::SetVmState(VmState::Paused) => Some("pause vm"),
        Command::SetVmState(VmState::Resumed) => Some("resume vm"),
        Command::LoadSnapshot(_) => Some("load snapshot"),
        // A live snapshot is only begun by its command.
        Command::CreateSnapshot(create) if create.live => None,
        Command::CreateSnapshot(create) => Some(match create.snapshot_type {
            SnapshotType::Full => "create full snapshot",
            SnapshotType::Diff => "create diff snapshot",
        }),
        _ => None,
    }
}
