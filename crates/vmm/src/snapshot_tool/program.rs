//! [`Program`]: the names of Firecracker's tools for snapshots.

use crate::exit::ExitCode;
use crate::personality::API_VERSION;

/// A tool of Firecracker that this program answers as, if it is started under its name.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Program {
    /// `snapshot-editor`.
    Editor,
    /// `rebase-snap`.
    Rebase,
}

impl Program {
    /// By the name of this process.
    pub(crate) fn of_this_process() -> Option<Self> {
        Self::named(std::env::args_os().next()?.to_str())
    }

    /// What `--version` prints, as Firecracker's tools do.
    pub(crate) fn version_text(self) -> String {
        match self {
            Program::Editor => format!("snapshot-editor v{API_VERSION}\n"),
            Program::Rebase => format!("Rebase_snap v{API_VERSION}\n\n"),
        }
    }

    /// The exit status for an invalid command line: that of the program of this name.
    pub(crate) fn usage_error_code(self) -> ExitCode {
        match self {
            Program::Editor => ExitCode::Unexpected,
            Program::Rebase => ExitCode::Generic,
        }
    }

    /// By the name that the process was started under.
    pub(crate) fn named(program: Option<&str>) -> Option<Self> {
        match program?.rsplit('/').next()? {
            "snapshot-editor" => Some(Program::Editor),
            "rebase-snap" => Some(Program::Rebase),
            _ => None,
        }
    }
}
