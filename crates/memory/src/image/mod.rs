//! Memory images: a guest's RAM as a file.
//!
//! An image is flat: each region is at its offset in the [`MemoryLayout`](crate::MemoryLayout). So
//! any program that reads files can read it, including page servers written for Firecracker. It is
//! sparse: a page of zeros is a hole.
//!
//! A *Full* image is the whole memory. A *Diff* has the pages of a set, and holes elsewhere. In a
//! Diff a page of zeros is data, because a hole means "as in the base". [`merge()`] puts a Diff
//! onto its base. A Diff that was not merged cannot be restored ([`RestoreError::Partial`]).
//!
//! Writing an image faults in no page of the guest. The page tables show which pages were never
//! touched. Pages that are unchanged since a restore are copied from the restored file (as shared
//! blocks, if the file system supports it). Only with a page server all pages are fetched, because
//! only the server has them.
//!
//! Images appear under their name when they are complete ([`snapshot::AtomicFile`]). So writing
//! over the file that a guest is mapped from is safe: its mapping keeps the old file. The exception
//! is a Diff onto a base that no other process has open or mapped: it is written into the base
//! through a redo log (`redo`), which is atomic as well. All readers of images open them by
//! `redo::open_consistent`, which detects such a writer.
//!
//! # Errors
//!
//! [`ImageError`] names the file, its full size, and where writing stopped. No partial file is
//! left.

mod copy;
mod error;
mod file;
mod info;
mod merge;
mod partial;
mod redo;
mod restore;
mod write;

pub use crate::observer::Observer;
pub use error::ImageError;
pub use info::{ImageInfo, ImageKind};
pub use merge::{MergeStats, merge, merge_in_place};
pub use redo::recover;
pub use restore::{ImageFile, RestoreError, examine};
pub use write::{StagedImage, WrittenImage, write_diff, write_full};
