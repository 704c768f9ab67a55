//! The base of a Diff: whether it may be changed in place, and marking it for that.

use std::fs::{File, Metadata};
use std::os::unix::fs::MetadataExt;
use std::path::Path;

use rustix::fs::OFlags;
use snapshot::FileId;

use super::mark;
use crate::backing::Backing;
use crate::image::file::open_image;
use crate::ram::GuestRam;
use crate::sys::lease;

/// Local file systems that have extended attributes and keep reserved space (fallocate), by the
/// numbers of statfs(2): ext2 to ext4, XFS, tmpfs.
pub(super) const FILE_SYSTEMS: [i64; 3] = [0xef53, 0x5846_5342, 0x0102_1994];

/// A base that may be changed in place if no other process has it open. It holds this
/// process's only open file description of the base, because the lease counts all of them.
enum BaseCandidate<'a> {
    /// The file that the guest is mapped from.
    Mapped(&'a File),
    /// A file open for writing. The guest is not mapped from the base.
    Writable(File),
}

impl<'a> BaseCandidate<'a> {
    /// Opens the base at `path`, if a change in place is possible apart from other users.
    fn open(ram: &'a GuestRam, path: &Path) -> Option<Self> {
        let candidate = match ram.backing() {
            Backing::File(own) if is_at_path(own, path) => BaseCandidate::Mapped(own),
            _ => BaseCandidate::Writable(open_image(path, OFlags::RDWR).ok()?),
        };
        let file_system = rustix::fs::fstatfs(candidate.file()).ok()?.f_type;
        let shared = matches!(candidate, BaseCandidate::Mapped(_)) && ram.is_shared();
        (!shared && candidate.has_one_name(path) && FILE_SYSTEMS.contains(&file_system)).then_some(candidate)
    }

    fn file(&self) -> &File {
        match self {
            BaseCandidate::Mapped(file) => file,
            BaseCandidate::Writable(file) => file,
        }
    }

    /// Whether it is a regular file with the only link `path`.
    fn has_one_name(&self, path: &Path) -> bool {
        let file = self.file();
        file.metadata().is_ok_and(|is| is.is_file() && is.nlink() == 1) && is_at_path(file, path)
    }

    /// The file, open for writing, if no other process has the base open and it is still at `path`.
    fn into_writable(self, path: &Path) -> Option<File> {
        if !lease::is_sole_user(self.file()) || !self.has_one_name(path) {
            return None;
        }
        match self {
            BaseCandidate::Writable(file) => Some(file),
            // Open it only now: the lease would have counted it.
            BaseCandidate::Mapped(own) => {
                let file = open_image(path, OFlags::RDWR).ok()?;
                is_same(&file.metadata().ok()?, &own.metadata().ok()?).then_some(file)
            }
        }
    }
}

fn is_same(one: &Metadata, other: &Metadata) -> bool {
    (one.dev(), one.ino()) == (other.dev(), other.ino())
}

/// Whether `file` is the file at `path`.
pub(super) fn is_at_path(file: &File, path: &Path) -> bool {
    let (Ok(is), Ok(there)) = (file.metadata(), std::fs::metadata(path)) else { return false };
    is_same(&is, &there)
}

/// Opens the base at `path` for a redo log, if a Diff of `ram` could be written in place now.
pub(in crate::image) fn open_base(ram: &GuestRam, path: &Path) -> Option<File> {
    let candidate = BaseCandidate::open(ram, path)?;
    mark::is_possible(candidate.file()).then(|| candidate.into_writable(path))?
}

/// A completed step of a commit: W1 to W6 of [the module](super).
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub(super) enum CommitStep {
    Committed,
    Opened,
    Marked,
    Alone,
    Written,
    Unmarked,
}

/// Marks the base at `path` with `log` and opens it for writing, if no other process has it open:
/// W2 to W4 of [the module](super). If it returns none, the base is unchanged.
pub(super) fn mark_base(
    ram: &GuestRam,
    path: &Path,
    log: FileId,
    reached: &mut dyn FnMut(CommitStep),
) -> Option<File> {
    let candidate = BaseCandidate::open(ram, path)?;
    reached(CommitStep::Opened);
    if mark::get(candidate.file()).ok()?.is_some_and(|other| snapshot::redo_path(path, other).is_some()) {
        return None;
    }
    // A descriptor to remove the mark with.
    let marked = candidate.file().try_clone().ok()?;
    let is_marked = mark::set(&marked, log).is_ok();
    reached(CommitStep::Marked);
    let base = candidate.into_writable(path).filter(|_| is_marked);
    // Another writer may have replaced or removed the mark.
    let base = base.filter(|base| mark::get(base).is_ok_and(|found| found == Some(log)));
    if base.is_none() {
        // A mark that stays is harmless: its log is complete, and removed last.
        let _ = mark::clear(&marked);
        return None;
    }
    reached(CommitStep::Alone);
    base
}
