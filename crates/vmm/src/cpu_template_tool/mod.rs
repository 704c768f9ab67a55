//! The tools for CPU templates: `vesta-vmm cpu-template ...`, and the program
//! `cpu-template-helper`. None runs a guest.
//!
//! - [`args`]: both command lines. [`command`]: what they ask for.
//! - [`dump`]: what a guest's vCPU shows, as a template. KVM is asked for it.
//! - [`registers`]: a template as a map. [`strip`]: what several templates do not have in common.
//!   [`verify`]: whether a template has the effect that it says.
//! - [`fingerprint`]: what a vCPU shows with what it depends on, and how two of these differ.
//!
//! The files are Firecracker's. Results go to files that appear when they are complete, reports to
//! standard output, errors to standard error with exit status 1.

pub(crate) mod args;
mod command;
mod dump;
mod error;
mod fingerprint;
mod registers;
mod strip;
mod verify;

use std::fmt;
use std::fs;
use std::io::Write as _;
use std::path::Path;

use serde::Serialize;
use snapshot::AtomicFile;

use crate::exit::ExitCode;
use crate::personality::API_VERSION;
use crate::template_file;
use crate::tool_end::end_of;
pub(crate) use command::Tool;
use error::ToolError;

/// Runs a tool. Errors are on standard error.
pub(crate) fn run(tool: &Tool) -> ExitCode {
    end_of(perform(tool), ToolError::output)
}

fn perform(tool: &Tool) -> Result<(), ToolError> {
    match tool {
        Tool::Help(text) => print(text),
        Tool::Version => print(format_args!("cpu-template-helper v{API_VERSION}\n")),
        Tool::Dump { guest, output } => write_json(output, &dump::dump(guest)?),
        Tool::Strip { paths, suffix } => {
            // All are read before any is written: an empty suffix replaces them.
            let templates = paths.iter().map(|path| template_file::read(path));
            let stripped = strip::strip(&templates.collect::<Result<Vec<_>, _>>()?);
            paths
                .iter()
                .zip(&stripped)
                .try_for_each(|(path, template)| write_json(&strip::with_suffix(path, suffix)?, template))
        }
        Tool::Verify { guest } => print(verify::verify(guest)?),
        Tool::FingerprintDump { guest, output } => write_json(output, &fingerprint::dump(guest)?),
        Tool::FingerprintCompare { previous, current, fields } => {
            fingerprint::compare(previous, current, fields)
        }
    }
}

/// Writes a file that appears when it is complete. A path that is no file (`/dev/stdout`) is
/// written to.
fn write_json(path: &Path, value: &impl Serialize) -> Result<(), ToolError> {
    let failed = |reason: String| ToolError::Write { path: path.to_owned(), reason };
    let mut text = serde_json::to_string_pretty(value).map_err(|e| failed(e.to_string()))?;
    text.push('\n');
    if fs::metadata(path).is_ok_and(|found| !found.is_file()) {
        return fs::write(path, text).map_err(|e| failed(e.to_string()));
    }
    let file = AtomicFile::create(path)?;
    file.file().write_all(text.as_bytes()).map_err(|e| failed(e.to_string()))?;
    file.commit()?;
    Ok(())
}

fn print(text: impl fmt::Display) -> Result<(), ToolError> {
    let mut out = std::io::stdout().lock();
    write!(out, "{text}")?;
    out.flush()?;
    Ok(())
}
