//! What the state file says about the memory image.

use config::HugePages;
use serde::{Deserialize, Serialize};
use snapshot::{FileId, Section};

use crate::layout::MemoryLayout;

/// The description of a memory image, as a section of the state file.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct ImageInfo {
    /// Where the regions are in the image.
    pub layout: MemoryLayout,
    /// Whether it is the whole memory or pages on top of a base.
    pub kind: ImageKind,
    /// The id of the file: for [`snapshot::find`].
    pub id: FileId,
    /// The kind of pages that backed the memory. A restore with `"huge_pages": "Snapshot"` uses it.
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
    /// Some pages, to be merged onto a base. They are merged already if a file of the same size was
    /// at the path; [`ImageFile::partial`](super::ImageFile::partial) tells which.
    Diff,
}
