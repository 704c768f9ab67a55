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

/// A command that is not possible in the present phase. The texts begin as Firecracker's, which
/// clients match.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum PhaseError {
    /// The command configures a microVM before its start, and it has started.
    #[error(
        "The requested operation is not supported after starting the microVM: {command}{hint}; the microVM is {}",
        phase.name()
    )]
    OnlyBeforeStart {
        /// [`Command::name`].
        command: &'static str,
        /// What the command would be after the start, if Firecracker has it.
        hint: &'static str,
        /// The present phase.
        phase: Phase,
    },
    /// The command acts on a guest, and there is none yet.
    #[error(
        "The requested operation is not supported before starting the microVM: {command}; the microVM is {}",
        phase.name()
    )]
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
        | Command::GetMetrics
        | Command::PutMmds(_)
        | Command::PatchMmds(_) => AllowedIn::Always,

        Command::PutMachineConfig(_)
        | Command::PatchMachineConfig(_)
        | Command::PutCpuConfig(_)
        | Command::PutBootSource(_)
        | Command::PutLogger(_)
        | Command::PutMetrics(_)
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

/// What `command` would be after the start, if Firecracker has it.
fn hint(command: &Command) -> &'static str {
    match command {
        Command::PutDrive(_) | Command::PutNetwork(_) => " (this version does not support hot-plug)",
        _ => "",
    }
}

/// Checks that `command` is possible in `phase`.
pub fn check(command: &Command, phase: Phase) -> Result<(), PhaseError> {
    match (allowed_in(command), phase) {
        (AllowedIn::Always, _)
        | (AllowedIn::BeforeStart, Phase::Configured)
        | (AllowedIn::AfterStart, Phase::Running | Phase::Paused) => Ok(()),
        (AllowedIn::BeforeStart, Phase::Running | Phase::Paused) => {
            Err(PhaseError::OnlyBeforeStart { command: command.name(), hint: hint(command), phase })
        }
        (AllowedIn::AfterStart, Phase::Configured) => {
            Err(PhaseError::OnlyAfterStart { command: command.name(), phase })
        }
    }
}

#[cfg(test)]
mod tests {
    use config::{
        BootSource, CpuConfig, Logger, MachineConfig, MachineConfigUpdate, Metrics, Serial, VmState,
    };
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
            Command::GetMetrics,
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
            Command::PutCpuConfig(CpuConfig::default()),
            Command::PutBootSource(boot_source),
            Command::PutLogger(Logger::default()),
            Command::PutMetrics(Metrics::default()),
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
    fn error_has_the_text_that_clients_match_and_the_command() {
        let error = check(&Command::Start, Phase::Paused).unwrap_err().to_string();
        let text = "The requested operation is not supported after starting the microVM: \
                    InstanceStart; the microVM is Paused";
        assert_eq!(error, text);
        let error = check(&Command::SendCtrlAltDel, Phase::Configured).unwrap_err().to_string();
        let text = "The requested operation is not supported before starting the microVM: \
                    SendCtrlAltDel; the microVM is Not started";
        assert_eq!(error, text);
        let network = serde_json::from_value(json!({"iface_id":"eth0","host_dev_name":"tap0"})).unwrap();
        let error = check(&Command::PutNetwork(network), Phase::Running).unwrap_err().to_string();
        assert!(error.contains("hot-plug"), "{error}");
    }
}
