//! What the tools for overlay files can be asked to do.

use std::path::PathBuf;

use super::export::Format;

/// A command.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum Tool {
    /// Prints the help.
    Help,
    /// Prints what an overlay file contains.
    Info { file: PathBuf, json: bool },
    /// Checks an overlay file and, with a base, the whole disk.
    Check { file: PathBuf, backing: Option<BackingFiles> },
    /// Writes the disk to one image.
    Export { file: PathBuf, backing: BackingFiles, output: PathBuf, format: Format },
}

/// The files below an overlay, which names none itself.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct BackingFiles {
    /// The disk at the bottom.
    pub(crate) base: PathBuf,
    /// The overlays between it and the one in question, from the bottom up.
    pub(crate) layers: Vec<PathBuf>,
}
