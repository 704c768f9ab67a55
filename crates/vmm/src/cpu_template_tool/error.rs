//! Why a tool for CPU templates fails.

use std::path::PathBuf;

use machine::StartError;
use snapshot::FileError;

use crate::template_file::TemplateFileError;

/// Why a tool failed.
#[derive(Debug, thiserror::Error)]
pub(crate) enum ToolError {
    #[error(transparent)]
    Template(#[from] TemplateFileError),
    #[error("configuration file {}: {reason}", path.display())]
    Config { path: PathBuf, reason: String },
    #[error("{0}")]
    Kvm(#[from] StartError),
    #[error("{0}: the path has no file name")]
    NoFileName(String),
    #[error("there is no template to verify: give --template, or a --config that has one")]
    NoTemplate,
    #[error("the vCPU does not show what the template says:\n{0}")]
    Mismatch(String),
    #[error("fingerprint {}: {reason}", path.display())]
    Fingerprint { path: PathBuf, reason: String },
    #[error("the fingerprints differ:\n{0}")]
    Difference(String),
    #[error("cannot write {}: {reason}", path.display())]
    Write { path: PathBuf, reason: String },
    #[error(transparent)]
    File(#[from] FileError),
    #[error("cannot write to standard output: {0}")]
    Output(#[from] std::io::Error),
}

impl ToolError {
    /// The error of a write to standard output, if it is one.
    pub(super) fn output(&self) -> Option<&std::io::Error> {
        if let ToolError::Output(error) = self { Some(error) } else { None }
    }
}
