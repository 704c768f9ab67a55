//! Locks that keep monitors from each other's disks.
//!
//! # Which locks
//!
//! | what                                            | lock      |
//! |-------------------------------------------------|-----------|
//! | a raw disk that is written to                   | exclusive |
//! | a raw disk of no size, which cannot be written  | shared    |
//! | a read-only disk, or the base of an overlay     | shared    |
//!
//! (Overlays have locks of their own, see [`overlay`](super::overlay).) They are `flock` locks on an open file that nothing else uses, so the kernel gives them up with
//! the process, however it ends, and an `io_uring` that is taken down later does not hold them.
//!
//! One process has one lock on a file, the strongest that any of its disks needs: drives of one microVM may share a file. A
//! [`FileLocks`] is that process's table. A fork's child begins with its own; it never touches its parent's.
//!
//! A lock binds those who ask for one. It is on the file, or on the device node: two nodes of one device (in two jails, say) are two files, and
//! so are a disk and its partitions. A file system that has no locks is used without, and the log says so.

use std::fmt;
use std::fs::File;
use std::io;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, Weak};
use std::time::Duration;

use rustix::fs::FlockOperation;
use rustix::io::Errno;

use crate::creator_pid::CreatorPid;
use sync::locked;

/// How often a lock on a block device is tried: `udev` locks one for a moment when it looks at it.
const DEVICE_TRIES: u32 = 50;
/// How long to wait between two tries.
const DEVICE_WAIT: Duration = Duration::from_millis(20);

/// Why a disk cannot be locked.
#[derive(Debug, thiserror::Error)]
pub enum LockError {
    /// Another process uses it in a way that does not go with this one.
    #[error(
        "disk {}: cannot be locked {}: {holder} has it locked; stop that one, or set \"lock\" to false where a disk is shared on purpose",
        path.display(), mode
    )]
    InUse {
        /// The disk.
        path: PathBuf,
        /// For what it was to be locked.
        mode: LockMode,
        /// Who has it.
        holder: LockHolder,
    },
    /// The name was given to another file while it was opened.
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

/// How a file is locked.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum LockMode {
    /// With others that only read.
    Shared,
    /// Alone.
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

/// Who has a lock, as far as `/proc` tells.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum LockHolder {
    /// A process of which nothing is known.
    Unknown,
    /// This process.
    Here,
    /// The process with this id, and its command where that is known.
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
            LockHolder::Here => f.write_str("this microVM"),
            LockHolder::Process { pid, command: None } => write!(f, "process {pid}"),
            LockHolder::Process { pid, command: Some(command) } => write!(f, "process {pid} ({command})"),
        }
    }
}

impl LockHolder {
    /// Who has a lock on `file`.
    pub(crate) fn of(file: &File) -> Self {
        let Ok(metadata) = file.metadata() else { return LockHolder::Unknown };
        let locks = std::fs::read_to_string("/proc/locks").unwrap_or_default();
        let Some(pid) = find_pid(&locks, metadata.dev(), metadata.ino()) else { return LockHolder::Unknown };
        if pid == std::process::id() {
            return LockHolder::Here;
        }
        let command = std::fs::read_to_string(format!("/proc/{pid}/comm")).ok();
        LockHolder::Process { pid, command: command.map(|command| command.trim_end().to_owned()) }
    }
}

/// The process that `locks`, the contents of `/proc/locks`, says to have a `flock` lock on a file.
fn find_pid(locks: &str, dev: u64, ino: u64) -> Option<u32> {
    let file = format!("{:02x}:{:02x}:{ino}", rustix::fs::major(dev), rustix::fs::minor(dev));
    locks.lines().find_map(|line| {
        // `1: FLOCK  ADVISORY  WRITE 1234 fe:00:56 0 EOF`; one that waits has an arrow after the number.
        let mut words = line.split_ascii_whitespace().skip(1);
        if words.next()? != "FLOCK" {
            return None;
        }
        let pid = words.nth(2)?;
        if words.next()? != file {
            return None;
        }
        // 0 or -1 for one that this process cannot see.
        pid.parse().ok().filter(|pid| *pid > 0)
    })
}

/// The locks of a process on its disks' files. A clone is the same table.
#[derive(Debug, Clone, Default)]
pub struct FileLocks(Arc<Mutex<Vec<Weak<ProcessLock>>>>);

/// A disk's share of its process's lock on a file. Given up on drop.
#[derive(Debug)]
pub(crate) struct FileLock {
    held: Arc<ProcessLock>,
    mode: Mutex<LockMode>,
}

/// The one lock of a process on a file.
#[derive(Debug)]
struct ProcessLock {
    path: PathBuf,
    file: File,
    creator: CreatorPid,
    is_device: bool,
    users: Mutex<Users>,
}

#[derive(Debug, Default)]
struct Users {
    exclusive: usize,
    shared: usize,
    /// What the kernel has.
    taken: Option<LockMode>,
    /// The file system has no locks.
    unsupported: bool,
}

impl FileLocks {
    /// Locks the file of `data`, which was opened as `path`. `open` opens it once more, in the same way.
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
        table.retain(|held| held.strong_count() > 0);
        for held in table.iter().filter_map(Weak::upgrade) {
            let metadata = held.file.metadata().map_err(failed)?;
            if is_same(&metadata, &wanted) {
                return ProcessLock::used(held, mode);
            }
        }
        let file = open().map_err(failed)?;
        if !is_same(&file.metadata().map_err(failed)?, &wanted) {
            return Err(LockError::Replaced { path: path.into() });
        }
        let held = Arc::new(ProcessLock {
            path: path.into(),
            file,
            creator: CreatorPid::current(),
            is_device: !wanted.is_file(),
            users: Mutex::default(),
        });
        let lock = ProcessLock::used(Arc::clone(&held), mode)?;
        table.push(Arc::downgrade(&held));
        Ok(lock)
    }
}

fn is_same(one: &std::fs::Metadata, other: &std::fs::Metadata) -> bool {
    (one.dev(), one.ino()) == (other.dev(), other.ino())
}

impl ProcessLock {
    /// One more that uses it.
    fn used(held: Arc<Self>, mode: LockMode) -> Result<FileLock, LockError> {
        held.change(|users| *users.of(mode) += 1)?;
        Ok(FileLock { held, mode: Mutex::new(mode) })
    }

    /// Changes who uses it, and the lock with that. On an error nothing has changed.
    fn change(&self, change: impl Fn(&mut Users)) -> Result<(), LockError> {
        let mut users = locked(&self.users);
        let before = (users.exclusive, users.shared, users.taken);
        change(&mut users);
        let wanted = users.wanted();
        if users.unsupported || wanted == users.taken {
            return Ok(());
        }
        let Some(mode) = wanted else {
            users.taken = None;
            // Given up and not only closed: a fork that was just made has this open file as well for a moment.
            let _ = rustix::fs::flock(&self.file, FlockOperation::Unlock);
            return Ok(());
        };
        match self.take(mode) {
            Ok(()) => users.taken = Some(mode),
            Err(Errno::NOLCK | Errno::OPNOTSUPP | Errno::NOSYS) if before.2.is_none() => {
                users.unsupported = true;
                log::warn!(
                    "disk {}: its file system has no locks: nothing keeps other monitors from it",
                    self.path.display()
                );
            }
            Err(errno) => {
                (users.exclusive, users.shared, _) = before;
                // The kernel gives up the old lock before it tries to take the new one.
                users.taken = before.2.filter(|&mode| self.take(mode).is_ok());
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

impl Users {
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
    /// Changes what this disk needs. On an error it has what it had, unless another process took the file in this moment.
    pub(crate) fn set(&self, mode: LockMode) -> Result<(), LockError> {
        let mut now = locked(&self.mode);
        if *now != mode {
            self.held.change(|users| {
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
        if self.held.creator.is_current() {
            let mode = *locked(&self.mode);
            // To need less than before can fail only where another process took the file: then there is nothing to give up.
            let _ = self.held.change(|users| *users.of(mode) -= 1);
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

    /// Two tables are what two processes have.
    #[test]
    fn one_writer_or_many_readers_and_drives_of_one_process_share() {
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
    fn a_lock_that_cannot_change_stays_as_it_was() {
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
    fn a_refusal_names_the_file_and_who_has_it() {
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
        // Some file systems have other device numbers in `/proc/locks` than a file's metadata: then it is not known who.
        let who = [format!("process {} (sh)", child.id()), "another process".into()];
        assert!(who.iter().any(|who| refused.contains(who)), "{refused}");
        lock(&FileLocks::default(), file.path(), LockMode::Exclusive).expect("it died");
    }

    #[test]
    fn a_file_that_took_the_name_meanwhile_is_not_locked_instead() {
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
    fn the_kernels_list_is_read_by_file() {
        let list = "1: POSIX  ADVISORY  WRITE 7 fe:00:56 0 EOF\n\
                    2: FLOCK  ADVISORY  WRITE 1234 fe:00:57 0 EOF\n\
                    2: -> FLOCK  ADVISORY  WRITE 9 fe:00:56 0 EOF\n\
                    3: FLOCK  ADVISORY  READ  0 fe:00:58 0 EOF\n\
                    4: FLOCK  ADVISORY  READ  55 fe:00:56 0 EOF\nnonsense\n";
        let dev = rustix::fs::makedev(0xfe, 0);
        assert_eq!([56, 57, 58, 59].map(|ino| find_pid(list, dev, ino)), [Some(55), Some(1234), None, None]);
    }
}
