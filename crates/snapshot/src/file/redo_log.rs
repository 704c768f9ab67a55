//! The redo log of a file that is changed in place.

use std::fs::File;
use std::path::{Path, PathBuf};

use rustix::fs::{AtFlags, FlockOperation, Mode, OFlags};
use rustix::io::Errno;

use super::atomic::Staged;
use super::destination::{Destination, FileError, REDO_SUFFIX, open_dir, resolve};
use super::id::FileId;

/// The locked redo log of a file: see `file`, "Changes in place". Dropping the value
/// unlocks it and leaves it on disk.
#[derive(Debug)]
pub struct RedoLog {
    file: File,
    destination: Destination,
}

impl RedoLog {
    /// Takes over a staged log, which from now on stays on disk.
    pub(super) fn from_staged(staged: Staged) -> Self {
        let Staged { file, mut destination } = staged;
        destination.linked = false;
        RedoLog { file, destination }
    }

    /// Opens and locks the redo log `id` of the file at `path`, if there is one. The error is
    /// `WouldBlock` while another process writes or applies it.
    pub fn open(path: &Path, id: FileId) -> Result<Option<Self>, FileError> {
        let failed = |source: Errno| FileError {
            action: "open its redo log",
            path: path.to_path_buf(),
            source: source.into(),
        };
        let target = resolve(path);
        let Some(name) = target.file_name() else { return Ok(None) };
        let dir = match open_dir(&target) {
            Ok(dir) => dir,
            Err(Errno::NOENT | Errno::NOTDIR) => return Ok(None),
            Err(e) => return Err(failed(e)),
        };
        let name = name.to_os_string();
        let destination =
            Destination { path: path.to_path_buf(), dir, name, id, suffix: REDO_SUFFIX, linked: false };
        let flags = OFlags::RDONLY | OFlags::NOFOLLOW | OFlags::NONBLOCK | OFlags::CLOEXEC;
        let file = match rustix::fs::openat(&destination.dir, destination.temporary(), flags, Mode::empty()) {
            Ok(file) => File::from(file),
            Err(Errno::NOENT) => return Ok(None),
            Err(e) => return Err(failed(e)),
        };
        match rustix::fs::flock(&file, FlockOperation::NonBlockingLockExclusive) {
            // Without locks, no other user can be detected.
            Ok(()) | Err(Errno::NOLCK | Errno::OPNOTSUPP | Errno::NOSYS) => {}
            Err(e) => return Err(failed(e)),
        }
        // The previous owner of the lock may have removed it.
        let links = rustix::fs::fstat(&file).map_err(failed)?.st_nlink;
        Ok((links > 0).then_some(RedoLog { file, destination }))
    }

    /// The open log.
    pub fn file(&self) -> &File {
        &self.file
    }

    /// The id by which the state file names the file with this log applied.
    pub fn id(&self) -> FileId {
        self.destination.id
    }

    /// The path of the log.
    pub fn path(&self) -> PathBuf {
        self.destination.path.with_file_name(self.destination.temporary())
    }

    /// Removes the log. The file must hold its changes, synced.
    pub fn remove(self) -> Result<(), FileError> {
        rustix::fs::unlinkat(&self.destination.dir, self.destination.temporary(), AtFlags::empty())
            .map_err(|e| self.destination.error("remove its redo log", e.into()))?;
        self.destination.sync_dir()?;
        self.destination.remove_leftovers();
        Ok(())
    }
}
