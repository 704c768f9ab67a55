//! Why an overlay cannot be opened or closed.

use std::io;
use std::path::PathBuf;

use super::format::VERSION;
use crate::host_file::health::ContentsUnknown;
use crate::host_file::lock::LockHolder;

/// Why an overlay cannot be opened or closed.
#[derive(Debug, thiserror::Error)]
pub enum OverlayError {
    /// A system call failed.
    #[error("overlay {}: cannot {what}: {source}", path.display())]
    Io {
        /// The operation.
        what: &'static str,
        /// The overlay.
        path: PathBuf,
        /// The kernel's reason.
        source: io::Error,
    },
    /// Another process has it open: for writing, or as a layer while this one wants to write.
    #[error("overlay {}: cannot be locked: {holder} has it locked; stop it, or use another overlay", path.display())]
    InUse {
        /// The overlay.
        path: PathBuf,
        /// The process.
        holder: LockHolder,
    },
    /// A sync of it failed.
    #[error(transparent)]
    ContentsUnknown(#[from] ContentsUnknown),
    /// A sync of it failed in an earlier session, and its contents are lost.
    #[error(
        "overlay {}: its contents are unknown since a sync failed; use another overlay, or open it with cache_type Unsafe to save what can be read",
        path.display()
    )]
    LeftUnknown {
        /// The overlay.
        path: PathBuf,
    },
    /// It is not a regular file.
    #[error("overlay {}: not a regular file", path.display())]
    NotAFile {
        /// The overlay.
        path: PathBuf,
    },
    /// The file has no overlay header.
    #[error("overlay {}: not an overlay file: it has no overlay header", path.display())]
    NotAnOverlay {
        /// The file.
        path: PathBuf,
    },
    /// The format version is not supported.
    #[error("overlay {}: format version is {version}; this program reads version {VERSION}", path.display())]
    Version {
        /// The overlay.
        path: PathBuf,
        /// Its version.
        version: u32,
    },
    /// The header or the session is damaged.
    #[error("overlay {}: its header is damaged: {what}", path.display())]
    Damaged {
        /// The overlay.
        path: PathBuf,
        /// What is wrong.
        what: &'static str,
    },
    /// The file is too short.
    #[error("overlay {}: the file is truncated: {len} bytes; its header requires {needed}", path.display())]
    Truncated {
        /// The overlay.
        path: PathBuf,
        /// Its length in bytes.
        len: u64,
        /// The length that the header requires, in bytes.
        needed: u64,
    },
    /// It was created on another disk, or on another state of it.
    #[error("overlay {}: created on another disk: {what}", path.display())]
    WrongBase {
        /// The overlay.
        path: PathBuf,
        /// The difference.
        what: String,
    },
    /// It is also one of the layers below.
    #[error("overlay {}: it is also the disk below it; use another path", path.display())]
    OwnBacking {
        /// The file.
        path: PathBuf,
    },
    /// The requested size is invalid.
    #[error("overlay {}: invalid size: {size} bytes; {why}", path.display())]
    Size {
        /// The overlay.
        path: PathBuf,
        /// The size in bytes.
        size: u64,
        /// The bound.
        why: String,
    },
}
