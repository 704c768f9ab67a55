//! Whether the contents of a disk are known. A failed sync makes them unknown for good.
//!
//! # Why a failed sync is final
//!
//! Linux reports a failed write-back once for each open file, and then treats the pages as clean.
//! So a second `fdatasync` succeeds although the data is lost. A [`DiskHealth`] keeps the first
//! failure of any sync of its disk: of a guest's flush, a fork, a snapshot, or the end of the
//! monitor. From then on no sync is tried, and everything that depends on the contents fails with
//! [`ContentsUnknown`], until the disk is replaced.
//!
//! # Which open files are synced
//!
//! Two concurrent syncs of one open file share one report, so one of them may succeed wrongly. This
//! never happens:
//!
//! | who syncs                                      | which open file                        |
//! |------------------------------------------------|----------------------------------------|
//! | a [`DiskQueue`](crate::disk::queue::DiskQueue) | its own, one sync at a time            |
//! | main, its tasks and the end of the monitor     | one that no queue has, one at a time   |
//! | a merge of layers                              | that of the merged file, used by it only |
//!
//! ([`flush`](crate::overlay::flush) and [`DiskHealth::begin_operation`] keep it to one at a time.)
//!
//! A fork of the process syncs no files of its parent: a child opens its own, on files that its
//! parent has synced, and the writer of a live snapshot has no disks.

use std::fmt;
use std::fs::File;
use std::io;
use std::path::PathBuf;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, OnceLock};

use rustix::io::Errno;

use sync::locked;

/// The contents of a disk are unknown, because a sync of it failed.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error(
    "disk {}: its contents are unknown since {what} failed: {}; replace the disk", path.display(), io::Error::from(*errno)
)]
pub struct ContentsUnknown {
    /// The file or block device that is written.
    pub path: PathBuf,
    /// What the first failed sync was for.
    pub what: &'static str,
    /// Its error.
    pub errno: Errno,
}

/// Called when the contents of a disk become unknown, by the thread that finds it out. It must not
/// wait.
pub type ContentsUnknownHook = Box<dyn Fn(&ContentsUnknown) + Send + Sync>;

/// The health of one disk: the first failed sync, if any.
pub(crate) struct DiskHealth {
    path: PathBuf,
    failed: OnceLock<ContentsUnknown>,
    hook: OnceLock<ContentsUnknownHook>,
    /// Whether `hook` was called.
    reported: AtomicBool,
    /// Held by an operation that syncs beside the queues; see [`DiskHealth::begin_operation`].
    operation: Mutex<()>,
}

impl DiskHealth {
    /// The health of the disk that is written to `path`: its contents are known.
    pub(crate) fn new(path: impl Into<PathBuf>) -> Arc<Self> {
        Arc::new(DiskHealth {
            path: path.into(),
            failed: OnceLock::new(),
            hook: OnceLock::new(),
            reported: AtomicBool::new(false),
            operation: Mutex::new(()),
        })
    }

    /// Sets the hook that is called once, when a sync fails or now if one has failed. Only the
    /// first call has an effect: a disk that replaces another one and shares its writes has its
    /// health.
    pub(crate) fn set_hook(&self, hook: ContentsUnknownHook) {
        let _ = self.hook.set(hook);
        self.report();
    }

    fn report(&self) {
        if let (Some(failed), Some(hook)) = (self.failed.get(), self.hook.get())
            && !self.reported.swap(true, Ordering::Relaxed)
        {
            hook(failed);
        }
    }

    /// Notes that a sync for `what` failed. The first failure is kept and logged.
    pub(crate) fn sync_failed(&self, what: &'static str, errno: Errno) -> ContentsUnknown {
        let new = ContentsUnknown { path: self.path.clone(), what, errno };
        if self.failed.set(new.clone()).is_ok() {
            log::error!("{new}");
            self.report();
        }
        self.failed.get().cloned().unwrap_or(new)
    }

    /// Whether no sync has failed.
    pub(crate) fn is_known(&self) -> bool {
        self.failed.get().is_none()
    }

    /// Fails if a sync has failed.
    pub(crate) fn check(&self) -> Result<(), ContentsUnknown> {
        self.failed.get().map_or(Ok(()), |failed| Err(failed.clone()))
    }

    /// Begins an operation that syncs beside the queues: a sync, a write-back, a freeze, a close.
    /// Waits for one on another thread, since two syncs of their open file would share one report.
    /// Fails if a sync has failed, including that of the operation it waited for.
    pub(crate) fn begin_operation(&self) -> Result<MutexGuard<'_, ()>, ContentsUnknown> {
        let operation = locked(&self.operation);
        self.check()?;
        Ok(operation)
    }

    /// Makes what was written to `file` durable, for `what`. Blocks. Not tried if a sync has
    /// failed.
    pub(crate) fn sync(&self, file: &File, what: &'static str) -> Result<(), ContentsUnknown> {
        self.check()?;
        loop {
            match sync_data(file) {
                Err(Errno::INTR) => {}
                Err(errno) => return Err(self.sync_failed(what, errno)),
                // A sync of another thread may have failed meanwhile.
                Ok(()) => return self.check(),
            }
        }
    }
}

impl fmt::Debug for DiskHealth {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("DiskHealth")
            .field("path", &self.path)
            .field("failed", &self.failed)
            .finish_non_exhaustive()
    }
}

/// One `fdatasync`. All syncs of disks, except those of `io_uring`, go through here.
pub(crate) fn sync_data(file: &File) -> rustix::io::Result<()> {
    #[cfg(test)]
    faults::sync(file)?;
    rustix::fs::fdatasync(file)
}

/// Syncs that fail, for tests: like the kernel's, once for each open file.
#[cfg(test)]
pub(crate) mod faults {
    use std::collections::{BTreeMap, BTreeSet};
    use std::fs::File;
    use std::os::fd::{AsRawFd, RawFd};
    use std::os::unix::fs::MetadataExt;
    use std::path::Path;
    use std::sync::Mutex;

    use rustix::io::Errno;

    use sync::locked;

    type Key = (u64, u64);

    /// By file whose write-back failed: the descriptors that got the error.
    static FAILED: Mutex<BTreeMap<Key, BTreeSet<RawFd>>> = Mutex::new(BTreeMap::new());

    fn key(metadata: &std::fs::Metadata) -> Key {
        (metadata.dev(), metadata.ino())
    }

    /// A failed write-back of a file. Files opened after its drop do not see it.
    #[must_use]
    pub(crate) struct Failure(
        Key,
        #[expect(dead_code, reason = "keeps the inode from being another's")] File,
    );

    /// Fails the write-back of the file at `path`: the next sync of each descriptor returns an
    /// error.
    pub(crate) fn fail(path: &Path) -> Failure {
        let file = File::open(path).unwrap();
        let key = key(&file.metadata().unwrap());
        locked(&FAILED).insert(key, BTreeSet::new());
        Failure(key, file)
    }

    impl Drop for Failure {
        fn drop(&mut self) {
            locked(&FAILED).remove(&self.0);
        }
    }

    pub(crate) fn sync(file: &File) -> rustix::io::Result<()> {
        let key = key(&file.metadata().unwrap());
        let mut failed = locked(&FAILED);
        let is_first = failed.get_mut(&key).map(|descriptors| descriptors.insert(file.as_raw_fd()));
        if is_first == Some(true) { Err(Errno::IO) } else { Ok(()) }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn first_failed_sync_is_kept_and_no_sync_is_tried_after() {
        let file = tempfile::NamedTempFile::new().unwrap();
        let health = DiskHealth::new(file.path());
        health.sync(file.as_file(), "a flush").unwrap();
        let failure = faults::fail(file.path());
        let first = health.sync(file.as_file(), "a fork").unwrap_err();
        drop(failure);
        assert_eq!(health.sync(file.as_file(), "a flush"), Err(first.clone()));
        assert_eq!(health.sync_failed("a close", Errno::NOSPC), first);
        assert!(!health.is_known());
        let said = first.to_string();
        assert!(said.contains("since a fork failed: Input/output error"), "{said}");
        assert!(said.ends_with("; replace the disk"), "{said}");
    }

    #[test]
    fn hook_is_called_once_also_if_it_is_set_late() {
        for late in [false, true] {
            let health = DiskHealth::new("disk");
            let (send, calls) = std::sync::mpsc::channel();
            let hook = Box::new(move |failed: &ContentsUnknown| send.send(failed.what).unwrap());
            if late {
                health.sync_failed("a flush", Errno::IO);
                health.set_hook(hook);
            } else {
                health.set_hook(hook);
                assert!(calls.try_recv().is_err(), "nothing has failed");
                health.sync_failed("a flush", Errno::IO);
            }
            health.sync_failed("a fork", Errno::IO);
            health.set_hook(Box::new(|_| panic!("another hook has no effect")));
            assert_eq!(calls.try_iter().collect::<Vec<_>>(), ["a flush"], "late: {late}");
        }
    }
}
