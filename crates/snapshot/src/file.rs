//! Files that appear under their name whole, or not at all.
//!
//! An [`AtomicFile`] has no name while it is written (`O_TMPFILE`), so that a writer that is killed
//! leaves nothing. Where the file system or a missing `/proc` does not allow that, it has a
//! temporary name beside the final one, `NAME.ID.vesta-tmp`, which goes away with the value; only a
//! killed writer leaves it behind, for the next one of that name to remove: a file is locked for as
//! long as its writer lives. A file that is complete ([`AtomicFile::stage`]) is put on disk, gets
//! the temporary name, and then the final name by a rename ([`Staged::commit`]), which replaces an
//! older file in one step. A writer that is stuck in a sync, or is killed there, has therefore left
//! no name behind.
//!
//! # Changes in place
//!
//! A few changes of a large file need not be a new file: they are first put into a redo log beside
//! it, `NAME.ID.vesta-redo` ([`AtomicFile::create_redo`]). [`commit_redo`] makes the log and the
//! state file that names its id appear as one step; from then on the file is what it holds together
//! with the log. The owner of the log's lock may then write the changes to the file, as often as it
//! takes, and remove the log ([`RedoLog`]).
//!
//! # Targets
//!
//! A file that cannot be renamed over is refused by [`AtomicFile::create`], before anything is
//! written: a mount point (a bind mount in a jail), a file that is immutable, append-only or
//! protected by a sticky directory, a symbolic link to nothing, anything that is not a regular
//! file. Such a file is never written in place: half of it would be old when the host fails, and a
//! guest that maps it would see the change.
//!
//! A snapshot is two files, and no file system renames two in one step. [`commit_pair`] makes the state file's rename the
//! moment that counts: the memory file is staged under a name that holds its [`FileId`], the state file names that id,
//! and if the machine dies between the two renames, [`find`] still finds the memory that belongs to the state.

use std::ffi::{OsStr, OsString};
use std::fmt;
use std::fs::File;
use std::os::fd::{AsRawFd, OwnedFd};
use std::os::unix::ffi::OsStrExt;
use std::path::{Path, PathBuf};
use std::str::FromStr;

use rustix::fs::{
    AtFlags, CWD, Dir, FileType, FlockOperation, Mode, OFlags, RenameFlags, Stat, StatxAttributes, StatxFlags,
};
use rustix::io::Errno;
use serde::{Deserialize, Serialize};

/// How temporary names end.
const SUFFIX: &str = "vesta-tmp";
/// How the names of redo logs end.
const REDO_SUFFIX: &str = "vesta-redo";
/// The longest file name that Linux takes.
const NAME_MAX: usize = 255;
/// Permissions of a new file, before the umask.
const NEW_FILE_MODE: u32 = 0o666;

/// Why a file could not be put in its place.
#[derive(Debug, thiserror::Error)]
#[error("cannot {action} {}: {source}", path.display())]
pub struct FileError {
    /// What was tried, in words.
    pub action: &'static str,
    /// The file, under its final name.
    pub path: PathBuf,
    /// The kernel's reason.
    pub source: std::io::Error,
}

/// A random number that tells one file from all others; 16 hexadecimal digits in text and in state files.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(into = "String", try_from = "String")]
pub struct FileId(u64);

impl FileId {
    /// A new one.
    pub fn random() -> std::io::Result<Self> {
        let mut bytes = [0; 8];
        let got = rustix::rand::getrandom(&mut bytes, rustix::rand::GetRandomFlags::empty())?;
        debug_assert_eq!(got, bytes.len(), "getrandom gives up to 256 bytes at once");
        Ok(FileId(u64::from_le_bytes(bytes)))
    }
}

impl fmt::Display for FileId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:016x}", self.0)
    }
}

impl From<FileId> for String {
    fn from(id: FileId) -> String {
        id.to_string()
    }
}

impl FromStr for FileId {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let digits = text.len() == 16 && text.bytes().all(|b| b.is_ascii_hexdigit());
        match u64::from_str_radix(text, 16) {
            Ok(id) if digits => Ok(FileId(id)),
            _ => Err(format!("a file id is 16 hexadecimal digits, not {text:?}")),
        }
    }
}

impl TryFrom<String> for FileId {
    type Error = String;

    fn try_from(text: String) -> Result<Self, String> {
        text.parse()
    }
}

/// A file that is being written and has no name yet. Dropping it leaves nothing.
#[derive(Debug)]
pub struct AtomicFile {
    file: File,
    place: Place,
}

/// A file that is complete and has no final name yet. Dropping it removes it.
#[derive(Debug)]
pub struct Staged {
    file: File,
    place: Place,
}

/// Where a file is to go, and whether its temporary name exists.
#[derive(Debug)]
struct Place {
    path: PathBuf,
    dir: OwnedFd,
    name: OsString,
    id: FileId,
    /// How the temporary name ends.
    suffix: &'static str,
    linked: bool,
}

/// The redo log of a file, locked: see [the module](self#changes-in-place). It stays when the value
/// is dropped.
#[derive(Debug)]
pub struct RedoLog {
    file: File,
    place: Place,
}

impl AtomicFile {
    /// Begins a file that will be `path`.
    ///
    /// A symbolic link at `path` stays, and what it points to is replaced. What is there must be a
    /// regular file that can be renamed over; the new one takes on its permissions.
    pub fn create(path: &Path) -> Result<Self, FileError> {
        Self::create_as(path, SUFFIX)
    }

    /// Begins a redo log of the file at `path`: for [`commit_redo`].
    pub fn create_redo(path: &Path) -> Result<Self, FileError> {
        Self::create_as(path, REDO_SUFFIX)
    }

    fn create_as(path: &Path, suffix: &'static str) -> Result<Self, FileError> {
        let target = std::fs::canonicalize(path).unwrap_or_else(|_| path.to_path_buf());
        let failed =
            |source: std::io::Error| FileError { action: "create", path: path.to_path_buf(), source };
        let invalid = |text| failed(std::io::Error::new(std::io::ErrorKind::InvalidInput, text));
        let name = target.file_name().ok_or_else(|| invalid("the path ends in no name"))?.to_os_string();
        let dir = open_dir(&target).map_err(|e| failed(e.into()))?;
        let existing = match rustix::fs::statat(&dir, &name, AtFlags::SYMLINK_NOFOLLOW) {
            Ok(stat) => match FileType::from_raw_mode(stat.st_mode) {
                FileType::RegularFile => Some(stat),
                FileType::Symlink => {
                    return Err(invalid("it is a symbolic link to a file that does not exist"));
                }
                _ => return Err(invalid("what is there is not a regular file")),
            },
            Err(Errno::NOENT) => None,
            Err(e) => return Err(failed(e.into())),
        };
        let existing = existing.as_ref();
        if let Some(reason) = existing.and_then(|stat| why_not_replaceable(&dir, &name, stat)) {
            return Err(invalid(reason));
        }
        let id = FileId::random().map_err(failed)?;
        let mut place = Place { path: path.to_path_buf(), dir, name, id, suffix, linked: false };
        let file = place.open().map_err(|e| failed(e.into()))?;
        // Whoever finds it locked leaves it alone. A file system without locks has no such finders either.
        let _ = rustix::fs::flock(&file, FlockOperation::NonBlockingLockExclusive);
        if let Some(stat) = existing {
            // Who could read the old file can read the new one; where that is not for us to say, the default stays.
            let _ = rustix::fs::fchmod(&file, Mode::from_raw_mode(stat.st_mode));
        }
        Ok(AtomicFile { file, place })
    }

    /// The file to write to; it can be read as well.
    pub fn file(&self) -> &File {
        &self.file
    }

    /// What tells this file from others: for the state file to name.
    pub fn id(&self) -> FileId {
        self.place.id
    }

    /// The name that it will have.
    pub fn path(&self) -> &Path {
        &self.place.path
    }

    /// Declares the file complete: all is written.
    pub fn stage(self) -> Staged {
        let AtomicFile { file, place } = self;
        Staged { file, place }
    }

    /// [`Self::stage`] and [`Staged::commit`].
    pub fn commit(self) -> Result<File, FileError> {
        self.stage().commit()
    }
}

impl Staged {
    /// Puts the file on disk, gives it its final name, in place of an older one, and puts the name on disk.
    pub fn commit(mut self) -> Result<File, FileError> {
        self.sync()?;
        self.link()?;
        let Staged { file, mut place } = self;
        place.rename()?;
        place.sync_dir()?;
        place.collect();
        Ok(file)
    }

    /// What tells this file from others.
    pub fn id(&self) -> FileId {
        self.place.id
    }

    fn sync(&self) -> Result<(), FileError> {
        self.file.sync_all().map_err(|source| self.place.error("write", source))
    }

    /// Gives the file its temporary name, unless it has it already.
    fn link(&mut self) -> Result<(), FileError> {
        let Staged { file, place } = self;
        if !place.linked {
            let temporary = place.temporary();
            rustix::fs::linkat(CWD, proc_path(file), &place.dir, &temporary, AtFlags::SYMLINK_FOLLOW)
                .map_err(|e| place.error("name", e.into()))?;
            place.linked = true;
        }
        Ok(())
    }
}

/// Why no other file can take the place of `name` in `dir`, which `stat` describes; `None` where
/// nothing is known against it.
fn why_not_replaceable(dir: &OwnedFd, name: &OsStr, stat: &Stat) -> Option<&'static str> {
    let attributes = |name: &OsStr, flags| {
        // Linux before 4.11, or a filter: the rename finds out.
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
    // Root has CAP_FOWNER unless it was taken away; then the rename finds out.
    if is_sticky && !user.is_root() && !owners.contains(&user.as_raw()) {
        return Some(
            "it is another user's, in a directory with the sticky bit, so that no new file can replace it",
        );
    }
    None
}

impl Place {
    fn open(&mut self) -> rustix::io::Result<File> {
        let flags = OFlags::RDWR | OFlags::CLOEXEC;
        let mode = Mode::from_raw_mode(NEW_FILE_MODE);
        if let Ok(file) = rustix::fs::openat(&self.dir, c".", flags | OFlags::TMPFILE, mode) {
            let file = File::from(file);
            // It gets its name through /proc, which a jail may not have.
            if rustix::fs::stat(proc_path(&file)).is_ok() {
                return Ok(file);
            }
        }
        // A reason other than a missing O_TMPFILE meets this as well, and is reported by it.
        let file =
            rustix::fs::openat(&self.dir, self.temporary(), flags | OFlags::CREATE | OFlags::EXCL, mode)?;
        self.linked = true;
        Ok(File::from(file))
    }

    fn temporary(&self) -> OsString {
        temporary_name(&self.name, self.id, self.suffix)
    }

    fn error(&self, action: &'static str, source: std::io::Error) -> FileError {
        FileError { action, path: self.path.clone(), source }
    }

    fn rename(&mut self) -> Result<(), FileError> {
        rustix::fs::renameat(&self.dir, self.temporary(), &self.dir, &self.name)
            .map_err(|e| self.error("replace", e.into()))?;
        self.linked = false;
        Ok(())
    }

    /// Gives the file its final name, and keeps an older one under the temporary name where the
    /// file system can.
    fn put(&mut self) -> Result<Replaced, FileError> {
        match self.exchange() {
            Ok(()) => Ok(Replaced::Exchanged),
            Err(Errno::NOENT) => self.rename().map(|()| Replaced::Nothing),
            Err(_) => self.rename().map(|()| Replaced::ForGood),
        }
    }

    /// Swaps the temporary and the final name.
    fn exchange(&self) -> rustix::io::Result<()> {
        let temporary = self.temporary();
        rustix::fs::renameat_with(&self.dir, &temporary, &self.dir, &self.name, RenameFlags::EXCHANGE)
    }

    fn sync_dir(&self) -> Result<(), FileError> {
        rustix::fs::fsync(&self.dir).map_err(|e| self.error("put on disk the name of", e.into()))
    }

    /// Removes what killed writers of this name left behind. None of it is wanted: what belonged to an older state file is replaced, now as it would have
    /// been had its writer lived. What cannot be removed stays.
    fn collect(&self) {
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
            // Its writer lives otherwise.
            if rustix::fs::flock(&file, FlockOperation::NonBlockingLockExclusive).is_ok() {
                let _ = rustix::fs::unlinkat(&self.dir, &name, AtFlags::empty());
            }
        }
    }

    /// Which directory it is in.
    fn directory(&self) -> Option<(u64, u64)> {
        rustix::fs::fstat(&self.dir).ok().map(|stat| (stat.st_dev, stat.st_ino))
    }
}

impl Drop for Place {
    fn drop(&mut self) {
        if self.linked {
            let _ = rustix::fs::unlinkat(&self.dir, self.temporary(), AtFlags::empty());
        }
    }
}

/// Gives a memory file and the state file that names its [`FileId`] their final names, as one step: whoever dies in
/// between leaves the old pair, or the new one for [`find`] to complete.
///
/// On an error the old pair is there as before. The exception is a file system that cannot exchange two names: if the
/// memory file's rename fails there, the new state stays, and its memory under the name that [`find`] knows.
pub fn commit_pair(mut memory: Staged, mut state: Staged) -> Result<(), FileError> {
    sync_both(&memory, &state)?;
    memory.link()?;
    state.link()?;
    let mut memory = memory.place;
    let mut state = state.place;
    // A directory keeps its renames in order. Two do not know of each other: each step is put on
    // disk by itself.
    let apart = memory.directory() != state.directory();
    if apart {
        memory.sync_dir()?;
    }
    let replaced = state.put()?;
    let renamed = if apart { state.sync_dir().and_then(|()| memory.rename()) } else { memory.rename() };
    if let Err(e) = renamed {
        match replaced {
            // Back again; what is dropped next are the new files.
            Replaced::Exchanged => state.exchange().map_err(|e| state.error("put back", e.into()))?,
            Replaced::Nothing => rustix::fs::unlinkat(&state.dir, &state.name, AtFlags::empty())
                .map_err(|e| state.error("remove", e.into()))?,
            Replaced::ForGood => memory.linked = false,
        }
        return Err(e);
    }
    // The old state, if it was exchanged, has the temporary name now and goes with `state`.
    state.sync_dir()?;
    memory.sync_dir()?;
    memory.collect();
    state.collect();
    Ok(())
}

/// Makes a redo log and the state file that names its [`FileId`] appear as one step: a kill
/// before it leaves the old state, and after it the new one with the log. Without a state, the log
/// alone appears.
///
/// On an error before that step the old state is there as before, and no log. The log is never
/// removed after it.
pub fn commit_redo(mut redo: Staged, state: Option<Staged>) -> Result<RedoLog, FileError> {
    let Some(mut state) = state else {
        redo.sync()?;
        redo.link()?;
        redo.place.sync_dir()?;
        return Ok(redo.into_log());
    };
    sync_both(&redo, &state)?;
    redo.link()?;
    state.link()?;
    if redo.place.directory() != state.place.directory() {
        redo.place.sync_dir()?;
    }
    state.place.put()?;
    // The old state, if it was exchanged, has the temporary name now and goes with `state`.
    let log = redo.into_log();
    state.place.sync_dir()?;
    state.place.collect();
    Ok(log)
}

/// Puts both files on disk, at once: a file system makes one commit of its journal of both.
fn sync_both(one: &Staged, other: &Staged) -> Result<(), FileError> {
    std::thread::scope(|scope| {
        let first = std::thread::Builder::new().name("sync".into()).spawn_scoped(scope, || one.sync());
        other.sync()?;
        match first {
            Ok(first) => first.join().unwrap_or_else(|panic| std::panic::resume_unwind(panic)),
            Err(_) => one.sync(),
        }
    })
}

impl Staged {
    /// From here on it stays.
    fn into_log(self) -> RedoLog {
        let Staged { file, mut place } = self;
        place.linked = false;
        RedoLog { file, place }
    }
}

impl RedoLog {
    /// Opens the redo log `id` of the file at `path`, if there is one. One that another process
    /// writes or applies is `WouldBlock`.
    pub fn open(path: &Path, id: FileId) -> Result<Option<Self>, FileError> {
        let failed = |source: Errno| FileError {
            action: "use the redo log of",
            path: path.to_path_buf(),
            source: source.into(),
        };
        let target = std::fs::canonicalize(path).unwrap_or_else(|_| path.to_path_buf());
        let Some(name) = target.file_name() else { return Ok(None) };
        let dir = match open_dir(&target) {
            Ok(dir) => dir,
            Err(Errno::NOENT | Errno::NOTDIR) => return Ok(None),
            Err(e) => return Err(failed(e)),
        };
        let name = name.to_os_string();
        let place = Place { path: path.to_path_buf(), dir, name, id, suffix: REDO_SUFFIX, linked: false };
        let flags = OFlags::RDONLY | OFlags::NOFOLLOW | OFlags::NONBLOCK | OFlags::CLOEXEC;
        let file = match rustix::fs::openat(&place.dir, place.temporary(), flags, Mode::empty()) {
            Ok(file) => File::from(file),
            Err(Errno::NOENT) => return Ok(None),
            Err(e) => return Err(failed(e)),
        };
        match rustix::fs::flock(&file, FlockOperation::NonBlockingLockExclusive) {
            // A file system without locks has one user at a time, or none that could be asked.
            Ok(()) | Err(Errno::NOLCK | Errno::OPNOTSUPP | Errno::NOSYS) => {}
            Err(e) => return Err(failed(e)),
        }
        // Who had the lock before may have removed it.
        let links = rustix::fs::fstat(&file).map_err(failed)?.st_nlink;
        Ok((links > 0).then_some(RedoLog { file, place }))
    }

    /// Its contents.
    pub fn file(&self) -> &File {
        &self.file
    }

    /// What the state file calls the file together with this log.
    pub fn id(&self) -> FileId {
        self.place.id
    }

    /// Where it is.
    pub fn path(&self) -> PathBuf {
        self.place.path.with_file_name(self.place.temporary())
    }

    /// Removes it: the file holds its changes, on disk.
    pub fn remove(self) -> Result<(), FileError> {
        rustix::fs::unlinkat(&self.place.dir, self.place.temporary(), AtFlags::empty())
            .map_err(|e| self.place.error("remove the redo log of", e.into()))?;
        self.place.sync_dir()?;
        self.place.collect();
        Ok(())
    }
}

/// What happened to the state file that was there before.
enum Replaced {
    /// It has the temporary name.
    Exchanged,
    /// There was none.
    Nothing,
    /// It is gone.
    ForGood,
}

/// Whether two paths are to be the same file, however they are spelt: the same name in the same directory, links followed.
pub fn is_same_path(one: &Path, other: &Path) -> bool {
    let place = |path: &Path| {
        let target = std::fs::canonicalize(path).unwrap_or_else(|_| path.to_path_buf());
        let parent = match target.parent() {
            Some(parent) if !parent.as_os_str().is_empty() => parent,
            _ => Path::new("."),
        };
        let dir = rustix::fs::stat(parent).ok()?;
        Some((dir.st_dev, dir.st_ino, target.file_name()?.to_os_string()))
    };
    // A path that cannot be looked at is refused by whoever opens it, by name.
    place(one).is_some_and(|one| place(other) == Some(one))
}

/// Where the file `id` is that belongs at `path`: there, or, if its writer died within [`commit_pair`], beside it.
pub fn find(path: &Path, id: FileId) -> PathBuf {
    let target = std::fs::canonicalize(path).unwrap_or_else(|_| path.to_path_buf());
    if let Some(name) = target.file_name() {
        let staged = target.with_file_name(temporary_name(name, id, SUFFIX));
        if staged.exists() {
            return staged;
        }
    }
    path.to_path_buf()
}

/// Where the redo log `id` of the file at `path` is, if there is one.
pub fn redo_path(path: &Path, id: FileId) -> Option<PathBuf> {
    let target = std::fs::canonicalize(path).unwrap_or_else(|_| path.to_path_buf());
    let redo = target.with_file_name(temporary_name(target.file_name()?, id, REDO_SUFFIX));
    redo.exists().then_some(redo)
}

fn temporary_name(name: &OsStr, id: FileId, suffix: &str) -> OsString {
    let ending = format!(".{id}.{suffix}");
    let stem = name.as_bytes();
    let stem = &stem[..stem.len().min(NAME_MAX - ending.len())];
    let mut temporary = OsStr::from_bytes(stem).to_os_string();
    temporary.push(ending);
    temporary
}

/// The directory that `target` is in.
fn open_dir(target: &Path) -> rustix::io::Result<OwnedFd> {
    let parent = match target.parent() {
        Some(parent) if !parent.as_os_str().is_empty() => parent,
        _ => Path::new("."),
    };
    rustix::fs::openat(CWD, parent, OFlags::RDONLY | OFlags::DIRECTORY | OFlags::CLOEXEC, Mode::empty())
}

fn proc_path(file: &File) -> String {
    format!("/proc/self/fd/{}", file.as_raw_fd())
}

#[cfg(test)]
#[path = "file_tests.rs"]
mod tests;
