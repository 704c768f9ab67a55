//! Why an overlay cannot be opened or closed.

use std::io;
use std::path::PathBuf;

use super::format::VERSION;
use crate::host_file::health::ContentsUnknown;
use crate::host_file::lock::LockHolder;

/// Why an overlay cannot be opened.
#[derive(Debug, thiserror::Error)]
pub enum OverlayError {
    /// A system call failed.
    #[error("cannot {what} overlay {}: {source}", path.display())]
    Io {
        /// What was tried.
        what: &'static str,
        /// The overlay.
        path: PathBuf,
        /// The kernel's reason.
        source: io::Error,
    },
    /// Another process has it open and writes to it, or reads it as a layer while this one wants to write.
    #[error("overlay {}: cannot be locked: {holder} has it locked; stop that one, or use another overlay", path.display())]
    InUse {
        /// The overlay.
        path: PathBuf,
        /// Who has it.
        holder: LockHolder,
    },
    /// A sync of it failed.
    #[error(transparent)]
    ContentsUnknown(#[from] ContentsUnknown),
    /// A sync of it failed when it was opened before, and nobody knows what of it is on the disk.
    #[error(
        "overlay {}: its contents are unknown since a sync failed; use another overlay, or open it with cache_type Unsafe to save what can be read",
        path.display()
    )]
    LeftUnknown {
        /// The overlay.
        path: PathBuf,
    },
    /// It is not a regular file.
    #[error("overlay {} is not a regular file", path.display())]
    NotAFile {
        /// The overlay.
        path: PathBuf,
    },
    /// The file holds something else.
    #[error("{} is not an overlay: it does not begin with an overlay's header", path.display())]
    NotAnOverlay {
        /// The file.
        path: PathBuf,
    },
    /// It was written by a program that knows more.
    #[error("overlay {} has format version {version}, this program reads version {VERSION}", path.display())]
    Version {
        /// The overlay.
        path: PathBuf,
        /// The version it has.
        version: u32,
    },
    /// The header contradicts itself: it was damaged.
    #[error("the header of overlay {} is damaged: {what}", path.display())]
    Damaged {
        /// The overlay.
        path: PathBuf,
        /// What is wrong.
        what: &'static str,
    },
    /// The end of the file is missing.
    #[error("overlay {} is truncated: it is {len} bytes long and its header asks for {needed}", path.display())]
    Truncated {
        /// The overlay.
        path: PathBuf,
        /// Its length in bytes.
        len: u64,
        /// The length it must have.
        needed: u64,
    },
    /// It was made on something else than what it is put on now.
    #[error("overlay {} was not made on this disk: {what}", path.display())]
    WrongBase {
        /// The overlay.
        path: PathBuf,
        /// What differs.
        what: String,
    },
    /// It is one of the files that it was to lie on.
    #[error("overlay {} is the disk that it is to lie on", path.display())]
    IsBeneath {
        /// The file.
        path: PathBuf,
    },
    /// The size asked for is not one that an overlay can have here.
    #[error("overlay {}: size {size} does not fit: {why}", path.display())]
    Size {
        /// The overlay.
        path: PathBuf,
        /// The size in bytes.
        size: u64,
        /// What it must fit.
        why: String,
    },
}
