//! Errors of writing and merging images.

use std::path::{Path, PathBuf};

use snapshot::{FileError, FileId};

use crate::page_server::FetchError;
use crate::resident::ResidentError;

/// Why an image could not be written or merged.
#[derive(Debug, thiserror::Error)]
pub enum ImageError {
    /// The file cannot be created, or cannot be given its name.
    #[error(transparent)]
    File(#[from] FileError),
    /// The file cannot be written: usually no space.
    #[error("memory image {}: cannot write at offset {offset} of {size} bytes: {source}", path.display())]
    Write {
        /// The file.
        path: PathBuf,
        /// Its full size in bytes.
        size: u64,
        /// Where writing stopped.
        offset: u64,
        /// The kernel's reason.
        source: std::io::Error,
    },
    /// A base, a Diff or the image that the guest was restored from cannot be read.
    #[error("memory image {}: cannot read: {source}", path.display())]
    Read {
        /// The file.
        path: PathBuf,
        /// The kernel's reason.
        source: std::io::Error,
    },
    /// A base and a Diff of different guests.
    #[error(
        "memory image {}: it has {base_size} bytes, but the Diff {} has {diff_size}: they are not of one guest",
        base.display(), diff.display()
    )]
    SizeMismatch {
        /// The base.
        base: PathBuf,
        /// Its size in bytes.
        base_size: u64,
        /// The Diff.
        diff: PathBuf,
        /// Its size in bytes.
        diff_size: u64,
    },
    /// The base and the Diff are one file.
    #[error("memory image {}: it is both base and diff", path.display())]
    SameFile {
        /// The file.
        path: PathBuf,
    },
    /// A Diff is on disk in its redo log but cannot be written to its base.
    #[error(
        "{source}; the last Diff is still in {}, and the next load writes it to the image (id {id})", redo.display()
    )]
    Unapplied {
        /// The redo log.
        redo: PathBuf,
        /// The id by which the state file names the image with the Diff in it.
        id: FileId,
        /// Why.
        source: Box<ImageError>,
    },
    /// The kernel does not say which pages are in use.
    #[error(transparent)]
    Resident(#[from] ResidentError),
    /// The page server does not send pages that the image needs.
    #[error(transparent)]
    Fetch(#[from] FetchError),
    /// [`Observer::cancelled`](super::Observer::cancelled) returned true.
    #[error("memory image {}: writing it was cancelled", path.display())]
    Cancelled {
        /// The file.
        path: PathBuf,
    },
}

impl ImageError {
    /// A constructor for [`ImageError::Read`] of the file at `path`.
    pub(super) fn read(path: &Path) -> impl Fn(std::io::Error) -> ImageError {
        let path = path.to_path_buf();
        move |source| ImageError::Read { path: path.clone(), source }
    }
}
