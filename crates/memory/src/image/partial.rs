//! Telling a Diff that stands alone from an image: both are files of the same size, and a guest that went on from the Diff would find
//! zeros in place of all that is only in the base.
//!
//! Such a file has an extended attribute. It is advice to whoever would load the file by mistake: where a file system has no such
//! attributes, or a copy was made without them, there is none, and the file is taken for an image. Merging makes another file, which has none, or changes
//! the base, which has none either, unless it is such a Diff itself.

use std::fs::File;

use rustix::fs::{XattrFlags, fgetxattr, fsetxattr};

const ATTRIBUTE: &std::ffi::CStr = c"user.vesta.partial";

/// Marks `file` as one that needs its base.
pub(super) fn mark(file: &File) {
    // Advice: not every file system takes it.
    let _ = fsetxattr(file, ATTRIBUTE, b"1", XattrFlags::empty());
}

/// Whether `file` is marked.
pub(super) fn is_marked(file: &File) -> bool {
    fgetxattr(file, ATTRIBUTE, &mut [0u8; 1]).is_ok()
}
