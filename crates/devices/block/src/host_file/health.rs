//! Whether a disk holds what was written to it: known, until a sync fails.
//!
//! # Why a failed sync is final
//!
//! Linux reports a failed write-back once for each open file, and then takes the pages that it could not write for clean. So a second
//! `fdatasync` succeeds although the data is lost. A [`DiskHealth`] keeps the first failure of any sync of its disk, whoever asked for
//! it: the guest's flush, a fork, a snapshot, the end of the monitor. From then on no sync of the disk is tried, and all that would vouch for its
//! contents fails with [`ContentsUnknown`], until another disk takes its place.
//!
//! # Which open files sync
//!
//! Two syncs of one open file at a time share one report, so one of them may succeed wrongly. No two do:
//!
//! | who syncs                                        | which open file                                        |
//! |--------------------------------------------------|--------------------------------------------------------|
//! | a [`DiskQueue`](super::queue::DiskQueue)         | its own, one sync at a time ([`flush`](super::flush))  |
//! | main, its tasks and the end of the monitor       | one that no queue has, one at a time ([`DiskHealth::begin`]) |
//! | a merge of layers                                | the merged file's, which nothing else has              |
//!
//! A fork of the process (a child, the writer of a live snapshot) syncs none of its parent's files: a child opens its own, on
//! files that its parent has synced, and the writer has no disks.

use std::fs::File;
use std::io;
use std::path::PathBuf;
use std::sync::{Arc, Mutex, MutexGuard, OnceLock};

use rustix::io::Errno;

use sync::locked;

/// A disk whose contents are unknown, because a sync of it failed.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error(
    "disk {}: its contents are unknown since {what} failed: {}; replace the disk", path.display(), io::Error::from(*errno)
)]
pub struct ContentsUnknown {
    /// The file or block device that takes the writes.
    pub path: PathBuf,
    /// What asked for the sync that failed first.
    pub what: &'static str,
    /// Why that failed.
    pub errno: Errno,
}

/// The health of one disk: a latch that the first failed sync sets.
#[derive(Debug)]
pub(crate) struct DiskHealth {
    path: PathBuf,
    failed: OnceLock<ContentsUnknown>,
    /// Held by the operation that syncs beside the queues. See [`DiskHealth::begin`].
    operation: Mutex<()>,
}

impl DiskHealth {
    /// The health of the disk whose writes go to `path`: its contents are known.
    pub(crate) fn new(path: impl Into<PathBuf>) -> Arc<Self> {
        Arc::new(DiskHealth { path: path.into(), failed: OnceLock::new(), operation: Mutex::new(()) })
    }

    /// Notes that the sync for `what` failed. The first failure is kept and logged.
    pub(crate) fn sync_failed(&self, what: &'static str, errno: Errno) -> ContentsUnknown {
        let new = ContentsUnknown { path: self.path.clone(), what, errno };
        if self.failed.set(new.clone()).is_ok() {
            log::error!("{new}");
        }
        self.failed.get().cloned().unwrap_or(new)
    }

    /// Whether no sync has failed.
    pub(crate) fn is_known(&self) -> bool {
        self.failed.get().is_none()
    }

    /// Fails once a sync has failed.
    pub(crate) fn check(&self) -> Result<(), ContentsUnknown> {
        self.failed.get().map_or(Ok(()), |failed| Err(failed.clone()))
    }

    /// Begins an operation that syncs and vouches beside the queues: a sync, a write-back, a freeze, a
    /// close. Waits for one that runs on another thread, since two syncs of their open file would share
    /// one report. Fails once a sync has failed, that of the operation it waited for included.
    pub(crate) fn begin(&self) -> Result<MutexGuard<'_, ()>, ContentsUnknown> {
        let operation = locked(&self.operation);
        self.check()?;
        Ok(operation)
    }

    /// Makes what was written to `file` durable, for `what`. Blocks. Not tried once a sync has failed.
    pub(crate) fn sync(&self, file: &File, what: &'static str) -> Result<(), ContentsUnknown> {
        self.check()?;
        loop {
            match sync_data(file) {
                Err(Errno::INTR) => {}
                Err(errno) => return Err(self.sync_failed(what, errno)),
                // Another thread's sync may have failed meanwhile.
                Ok(()) => return self.check(),
            }
        }
    }
}

/// One `fdatasync`: all that makes data of disks durable but `io_uring` goes through here.
pub(crate) fn sync_data(file: &File) -> rustix::io::Result<()> {
    #[cfg(test)]
    faults::sync(file)?;
    rustix::fs::fdatasync(file)
}

/// Syncs that fail, for tests: as the kernel's do, once for each open file.
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

    /// By file whose write-back failed: which descriptors were told.
    static FAILED: Mutex<BTreeMap<Key, BTreeSet<RawFd>>> = Mutex::new(BTreeMap::new());

    fn key(metadata: &std::fs::Metadata) -> Key {
        (metadata.dev(), metadata.ino())
    }

    /// A failure of a file. Dropped, those who open the file from then on know nothing of it.
    #[must_use]
    pub(crate) struct Failure(
        Key,
        #[expect(dead_code, reason = "keeps the inode from being another's")] File,
    );

    /// A write-back of the file at `path` has failed: each descriptor's next sync says so.
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
        let told = failed.get_mut(&key).map(|told| told.insert(file.as_raw_fd()));
        if told == Some(true) { Err(Errno::IO) } else { Ok(()) }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_first_failed_sync_is_kept_and_no_sync_is_tried_after_it() {
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
}
