//! A file that is written without a name and then renamed to its path.

use std::ffi::OsStr;
use std::fs::File;
use std::os::fd::OwnedFd;
use std::path::Path;

use rustix::fs::{AtFlags, CWD, FileType, FlockOperation, Mode, Stat, StatxAttributes, StatxFlags};
use rustix::io::Errno;

use super::destination::{Destination, FileError, REDO_SUFFIX, SUFFIX, open_dir, proc_path, resolve};
use super::id::FileId;

/// A file that is being written and has no final name yet. Dropping it removes it.
#[derive(Debug)]
pub struct AtomicFile {
    file: File,
    destination: Destination,
}

/// A file that is complete and has no final name yet. Dropping it removes it.
#[derive(Debug)]
pub struct Staged {
    pub(super) file: File,
    pub(super) destination: Destination,
}

impl AtomicFile {
    /// Creates the file that will replace `path`.
    ///
    /// A symbolic link at `path` stays, and its target is replaced. An existing file must be a
    /// regular file that a rename can replace; the new file gets its permissions.
    pub fn create(path: &Path) -> Result<Self, FileError> {
        Self::create_as(path, SUFFIX)
    }

    /// Creates a redo log of the file at `path`: for [`commit_redo`](super::commit_redo).
    pub fn create_redo(path: &Path) -> Result<Self, FileError> {
        Self::create_as(path, REDO_SUFFIX)
    }

    fn create_as(path: &Path, suffix: &'static str) -> Result<Self, FileError> {
        let target = resolve(path);
        let failed =
            |source: std::io::Error| FileError { action: "create", path: path.to_path_buf(), source };
        let invalid = |text| failed(std::io::Error::new(std::io::ErrorKind::InvalidInput, text));
        let name = target.file_name().ok_or_else(|| invalid("the path has no file name"))?.to_os_string();
        let dir = open_dir(&target).map_err(|e| failed(e.into()))?;
        let existing = match rustix::fs::statat(&dir, &name, AtFlags::SYMLINK_NOFOLLOW) {
            Ok(stat) => match FileType::from_raw_mode(stat.st_mode) {
                FileType::RegularFile => Some(stat),
                FileType::Symlink => {
                    return Err(invalid("it is a symbolic link to a file that does not exist"));
                }
                _ => return Err(invalid("it is not a regular file")),
            },
            Err(Errno::NOENT) => None,
            Err(e) => return Err(failed(e.into())),
        };
        let existing = existing.as_ref();
        if let Some(reason) = existing.and_then(|stat| why_not_replaceable(&dir, &name, stat)) {
            return Err(invalid(reason));
        }
        let id = FileId::random().map_err(failed)?;
        let mut destination = Destination { path: path.to_path_buf(), dir, name, id, suffix, linked: false };
        let file = destination.open().map_err(|e| failed(e.into()))?;
        // A locked file is not removed as a leftover. On a file system without locks no file is.
        let _ = rustix::fs::flock(&file, FlockOperation::NonBlockingLockExclusive);
        if let Some(stat) = existing {
            // Keep the old file's permissions. If this process may not set them, the default stays.
            let _ = rustix::fs::fchmod(&file, Mode::from_raw_mode(stat.st_mode));
        }
        Ok(AtomicFile { file, destination })
    }

    /// The open file, for reading and writing.
    pub fn file(&self) -> &File {
        &self.file
    }

    /// The id of the file, for the state file.
    pub fn id(&self) -> FileId {
        self.destination.id
    }

    /// The final path.
    pub fn path(&self) -> &Path {
        &self.destination.path
    }

    /// Declares the file complete.
    pub fn stage(self) -> Staged {
        let AtomicFile { file, destination } = self;
        Staged { file, destination }
    }

    /// [`Self::stage`] and [`Staged::commit`].
    pub fn commit(self) -> Result<File, FileError> {
        self.stage().commit()
    }
}

impl Staged {
    /// Syncs the file, gives it its final name, which replaces an older file, and syncs the
    /// directory.
    pub fn commit(mut self) -> Result<File, FileError> {
        self.sync()?;
        self.link()?;
        let Staged { file, mut destination } = self;
        destination.rename()?;
        destination.sync_dir()?;
        destination.remove_leftovers();
        Ok(file)
    }

    /// The id of the file.
    pub fn id(&self) -> FileId {
        self.destination.id
    }

    /// Syncs the file.
    pub(super) fn sync(&self) -> Result<(), FileError> {
        self.file.sync_all().map_err(|source| self.destination.error("write", source))
    }

    /// Gives the file its temporary name, unless it has it already.
    pub(super) fn link(&mut self) -> Result<(), FileError> {
        let Staged { file, destination } = self;
        if !destination.linked {
            let temporary = destination.temporary();
            rustix::fs::linkat(CWD, proc_path(file), &destination.dir, &temporary, AtFlags::SYMLINK_FOLLOW)
                .map_err(|e| destination.error("name", e.into()))?;
            destination.linked = true;
        }
        Ok(())
    }
}

/// Why no rename can replace `name` in `dir`, whose status is `stat`. `None` if no reason is known.
fn why_not_replaceable(dir: &OwnedFd, name: &OsStr, stat: &Stat) -> Option<&'static str> {
    let attributes = |name: &OsStr, flags| {
        // Without statx (Linux before 4.11, a seccomp filter) the rename decides.
        rustix::fs::statx(dir, name, flags, StatxFlags::BASIC_STATS).map(|file| file.stx_attributes)
    };
    if let Ok(file) = attributes(name, AtFlags::SYMLINK_NOFOLLOW) {
        if file.contains(StatxAttributes::MOUNT_ROOT) {
            return Some("it is a mount point, which no new file can replace; mount its directory instead");
        }
        if file.intersects(StatxAttributes::IMMUTABLE | StatxAttributes::APPEND) {
            return Some("it is immutable or append-only (chattr), so that no new file can replace it");
        }
    }
    if attributes(OsStr::new(""), AtFlags::EMPTY_PATH).is_ok_and(|dir| dir.contains(StatxAttributes::APPEND))
    {
        return Some("its directory is append-only (chattr), so that no new file can replace it");
    }
    let dir = rustix::fs::fstat(dir).ok()?;
    let user = rustix::process::geteuid();
    let is_sticky = Mode::from_raw_mode(dir.st_mode).contains(Mode::SVTX);
    let owners = [dir.st_uid, stat.st_uid];
    // Root has CAP_FOWNER unless it was dropped; then the rename itself fails.
    if is_sticky && !user.is_root() && !owners.contains(&user.as_raw()) {
        return Some(
            "it is another user's, in a directory with the sticky bit, so that no new file can replace it",
        );
    }
    None
}
