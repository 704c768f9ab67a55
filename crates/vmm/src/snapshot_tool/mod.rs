//! Tools that read and merge snapshots, without a microVM: `vesta-vmm snapshot ...`, and the
//! programs `snapshot-editor` and `rebase-snap`.
//!
//! - [`args`]: the command lines of all three.
//! - [`program`]: the names of those programs.
//! - [`info`]: a state file as text and as JSON.
//! - [`vcpus`]: the state of vCPUs and of the rest of the machine as text.
//!
//! Results go to standard output, errors to standard error with exit status 1. Only a merge changes
//! files.

pub(crate) mod args;
mod error;
mod info;
pub(crate) mod program;
mod vcpus;

use std::fmt;
use std::io::Write as _;
use std::path::{Path, PathBuf};

use control::snapshot::{Saved, verify};
use memory::image::{MergeStats, merge, merge_in_place};
use snapshot::{FORMAT_VERSION, Snapshot};

use crate::exit::ExitCode;
use crate::personality::Personality;
use crate::tool_end::end_of;
use error::ToolError;
use info::Info;
use program::Program;

/// A tool and its arguments.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum Tool {
    /// Print this text.
    Help(&'static str),
    /// Print the version of the program whose name this process has.
    ProgramVersion(Program),
    /// Show a state file, and its memory file where one is given.
    Info { state: PathBuf, memory: Option<PathBuf>, json: bool },
    /// Check both.
    Verify { state: PathBuf, memory: Option<PathBuf> },
    /// Put a Diff onto its base: in place, or into a new file.
    Merge { base: PathBuf, diff: PathBuf, output: Option<PathBuf> },
    /// Print the version of a state file's format.
    Version { state: PathBuf },
    /// Print its vCPUs.
    Vcpus { state: PathBuf },
    /// Print the rest of the machine.
    Machine { state: PathBuf },
}

/// Runs a tool. Errors are on standard error.
pub(crate) fn run(tool: &Tool) -> ExitCode {
    end_of(perform(tool), ToolError::output)
}

/// `--describe-snapshot`: prints the version of the file's format and, unless under Firecracker's
/// name, its contents.
pub(crate) fn describe(personality: Personality, state: &Path) -> ExitCode {
    end_of(described(personality, state), ToolError::output)
}

/// `--snapshot-version`: the format that this version writes, which is the newest that it loads.
pub(crate) fn version_text() -> String {
    version(FORMAT_VERSION)
}

/// The version as text. Formats have one number; tools of Firecracker expect three.
fn version(format: u32) -> String {
    format!("v{format}.0.0\n")
}

fn perform(tool: &Tool) -> Result<(), ToolError> {
    match tool {
        Tool::Help(text) => say(text),
        Tool::ProgramVersion(program) => say(program.version_text()),
        Tool::Info { state, memory, json } => {
            let info = Info::read(state, memory.as_deref())?;
            if *json { say(format_args!("{:#}\n", info.json())) } else { say(info) }
        }
        Tool::Verify { state, memory } => {
            let verified = verify(state, memory.as_deref())?;
            let description = &verified.saved.description;
            say(format_args!("{}: {} sections are good\n", state.display(), description.sections.len()))?;
            let Some(file) = verified.memory else { return Ok(()) };
            say(format_args!("{}: {} bytes, as the state file says\n", file.path.display(), file.size))?;
            if let Some(redo) = file.redo {
                say(format_args!("Its last Diff is in {}; the next load puts it in.\n", redo.display()))?;
            }
            if file.partial { say("This is a Diff that is to be merged onto its base.\n") } else { Ok(()) }
        }
        Tool::Merge { base, diff, output } => {
            let merged = match output {
                Some(output) => merge(base, diff, output, &())?,
                None => merge_in_place(base, diff, &())?,
            };
            let MergeStats { data_bytes, zero_bytes, .. } = merged;
            let output = output.as_ref().unwrap_or(base);
            say(format_args!("{}: {data_bytes} bytes merged, {zero_bytes} of them zero\n", output.display()))
        }
        Tool::Version { state } => say(version(Snapshot::open(state)?.describe().format_version)),
        Tool::Vcpus { state } => say(vcpus::vcpus(&Saved::open(state)?.machine)),
        Tool::Machine { state } => say(vcpus::without_vcpus(&Saved::open(state)?.machine)),
    }
}

fn described(personality: Personality, state: &Path) -> Result<(), ToolError> {
    let description = Snapshot::open(state)?.describe();
    say(version(description.format_version))?;
    match personality {
        Personality::Firecracker => Ok(()),
        Personality::Vesta => say(description),
    }
}

fn say(text: impl fmt::Display) -> Result<(), ToolError> {
    let mut out = std::io::stdout().lock();
    write!(out, "{text}")?;
    out.flush()?;
    Ok(())
}
