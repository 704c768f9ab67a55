//! Why a snapshot tool fails.

use control::snapshot::VerifyError;
use memory::image::{ImageError, RestoreError};
use snapshot::ReadError;

/// Why a tool failed.
#[derive(Debug, thiserror::Error)]
pub(crate) enum ToolError {
    #[error(transparent)]
    Read(#[from] ReadError),
    #[error(transparent)]
    Memory(#[from] RestoreError),
    #[error(transparent)]
    Verify(#[from] VerifyError),
    #[error(transparent)]
    Merge(#[from] ImageError),
    #[error("cannot write to standard output: {0}")]
    Output(#[from] std::io::Error),
}

impl ToolError {
    /// The error of a write to standard output, if it is one.
    pub(super) fn output(&self) -> Option<&std::io::Error> {
        if let ToolError::Output(error) = self { Some(error) } else { None }
    }
}
