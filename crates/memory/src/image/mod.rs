//! Memory images: a guest's RAM as a file.
//!
//! An image is flat: each region's bytes are at its offset in the [`MemoryLayout`], so anything that reads a file can read it, page
//! servers written for Firecracker included. It is sparse: a page of zeros is a hole.
//!
//! A *Full* image is the whole memory. A *Diff* has the pages of a set, and holes elsewhere: there a page of zeros is data,
//! because a hole means "as in the base". [`merge`] puts a Diff onto its base; before that no guest can go on from it, and trying to is an error
//! ([`RestoreError::Partial`]).
//!
//! Nothing of a guest is faulted in by writing its image: pages that were never touched are known by the kernel's page tables, and
//! pages that are still those of the file which the guest was restored from are copied from file to file (shared,
//! where the file system can). Only with a page server all pages are fetched, as nobody else knows them.
//!
//! Images appear under their name when they are complete ([`snapshot::AtomicFile`]). Writing over
//! the file that a guest runs on is therefore safe: its mapping keeps the old file. The exception
//! is a Diff onto a base that no other process has open or mapped: it is written into the base
//! through a redo log ([`redo`]), which is as atomic. Whoever reads an image opens it by
//! `redo::open_consistent`, which looks for such a writer.
//!
//! # Errors
//!
//! [`ImageError`] names the file, the size that it was to have, and where writing stopped. No partial file is left.

mod copy;
mod file;
mod merge;
mod partial;
mod redo;
mod redo_mark;
mod restore;
mod write;

use std::path::{Path, PathBuf};

use config::HugePages;
use serde::{Deserialize, Serialize};
use snapshot::{FileError, FileId, Section};

pub use merge::{MergeStats, merge, merge_in_place};
pub use redo::recover;
pub use restore::{ImageFile, RestoreError, examine};
pub use write::{StagedImage, WrittenImage, write_diff, write_full};

use crate::layout::MemoryLayout;
use crate::page_server::FetchError;
use crate::resident::ResidentError;

/// What the state file says about the memory image.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct ImageInfo {
    /// Where the regions are in the image.
    pub layout: MemoryLayout,
    /// The whole memory, or pages on top of a base.
    pub kind: ImageKind,
    /// PageFilter file it is: for [`snapshot::find`].
    pub id: FileId,
    /// The kind of pages that backed the memory: what a restore with `"huge_pages": "Snapshot"` takes.
    pub huge_pages: HugePages,
}

impl Section for ImageInfo {
    const NAME: &'static str = "memory";
}

/// The kinds of images.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub enum ImageKind {
    /// All of the memory.
    Full,
    /// Some pages, to be merged onto a base; or merged already, where the file was there and of the same size. [`ImageFile::partial`] tells
    /// which.
    Diff,
}

/// Who wants to know how far it is, and may stop it. `()` wants nothing.
pub trait Observer: Sync {
    /// `done` of `total` bytes are dealt with. Called from the writing thread every few MiB.
    fn progress(&self, done: u64, total: u64) {
        let _ = (done, total);
    }

    /// Whether to stop: the file goes away, and the error is [`ImageError::Cancelled`]. Asked every few MiB.
    fn cancelled(&self) -> bool {
        false
    }
}

impl Observer for () {}

/// Why an image could not be written or merged.
#[derive(Debug, thiserror::Error)]
pub enum ImageError {
    /// The file cannot be made or put in its place.
    #[error(transparent)]
    File(#[from] FileError),
    /// The file cannot be filled: no space, most often.
    #[error("cannot write {} ({size} bytes) at offset {offset}: {source}", path.display())]
    Write {
        /// The file.
        path: PathBuf,
        /// Its size in bytes when whole.
        size: u64,
        /// Where writing stopped.
        offset: u64,
        /// The kernel's reason.
        source: std::io::Error,
    },
    /// A base, a Diff or the file that the guest was restored from cannot be read.
    #[error("cannot read {}: {source}", path.display())]
    Read {
        /// The file.
        path: PathBuf,
        /// The kernel's reason.
        source: std::io::Error,
    },
    /// A base and a Diff of different guests.
    #[error(
        "{} has {base_size} bytes and {} has {diff_size}: they are not of one guest",
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
    /// A Diff onto itself.
    #[error("{} is both base and diff", path.display())]
    SameFile {
        /// The file.
        path: PathBuf,
    },
    /// A Diff is on disk in its redo log and cannot be put into its base.
    #[error(
        "{source}; the last Diff is still in {}, and the next load puts it into the image (id {id})", redo.display()
    )]
    Unapplied {
        /// The redo log.
        redo: PathBuf,
        /// What the state file calls the image with the Diff in it.
        id: FileId,
        /// Why.
        source: Box<ImageError>,
    },
    /// The kernel does not say which pages there are.
    #[error(transparent)]
    Resident(#[from] ResidentError),
    /// The page server does not send what is to be in the image.
    #[error(transparent)]
    Fetch(#[from] FetchError),
    /// [`Observer::cancelled`] said so.
    #[error("writing {} was cancelled", path.display())]
    Cancelled {
        /// The file.
        path: PathBuf,
    },
}

impl ImageError {
    fn read(path: &Path) -> impl Fn(std::io::Error) -> ImageError {
        let path = path.to_path_buf();
        move |source| ImageError::Read { path: path.clone(), source }
    }
}
