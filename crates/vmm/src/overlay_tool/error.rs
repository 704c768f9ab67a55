//! Why a tool for overlays fails.

use std::io;
use std::path::PathBuf;

use block::disk::DiskError;
use block::overlay::OverlayError;

#[derive(Debug, thiserror::Error)]
pub(super) enum ToolError {
    #[error(transparent)]
    Overlay(#[from] OverlayError),
    #[error(transparent)]
    Disk(#[from] DiskError),
    #[error("overlay {}: its contents are unknown since a failed sync", path.display())]
    Unknown { path: PathBuf },
    #[error("image {}: it exists already; remove it, or choose another path", path.display())]
    Exists { path: PathBuf },
    #[error("image {}: cannot write: {source}", path.display())]
    Write { path: PathBuf, source: io::Error },
    #[error("cannot write to standard output: {0}")]
    Output(#[from] io::Error),
}

impl ToolError {
    /// The error of a write to standard output, if it is one.
    pub(super) fn output(&self) -> Option<&std::io::Error> {
        if let ToolError::Output(error) = self { Some(error) } else { None }
    }
}
