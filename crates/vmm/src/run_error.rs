//! [`RunError`]: why a microVM's process ends with an error, and its exit status.

use control::CommandError;
use control::api::BindError;

use crate::crash_report;
use crate::exit::ExitCode;
use crate::flags::ArgsError;
use crate::personality::Personality;

/// Why the process ends with an error.
#[derive(Debug, thiserror::Error)]
pub(crate) enum RunError {
    #[error("{0} (try --help)")]
    Args(#[from] ArgsError),
    #[error("cannot open the log {path}: {source}")]
    Log { path: String, source: std::io::Error },
    #[error("cannot read the seccomp filters {path}: {source}")]
    SeccompFilter { path: String, source: std::io::Error },
    #[error("cannot read the configuration file {path}: {source}")]
    ReadConfig { path: String, source: std::io::Error },
    #[error("invalid configuration file {path}: {reason}")]
    Config { path: String, reason: String },
    #[error("cannot read the metadata file {path}: {source}")]
    ReadMetadata { path: String, source: std::io::Error },
    #[error("invalid metadata file {path}: {reason}")]
    Metadata { path: String, reason: String },
    #[error("cannot start the microVM from the configuration file {path}: {reason}")]
    Start { path: String, reason: String },
    #[error("cannot restore the microVM from {path}: {reason}")]
    Restore { path: String, reason: CommandError },
    #[error(transparent)]
    Metrics(CommandError),
    #[error("cannot serve the API: {0}")]
    Bind(#[from] BindError),
    #[error("cannot set up this process: {0}")]
    Host(#[from] std::io::Error),
}

impl RunError {
    /// The exit status. Under Firecracker's name it is Firecracker's for the same error.
    pub(crate) fn code(&self, personality: Personality) -> ExitCode {
        match self {
            RunError::Args(ArgsError::Value { name: "level", .. })
                if personality == Personality::Firecracker =>
            {
                ExitCode::BadConfiguration
            }
            RunError::Args(_) => ExitCode::ArgParsing,
            RunError::ReadConfig { .. }
            | RunError::Config { .. }
            | RunError::ReadMetadata { .. }
            | RunError::Metadata { .. }
            | RunError::Start { .. }
                if personality == Personality::Firecracker =>
            {
                ExitCode::Generic
            }
            RunError::ReadConfig { .. }
            | RunError::Config { .. }
            | RunError::ReadMetadata { .. }
            | RunError::Metadata { .. }
            | RunError::Start { .. }
            | RunError::Restore { .. } => ExitCode::BadConfiguration,
            RunError::Log { .. }
            | RunError::Metrics(_)
            | RunError::SeccompFilter { .. }
            | RunError::Bind(_)
            | RunError::Host(_) => ExitCode::Generic,
        }
    }
}

/// Writes an error to the log and to standard error, and returns its exit status.
pub(crate) fn report(personality: Personality, error: &RunError) -> ExitCode {
    log::error!("{error}");
    crash_report::to_stderr(format!("Error: {error}\n").as_bytes());
    error.code(personality)
}
