//! Where a file is to go: its directory, its final name and its temporary name.

use std::ffi::{OsStr, OsString};
use std::fs::File;
use std::os::fd::{AsRawFd, OwnedFd};
use std::os::unix::ffi::OsStrExt;
use std::path::{Path, PathBuf};

use rustix::fs::{AtFlags, CWD, Dir, FlockOperation, Mode, OFlags, RenameFlags};
use rustix::io::Errno;

use super::id::FileId;

/// The suffix of temporary names.
pub(super) const SUFFIX: &str = "vesta-tmp";
/// The suffix of the names of redo logs.
pub(super) const REDO_SUFFIX: &str = "vesta-redo";
/// The longest file name that Linux takes, in bytes.
pub(super) const NAME_MAX: usize = 255;
/// Permissions of a new file, before the umask.
const NEW_FILE_MODE: u32 = 0o666;

/// Why a file could not be created, written or renamed.
#[derive(Debug, thiserror::Error)]
#[error("file {}: cannot {action}: {source}", path.display())]
pub struct FileError {
    /// The operation that failed, in words.
    pub action: &'static str,
    /// The final path of the file.
    pub path: PathBuf,
    /// The kernel's reason.
    pub source: std::io::Error,
}

/// The destination of a file. Dropping it removes the temporary name if that exists.
#[derive(Debug)]
pub(super) struct Destination {
    /// The path as the caller gave it: for error messages.
    pub(super) path: PathBuf,
    /// The directory, with symbolic links resolved.
    pub(super) dir: OwnedFd,
    /// The final name in `dir`.
    pub(super) name: OsString,
    pub(super) id: FileId,
    /// [`SUFFIX`] or [`REDO_SUFFIX`].
    pub(super) suffix: &'static str,
    /// Whether the temporary name exists.
    pub(super) linked: bool,
}

impl Destination {
    /// Creates the file: without a name if possible, else under its temporary name.
    pub(super) fn open(&mut self) -> rustix::io::Result<File> {
        let flags = OFlags::RDWR | OFlags::CLOEXEC;
        let mode = Mode::from_raw_mode(NEW_FILE_MODE);
        if let Ok(file) = rustix::fs::openat(&self.dir, c".", flags | OFlags::TMPFILE, mode) {
            let file = File::from(file);
            // Linking it needs /proc, which a jail may not have.
            if rustix::fs::stat(proc_path(&file)).is_ok() {
                return Ok(file);
            }
        }
        // If O_TMPFILE failed for another reason than missing support, this fails too and reports
        // it.
        let file =
            rustix::fs::openat(&self.dir, self.temporary(), flags | OFlags::CREATE | OFlags::EXCL, mode)?;
        self.linked = true;
        Ok(File::from(file))
    }

    /// The temporary name.
    pub(super) fn temporary(&self) -> OsString {
        temporary_name(&self.name, self.id, self.suffix)
    }

    pub(super) fn error(&self, action: &'static str, source: std::io::Error) -> FileError {
        FileError { action, path: self.path.clone(), source }
    }

    /// Gives the file its final name and replaces an older file.
    pub(super) fn rename(&mut self) -> Result<(), FileError> {
        rustix::fs::renameat(&self.dir, self.temporary(), &self.dir, &self.name)
            .map_err(|e| self.error("replace", e.into()))?;
        self.linked = false;
        Ok(())
    }

    /// Gives the file its final name. Keeps an older file under the temporary name if the file
    /// system can exchange two names.
    pub(super) fn exchange_or_rename(&mut self) -> Result<Replaced, FileError> {
        match self.exchange() {
            Ok(()) => Ok(Replaced::Exchanged),
            Err(Errno::NOENT) => self.rename().map(|()| Replaced::Nothing),
            Err(_) => self.rename().map(|()| Replaced::Gone),
        }
    }

    /// Exchanges the temporary and the final name.
    pub(super) fn exchange(&self) -> rustix::io::Result<()> {
        let temporary = self.temporary();
        rustix::fs::renameat_with(&self.dir, &temporary, &self.dir, &self.name, RenameFlags::EXCHANGE)
    }

    /// Syncs the directory, so that its names are on disk.
    pub(super) fn sync_dir(&self) -> Result<(), FileError> {
        rustix::fs::fsync(&self.dir).map_err(|e| self.error("sync its directory", e.into()))
    }

    /// Removes the temporary files and redo logs that killed writers of this name left behind. None
    /// is needed any more, because the state that they belonged to is replaced. What cannot be
    /// removed stays.
    pub(super) fn remove_leftovers(&self) {
        let Ok(entries) = Dir::read_from(&self.dir) else { return };
        for name in entries.flatten().map(|entry| entry.file_name().to_owned()) {
            let ours = [SUFFIX, REDO_SUFFIX].into_iter().any(|suffix| {
                let id = OsStr::from_bytes(name.to_bytes()).to_str().and_then(|name| {
                    name.strip_suffix(suffix)?.strip_suffix('.')?.rsplit('.').next()?.parse::<FileId>().ok()
                });
                id.is_some_and(|id| {
                    id != self.id && temporary_name(&self.name, id, suffix).as_bytes() == name.to_bytes()
                })
            });
            if !ours {
                continue;
            }
            let flags = OFlags::RDONLY | OFlags::NOFOLLOW | OFlags::NONBLOCK | OFlags::CLOEXEC;
            let Ok(file) = rustix::fs::openat(&self.dir, &name, flags, Mode::empty()) else { continue };
            // If it is locked, its writer lives.
            if rustix::fs::flock(&file, FlockOperation::NonBlockingLockExclusive).is_ok() {
                let _ = rustix::fs::unlinkat(&self.dir, &name, AtFlags::empty());
            }
        }
    }

    /// Device and inode of the directory.
    pub(super) fn dir_identity(&self) -> Option<(u64, u64)> {
        rustix::fs::fstat(&self.dir).ok().map(|stat| (stat.st_dev, stat.st_ino))
    }
}

impl Drop for Destination {
    fn drop(&mut self) {
        if self.linked {
            let _ = rustix::fs::unlinkat(&self.dir, self.temporary(), AtFlags::empty());
        }
    }
}

/// What [`Destination::exchange_or_rename`] did to an older file.
pub(super) enum Replaced {
    /// It has the temporary name now.
    Exchanged,
    /// There was no older file.
    Nothing,
    /// It was replaced and is gone.
    Gone,
}

/// `NAME.ID.SUFFIX`, with `name` cut so that the result fits [`NAME_MAX`].
pub(super) fn temporary_name(name: &OsStr, id: FileId, suffix: &str) -> OsString {
    let ending = format!(".{id}.{suffix}");
    let stem = name.as_bytes();
    let stem = &stem[..stem.len().min(NAME_MAX - ending.len())];
    let mut temporary = OsStr::from_bytes(stem).to_os_string();
    temporary.push(ending);
    temporary
}

/// `path` with symbolic links resolved; `path` itself if it does not exist.
pub(super) fn resolve(path: &Path) -> PathBuf {
    std::fs::canonicalize(path).unwrap_or_else(|_| path.to_path_buf())
}

/// The directory of `target`.
pub(super) fn parent_of(target: &Path) -> &Path {
    match target.parent() {
        Some(parent) if !parent.as_os_str().is_empty() => parent,
        _ => Path::new("."),
    }
}

/// Opens the directory of `target`.
pub(super) fn open_dir(target: &Path) -> rustix::io::Result<OwnedFd> {
    rustix::fs::openat(
        CWD,
        parent_of(target),
        OFlags::RDONLY | OFlags::DIRECTORY | OFlags::CLOEXEC,
        Mode::empty(),
    )
}

/// The name of an open file under `/proc`.
pub(super) fn proc_path(file: &File) -> String {
    format!("/proc/self/fd/{}", file.as_raw_fd())
}
