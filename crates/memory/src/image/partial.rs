//! The mark of a Diff that was not merged, which distinguishes it from a whole image.
//!
//! Both are files of the same size. A guest restored from such a Diff would find zeros in place of
//! all that is only in the base.
//!
//! The mark is an extended attribute. It only protects against mistakes: on a file system without
//! such attributes, or on a copy made without them, the Diff is taken for an image. A merge writes
//! to a new file or to the base. The result is marked only if the base itself was such a Diff.

use std::fs::File;

use rustix::fs::{XattrFlags, fgetxattr, fsetxattr};

const ATTRIBUTE: &std::ffi::CStr = c"user.vesta.partial";

/// Marks `file` as a Diff that needs its base.
pub(super) fn mark(file: &File) {
    // Not every file system supports it.
    let _ = fsetxattr(file, ATTRIBUTE, b"1", XattrFlags::empty());
}

/// Whether `file` is marked.
pub(super) fn is_marked(file: &File) -> bool {
    fgetxattr(file, ATTRIBUTE, &mut [0u8; 1]).is_ok()
}
