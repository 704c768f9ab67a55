//! The phases of a microVM as its user sees them, and the phases in which each command is possible.

use crate::Command;

/// The phase of a microVM. There is no phase for a stopped one: its process ends.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Phase {
    /// The microVM is being configured. There is no guest yet.
    Configured,
    /// The guest runs.
    Running,
    /// The guest is paused.
    Paused,
}

impl Phase {
    /// The name of the phase in `GET /`.
    pub fn name(self) -> &'static str {
        match self {
            Phase::Configured => "Not started",
            Phase::Running => "Running",
            Phase::Paused => "Paused",
        }
    }
}

/// A command that is not possible in the present phase.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum PhaseError {
    /// The command configures a microVM before its start, and it has started.
    #[error("{command} is possible only before the microVM starts, and it is {}", phase.name())]
    OnlyBeforeStart {
        /// [`Command::name`].
        command: &'static str,
        /// The present phase.
        phase: Phase,
    },
    /// The command acts on a guest, and there is none yet.
    #[error("{command} needs a started microVM, and it is {}", phase.name())]
    OnlyAfterStart {
        /// [`Command::name`].
        command: &'static str,
        /// The present phase.
        phase: Phase,
    },
}

/// The phases in which a command is possible.
enum AllowedIn {
    Always,
    BeforeStart,
    AfterStart,
}

/// The rule for each command.
fn allowed_in(command: &Command) -> AllowedIn {
    match command {
        Command::DescribeInstance
        | Command::GetVersion
        | Command::GetOpenApi
        | Command::GetMachineConfig
        | Command::GetVmConfig
        | Command::GetMmds
        | Command::PutMmds(_)
        | Command::PatchMmds(_) => AllowedIn::Always,

        Command::PutMachineConfig(_)
        | Command::PatchMachineConfig(_)
        | Command::PutBootSource(_)
        | Command::PutLogger(_)
        | Command::PutSerial(_)
        | Command::PutDrive(_)
        | Command::PutNetwork(_)
        | Command::PutEntropy(_)
        | Command::PutVsock(_)
        | Command::PutMmdsConfig(_)
        | Command::LoadSnapshot(_)
        | Command::Start => AllowedIn::BeforeStart,

        Command::FlushMetrics
        | Command::SendCtrlAltDel
        | Command::SetVmState(_)
        | Command::PatchDrive(_)
        | Command::PatchNetwork(_)
        | Command::CreateSnapshot(_)
        | Command::DescribeJob
        | Command::CancelJob
        | Command::Fork(_) => AllowedIn::AfterStart,
    }
}

/// Checks that `command` is possible in `phase`.
pub fn check(command: &Command, phase: Phase) -> Result<(), PhaseError> {
    match (allowed_in(command), phase) {
        (AllowedIn::Always, _)
        | (AllowedIn::BeforeStart, Phase::Configured)
        | (AllowedIn::AfterStart, Phase::Running | Phase::Paused) => Ok(()),
        (AllowedIn::BeforeStart, Phase::Running | Phase::Paused) => {
            Err(PhaseError::OnlyBeforeStart { command: command.name(), phase })
        }
        (AllowedIn::AfterStart, Phase::Configured) => {
            Err(PhaseError::OnlyAfterStart { command: command.name(), phase })
        }
    }
}

#[cfg(test)]
mod tests {
    use config::{BootSource, Logger, MachineConfig, MachineConfigUpdate, Serial, VmState};
    use serde_json::json;

    use super::*;

    const PHASES: [Phase; 3] = [Phase::Configured, Phase::Running, Phase::Paused];

    fn assert_possible(command: &Command, expected: [bool; 3]) {
        let possible = PHASES.map(|phase| check(command, phase).is_ok());
        assert_eq!(possible, expected, "{command:?}");
    }

    #[test]
    fn questions_are_possible_in_every_phase() {
        for command in [
            Command::DescribeInstance,
            Command::GetVersion,
            Command::GetOpenApi,
            Command::GetMachineConfig,
            Command::GetVmConfig,
        ] {
            assert_possible(&command, [true, true, true]);
        }
    }

    #[test]
    fn metadata_changes_in_every_phase_and_its_config_before_start() {
        for command in [Command::GetMmds, Command::PutMmds(json!({})), Command::PatchMmds(json!({}))] {
            assert_possible(&command, [true, true, true]);
        }
        let config = serde_json::from_value(json!({"network_interfaces":["eth0"]})).unwrap();
        assert_possible(&Command::PutMmdsConfig(config), [true, false, false]);
    }

    #[test]
    fn configuration_is_possible_only_before_the_start() {
        let boot_source =
            BootSource { kernel_image_path: "vmlinux".into(), initrd_path: None, boot_args: None };
        for command in [
            Command::PutMachineConfig(MachineConfig::default()),
            Command::PatchMachineConfig(MachineConfigUpdate::default()),
            Command::PutBootSource(boot_source),
            Command::PutLogger(Logger::default()),
            Command::PutSerial(Serial::default()),
            Command::Start,
        ] {
            assert_possible(&command, [true, false, false]);
        }
    }

    #[test]
    fn commands_to_the_guest_are_possible_only_after_the_start() {
        for command in [
            Command::FlushMetrics,
            Command::SendCtrlAltDel,
            Command::SetVmState(VmState::Paused),
            Command::SetVmState(VmState::Resumed),
        ] {
            assert_possible(&command, [false, true, true]);
        }
    }

    #[test]
    fn error_names_the_command_and_the_phase() {
        let error = check(&Command::Start, Phase::Paused).unwrap_err().to_string();
        assert!(error.contains("InstanceStart") && error.contains("Paused"), "{error}");
        let error = check(&Command::SendCtrlAltDel, Phase::Configured).unwrap_err().to_string();
        assert!(error.contains("SendCtrlAltDel") && error.contains("Not started"), "{error}");
    }
}
