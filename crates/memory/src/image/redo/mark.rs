//! The mark of a base that is being changed in place: an extended attribute with the id of its redo
//! log. [`redo`](super) says who sets it, who reads it and in which order.

use std::ffi::CStr;
use std::fs::File;
use std::io;

use rustix::fs::{XattrFlags, fgetxattr, fremovexattr, fsetxattr};
use rustix::io::Errno;
use snapshot::FileId;

const ATTRIBUTE: &CStr = c"user.vesta.redo";
/// The attribute that tests whether the file system supports marks.
const PROBE: &CStr = c"user.vesta.probe";

/// Whether `file` can be marked.
pub(super) fn is_possible(file: &File) -> bool {
    fsetxattr(file, PROBE, b"1", XattrFlags::empty()).and_then(|()| fremovexattr(file, PROBE)).is_ok()
}

/// Marks `file` with its redo log. Replaces an older mark. The file may be open read-only.
pub(super) fn set(file: &File, log: FileId) -> rustix::io::Result<()> {
    fsetxattr(file, ATTRIBUTE, log.to_string().as_bytes(), XattrFlags::empty())
}

/// Removes the mark.
pub(super) fn clear(file: &File) -> rustix::io::Result<()> {
    fremovexattr(file, ATTRIBUTE)
}

/// The redo log that `file` is marked with.
pub(super) fn get(file: &File) -> io::Result<Option<FileId>> {
    let mut id = [0; 16];
    match fgetxattr(file, ATTRIBUTE, &mut id[..]) {
        Ok(len) => Ok(id.get(..len).and_then(|id| std::str::from_utf8(id).ok()?.parse().ok())),
        // There is none, the file system supports none, or it is too long to be an id.
        Err(Errno::NODATA | Errno::OPNOTSUPP | Errno::NOSYS | Errno::RANGE) => Ok(None),
        Err(e) => Err(e.into()),
    }
}
