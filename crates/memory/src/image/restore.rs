//! Restoring guest RAM from an image.

use std::fs::File;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use config::HugePages;
use rustix::fs::OFlags;

use super::error::ImageError;
use super::file::{CHUNK, data_extents, open_image};
use super::info::ImageInfo;
use super::partial;
use super::redo::open_consistent;
use crate::backing::Backing;
use crate::layout::{MIB, MemoryLayout};
use crate::observer::Observer;
use crate::ram::{GuestRam, MapError};
use crate::sys::span_io;

/// Why memory cannot come from an image.
#[derive(Debug, thiserror::Error)]
pub enum RestoreError {
    /// The image cannot be opened or read.
    #[error("memory image {}: cannot read: {source}", path.display())]
    Read {
        /// The file.
        path: PathBuf,
        /// The kernel's reason.
        source: std::io::Error,
    },
    /// It is a directory, a device or a pipe.
    #[error("memory image {}: it is not a regular file", path.display())]
    NotAFile {
        /// The path.
        path: PathBuf,
    },
    /// The image is smaller than the guest's memory.
    #[error("memory image {}: it has {found} bytes; the guest needs {needed}", path.display())]
    TooShort {
        /// The file.
        path: PathBuf,
        /// Its size in bytes.
        found: u64,
        /// The least size in bytes.
        needed: u64,
    },
    /// It is a Diff that was not merged onto its base.
    #[error("memory image {}: it is a Diff that was not merged onto its base: see vesta-vmm snapshot merge", path.display())]
    Partial {
        /// The file.
        path: PathBuf,
    },
    /// [`Observer::cancelled`] returned true.
    #[error("memory image {}: reading it was cancelled", path.display())]
    Cancelled {
        /// The file.
        path: PathBuf,
    },
    /// Its last Diff is in a redo log and cannot be applied.
    #[error(transparent)]
    Recover(ImageError),
    /// The kernel refused the mapping.
    #[error(transparent)]
    Map(#[from] MapError),
}

/// The properties of an image file that are known without reading its data.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ImageFile {
    /// Its path: see [`snapshot::find`].
    pub path: PathBuf,
    /// Its size in bytes.
    pub size: u64,
    /// Bytes of it that are not holes.
    pub data_bytes: u64,
    /// It is a Diff that must be merged onto its base.
    pub partial: bool,
    /// The redo log that still holds its last Diff: see [`recover`](super::recover).
    pub redo: Option<PathBuf>,
}

/// Examines the image at `path` that a state file describes as `info`. It may have any size.
pub fn examine(path: &Path, info: &ImageInfo) -> Result<ImageFile, RestoreError> {
    let redo = snapshot::redo_path(path, info.id);
    let path = snapshot::find(path, info.id);
    let read = |source| RestoreError::Read { path: path.clone(), source };
    let file = open_image(&path, OFlags::RDONLY).map_err(read)?;
    let size = regular_size(&file, &path)?;
    let mut data_bytes = 0;
    for extent in data_extents(&file, 0..size) {
        let extent = extent.map_err(read)?;
        data_bytes += extent.end - extent.start;
    }
    Ok(ImageFile { path, size, data_bytes, partial: partial::is_marked(&file), redo })
}

/// The size of an image, which must be a regular file.
fn regular_size(file: &File, path: &Path) -> Result<u64, RestoreError> {
    let metadata =
        file.metadata().map_err(|source| RestoreError::Read { path: path.to_path_buf(), source })?;
    if !metadata.is_file() {
        return Err(RestoreError::NotAFile { path: path.to_path_buf() });
    }
    Ok(metadata.size())
}

impl From<ImageError> for RestoreError {
    fn from(error: ImageError) -> Self {
        match error {
            ImageError::Read { path, source } => RestoreError::Read { path, source },
            ImageError::Cancelled { path } => RestoreError::Cancelled { path },
            other => RestoreError::Recover(other),
        }
    }
}

impl GuestRam {
    /// Maps the image at `path` as the RAM of a guest. It reads nothing: pages come from the page
    /// cache, which all clones share, when the guest touches them, and are copied when it writes.
    ///
    /// The file is opened read-only and never changed. (If a writer was killed while it changed the
    /// file in place, a recovered file replaces it first.) Truncating the file takes the guest's
    /// memory away (`SIGBUS`). Replacing it by a rename is safe.
    ///
    /// With [`HugePages::Hugetlbfs2M`] the image is read into pages of the pool at once, because an
    /// ordinary file cannot be mapped by them. [`HugePages::Transparent`] is advice, as for new
    /// memory.
    pub fn from_file(
        layout: &MemoryLayout,
        path: &Path,
        huge_pages: HugePages,
        track_dirty_pages: bool,
    ) -> Result<Self, RestoreError> {
        Self::from_file_with(layout, path, huge_pages, track_dirty_pages, &())
    }

    /// [`Self::from_file`] with an observer, which can cancel it while the image is read or
    /// recovered.
    pub fn from_file_with(
        layout: &MemoryLayout,
        path: &Path,
        huge_pages: HugePages,
        track_dirty_pages: bool,
        observer: &dyn Observer,
    ) -> Result<Self, RestoreError> {
        let read = |source| RestoreError::Read { path: path.to_path_buf(), source };
        let file = open_consistent(path, OFlags::RDONLY, observer)?;
        let found = regular_size(&file, path)?;
        let needed = layout.file_size();
        if found < needed {
            return Err(RestoreError::TooShort { path: path.to_path_buf(), found, needed });
        }
        if partial::is_marked(&file) {
            return Err(RestoreError::Partial { path: path.to_path_buf() });
        }
        if huge_pages != HugePages::Hugetlbfs2M {
            let backing = Backing::File(Arc::new(file));
            return Ok(Self::build(layout.clone(), huge_pages, track_dirty_pages, backing)?);
        }
        let ram = Self::build(layout.clone(), huge_pages, track_dirty_pages, Backing::Anonymous)?;
        // The monitor writes there when it restores the guest, even if the image has a hole there.
        ram.populate(0, MIB)?;
        for (region, span) in layout.regions().iter().zip(ram.spans()) {
            for extent in data_extents(&file, region.offset..region.offset + region.size) {
                let extent = extent.map_err(read)?;
                let mut at = extent.start;
                while at < extent.end {
                    if observer.cancelled() {
                        return Err(RestoreError::Cancelled { path: path.to_path_buf() });
                    }
                    let end = extent.end.min(at + CHUNK);
                    let part = span.subspan(at - region.offset..end - region.offset);
                    ram.populate(region.guest_addr + (at - region.offset), part.len())?;
                    span_io::read_exact(&file, part, at).map_err(read)?;
                    at = end;
                    observer.progress(at, needed);
                }
            }
        }
        Ok(ram)
    }
}
