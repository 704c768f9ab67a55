//! Locks on disks, against other monitors.
//!
//! # Which locks
//!
//! | disk                                            | lock      |
//! |-------------------------------------------------|-----------|
//! | a raw disk that is written                      | exclusive |
//! | a raw disk of size 0, which cannot be written   | shared    |
//! | a read-only disk, or the base of an overlay     | shared    |
//!
//! Overlays have locks of their own; see [`overlay`](crate::overlay). Locks are `flock` locks on an
//! open file that is used for nothing else. So the kernel releases them when the process ends,
//! however it ends, and an `io_uring` that is freed later does not keep them.
//!
//! A process has one lock on a file, the strongest that any of its disks needs: drives of one
//! microVM may share a file. A [`FileLocks`] is the table of a process. A child of a fork starts
//! with its own table and never touches its parent's.
//!
//! Locks are advisory. They are on the file or on the device node: two nodes of one device (in two
//! jails, say) are two files, and so are a disk and its partitions. A file system without locks is
//! used without them, and a warning is logged.

use std::fmt;
use std::fs::File;
use std::io;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, Weak};
use std::time::Duration;

use rustix::fs::FlockOperation;
use rustix::io::Errno;

use super::is_same_inode;
use crate::creator_pid::CreatorPid;
use sync::locked;

/// Attempts to lock a block device: `udev` locks one for a moment when it probes it.
const DEVICE_TRIES: u32 = 50;
/// Time between two attempts.
const DEVICE_WAIT: Duration = Duration::from_millis(20);

/// Why a disk cannot be locked.
#[derive(Debug, thiserror::Error)]
pub enum LockError {
    /// Another process has a conflicting lock.
    #[error(
        "disk {}: cannot be locked {}: {holder} has it locked; stop it, or set \"lock\" to false to share the disk on purpose",
        path.display(), mode
    )]
    InUse {
        /// The disk.
        path: PathBuf,
        /// The lock that was wanted.
        mode: LockMode,
        /// The process.
        holder: LockHolder,
    },
    /// The path was given to another file while it was opened.
    #[error("disk {}: the file was replaced while it was opened; try again", path.display())]
    Replaced {
        /// The disk.
        path: PathBuf,
    },
    /// A system call failed.
    #[error("disk {}: cannot be locked: {source}", path.display())]
    Io {
        /// The disk.
        path: PathBuf,
        /// The kernel's reason.
        source: io::Error,
    },
}

/// Mode of a lock.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum LockMode {
    /// Shared with other readers.
    Shared,
    /// Exclusive, for a writer.
    Exclusive,
}

impl fmt::Display for LockMode {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            LockMode::Shared => "for reading",
            LockMode::Exclusive => "for writing",
        })
    }
}

/// The process that has a lock, as far as `/proc` shows.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum LockHolder {
    /// Another process that `/proc` does not show.
    Unknown,
    /// This process.
    ThisProcess,
    /// The process with this id, and its command name if known.
    Process {
        /// Its id.
        pid: u32,
        /// Its command.
        command: Option<String>,
    },
}

impl fmt::Display for LockHolder {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            LockHolder::Unknown => f.write_str("another process"),
            LockHolder::ThisProcess => f.write_str("this microVM"),
            LockHolder::Process { pid, command: None } => write!(f, "process {pid}"),
            LockHolder::Process { pid, command: Some(command) } => write!(f, "process {pid} ({command})"),
        }
    }
}

impl LockHolder {
    /// The process that has a lock on `file`, which is known to be locked.
    pub(crate) fn of(file: &File) -> Self {
        Self::find(file).unwrap_or(LockHolder::Unknown)
    }

    /// The process that has a lock on `file`, if `/proc` shows one.
    pub(crate) fn find(file: &File) -> Option<Self> {
        let metadata = file.metadata().ok()?;
        let locks = std::fs::read_to_string("/proc/locks").unwrap_or_default();
        let pid = find_pid(&locks, metadata.dev(), metadata.ino())?;
        if pid == std::process::id() {
            return Some(LockHolder::ThisProcess);
        }
        let command = std::fs::read_to_string(format!("/proc/{pid}/comm")).ok();
        Some(LockHolder::Process { pid, command: command.map(|command| command.trim_end().to_owned()) })
    }
}

/// The process that has a `flock` lock on a file, by the contents of `/proc/locks`.
fn find_pid(locks: &str, dev: u64, ino: u64) -> Option<u32> {
    let file = format!("{:02x}:{:02x}:{ino}", rustix::fs::major(dev), rustix::fs::minor(dev));
    locks.lines().find_map(|line| {
        // `1: FLOCK  ADVISORY  WRITE 1234 fe:00:56 0 EOF`; a waiter has an arrow after the number.
        let mut words = line.split_ascii_whitespace().skip(1);
        if words.next()? != "FLOCK" {
            return None;
        }
        let pid = words.nth(2)?;
        if words.next()? != file {
            return None;
        }
        // 0 or -1 for a process that this one cannot see.
        pid.parse().ok().filter(|pid| *pid > 0)
    })
}

/// The locks of a process on the files of its disks. Clones share the table.
#[derive(Debug, Clone, Default)]
pub struct FileLocks(Arc<Mutex<Vec<Weak<ProcessLock>>>>);

/// A disk's share of its process's lock on a file. Released on drop.
#[derive(Debug)]
pub(crate) struct FileLock {
    lock: Arc<ProcessLock>,
    mode: Mutex<LockMode>,
}

/// The one lock of a process on a file.
#[derive(Debug)]
struct ProcessLock {
    path: PathBuf,
    file: File,
    creator: CreatorPid,
    is_device: bool,
    users: Mutex<LockUsers>,
}

#[derive(Debug, Default)]
struct LockUsers {
    exclusive: usize,
    shared: usize,
    /// The lock that the kernel has granted.
    current: Option<LockMode>,
    /// The file system has no locks.
    unsupported: bool,
}

impl FileLocks {
    /// Locks the file `data`, which was opened as `path`. `open` opens it again in the same way.
    pub(crate) fn lock(
        &self,
        path: &Path,
        data: &File,
        mode: LockMode,
        open: &dyn Fn() -> io::Result<File>,
    ) -> Result<FileLock, LockError> {
        let failed = |source| LockError::Io { path: path.into(), source };
        let wanted = data.metadata().map_err(failed)?;
        let mut table = locked(&self.0);
        table.retain(|lock| lock.strong_count() > 0);
        for lock in table.iter().filter_map(Weak::upgrade) {
            let metadata = lock.file.metadata().map_err(failed)?;
            if is_same_inode(&metadata, &wanted) {
                return ProcessLock::used(lock, mode);
            }
        }
        let file = open().map_err(failed)?;
        if !is_same_inode(&file.metadata().map_err(failed)?, &wanted) {
            return Err(LockError::Replaced { path: path.into() });
        }
        let process_lock = Arc::new(ProcessLock {
            path: path.into(),
            file,
            creator: CreatorPid::current(),
            is_device: !wanted.is_file(),
            users: Mutex::default(),
        });
        let lock = ProcessLock::used(Arc::clone(&process_lock), mode)?;
        table.push(Arc::downgrade(&process_lock));
        Ok(lock)
    }
}

impl ProcessLock {
    /// Adds a user.
    fn used(lock: Arc<Self>, mode: LockMode) -> Result<FileLock, LockError> {
        lock.change(|users| *users.of(mode) += 1)?;
        Ok(FileLock { lock, mode: Mutex::new(mode) })
    }

    /// Changes the users, and the lock with them. On an error nothing has changed.
    fn change(&self, change: impl Fn(&mut LockUsers)) -> Result<(), LockError> {
        let mut users = locked(&self.users);
        let before = (users.exclusive, users.shared, users.current);
        change(&mut users);
        let wanted = users.wanted();
        if users.unsupported || wanted == users.current {
            return Ok(());
        }
        let Some(mode) = wanted else {
            users.current = None;
            // Unlocked and not just closed: a fork may share the open file for a moment.
            let _ = rustix::fs::flock(&self.file, FlockOperation::Unlock);
            return Ok(());
        };
        match self.take(mode) {
            Ok(()) => users.current = Some(mode),
            Err(Errno::NOLCK | Errno::OPNOTSUPP | Errno::NOSYS) if before.2.is_none() => {
                users.unsupported = true;
                log::warn!(
                    "disk {}: its file system has no locks; other monitors can open it, too",
                    self.path.display()
                );
            }
            Err(errno) => {
                (users.exclusive, users.shared, _) = before;
                // The kernel releases the old lock before it tries to take the new one.
                users.current = before.2.filter(|&mode| self.take(mode).is_ok());
                return Err(match errno {
                    Errno::WOULDBLOCK => {
                        LockError::InUse { path: self.path.clone(), mode, holder: LockHolder::of(&self.file) }
                    }
                    errno => LockError::Io { path: self.path.clone(), source: errno.into() },
                });
            }
        }
        Ok(())
    }

    fn take(&self, mode: LockMode) -> rustix::io::Result<()> {
        let operation = match mode {
            LockMode::Shared => FlockOperation::NonBlockingLockShared,
            LockMode::Exclusive => FlockOperation::NonBlockingLockExclusive,
        };
        let mut tries = if self.is_device { DEVICE_TRIES } else { 1 };
        loop {
            tries -= 1;
            match rustix::fs::flock(&self.file, operation) {
                Err(Errno::INTR) => tries += 1,
                Err(Errno::WOULDBLOCK) if tries > 0 => std::thread::sleep(DEVICE_WAIT),
                result => return result,
            }
        }
    }
}

impl LockUsers {
    fn of(&mut self, mode: LockMode) -> &mut usize {
        match mode {
            LockMode::Shared => &mut self.shared,
            LockMode::Exclusive => &mut self.exclusive,
        }
    }

    fn wanted(&self) -> Option<LockMode> {
        match (self.exclusive, self.shared) {
            (0, 0) => None,
            (0, _) => Some(LockMode::Shared),
            _ => Some(LockMode::Exclusive),
        }
    }
}

impl FileLock {
    /// Changes the mode that this disk needs. On an error it keeps its mode, unless another process
    /// took the lock at this moment.
    pub(crate) fn set(&self, mode: LockMode) -> Result<(), LockError> {
        let mut now = locked(&self.mode);
        if *now != mode {
            self.lock.change(|users| {
                *users.of(*now) -= 1;
                *users.of(mode) += 1;
            })?;
            *now = mode;
        }
        Ok(())
    }
}

impl Drop for FileLock {
    fn drop(&mut self) {
        // In a fork the lock is still the parent's.
        if self.lock.creator.is_current() {
            let mode = *locked(&self.mode);
            // Needing less can fail only if another process took the lock; then there is nothing to
            // release.
            let _ = self.lock.change(|users| *users.of(mode) -= 1);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn lock(locks: &FileLocks, path: &Path, mode: LockMode) -> Result<FileLock, LockError> {
        let open = || File::options().read(true).write(true).open(path);
        locks.lock(path, &open().unwrap(), mode, &open)
    }

    fn is_in_use(result: &Result<FileLock, LockError>) -> bool {
        matches!(result, Err(LockError::InUse { .. }))
    }

    /// Two tables are those of two processes.
    #[test]
    fn lock_allows_one_writing_process_or_many_readers() {
        let file = tempfile::NamedTempFile::new().unwrap();
        let (ours, theirs) = (FileLocks::default(), FileLocks::default());
        let reads = lock(&ours, file.path(), LockMode::Shared).unwrap();
        let reads_too = lock(&theirs, file.path(), LockMode::Shared).unwrap();
        assert!(is_in_use(&lock(&ours, file.path(), LockMode::Exclusive)));
        drop(reads_too);
        let writes = lock(&ours, file.path(), LockMode::Exclusive).unwrap();
        let writes_too = lock(&ours, file.path(), LockMode::Exclusive).unwrap();
        drop(writes);
        assert!(is_in_use(&lock(&theirs, file.path(), LockMode::Shared)), "one is left that writes");
        drop(writes_too);
        let theirs_now = lock(&theirs, file.path(), LockMode::Shared).unwrap();
        drop(reads);
        drop(theirs_now);
        lock(&theirs, file.path(), LockMode::Exclusive).unwrap();
    }

    #[test]
    fn failed_lock_change_keeps_the_old_lock() {
        let file = tempfile::NamedTempFile::new().unwrap();
        let (ours, theirs) = (FileLocks::default(), FileLocks::default());
        let lock_of_ours = lock(&ours, file.path(), LockMode::Exclusive).unwrap();
        lock_of_ours.set(LockMode::Shared).unwrap();
        let reads = lock(&theirs, file.path(), LockMode::Shared).unwrap();
        assert!(matches!(lock_of_ours.set(LockMode::Exclusive), Err(LockError::InUse { .. })));
        drop(reads);
        assert!(is_in_use(&lock(&theirs, file.path(), LockMode::Exclusive)), "it is still shared");
        lock_of_ours.set(LockMode::Exclusive).unwrap();
        assert!(is_in_use(&lock(&theirs, file.path(), LockMode::Shared)));
    }

    #[test]
    fn lock_error_names_the_file_and_the_holder() {
        let file = tempfile::NamedTempFile::new().unwrap();
        let mut child = std::process::Command::new("flock")
            .args(["--exclusive", "--no-fork"])
            .arg(file.path())
            .args(["sh", "-c", "echo locked; read line"])
            .stdin(std::process::Stdio::piped())
            .stdout(std::process::Stdio::piped())
            .spawn()
            .unwrap();
        let mut said = String::new();
        std::io::BufRead::read_line(&mut std::io::BufReader::new(child.stdout.take().unwrap()), &mut said)
            .unwrap();
        assert_eq!(said, "locked\n");
        let refused = lock(&FileLocks::default(), file.path(), LockMode::Shared).unwrap_err().to_string();
        child.kill().unwrap();
        child.wait().unwrap();
        assert!(refused.contains(file.path().to_str().unwrap()), "{refused}");
        // On some file systems `/proc/locks` shows other device numbers; then the holder is
        // unknown.
        let who = [format!("process {} (sh)", child.id()), "another process".into()];
        assert!(who.iter().any(|who| refused.contains(who)), "{refused}");
        lock(&FileLocks::default(), file.path(), LockMode::Exclusive).expect("it died");
    }

    #[test]
    fn file_replaced_during_open_is_not_locked() {
        let home = tempfile::tempdir().unwrap();
        let path = home.path().join("disk");
        let data = File::create(&path).unwrap();
        std::fs::remove_file(&path).unwrap();
        let other = File::create(&path).unwrap();
        let open = || File::open(&path);
        let refused = FileLocks::default().lock(&path, &data, LockMode::Shared, &open);
        assert!(matches!(refused, Err(LockError::Replaced { .. })));
        drop(other);
    }

    #[test]
    fn proc_locks_is_searched_by_inode() {
        let list = "1: POSIX  ADVISORY  WRITE 7 fe:00:56 0 EOF\n\
                    2: FLOCK  ADVISORY  WRITE 1234 fe:00:57 0 EOF\n\
                    2: -> FLOCK  ADVISORY  WRITE 9 fe:00:56 0 EOF\n\
                    3: FLOCK  ADVISORY  READ  0 fe:00:58 0 EOF\n\
                    4: FLOCK  ADVISORY  READ  55 fe:00:56 0 EOF\nnonsense\n";
        let dev = rustix::fs::makedev(0xfe, 0);
        assert_eq!([56, 57, 58, 59].map(|ino| find_pid(list, dev, ino)), [Some(55), Some(1234), None, None]);
    }
}
