//! The plain disk at the bottom of a stack: a file or a block device, open several times.
//!
//! Linux reports a failed write-back once for each open file ([`health`](super::health)). So each queue of a disk that is written to
//! has an open file of its own, and so has whoever syncs it beside them.

use std::fs::File;
use std::io;
use std::os::unix::fs::{FileTypeExt, MetadataExt, OpenOptionsExt};
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};

use rustix::fs::{OFlags, SeekFrom};

use super::options::DiskOptions;
use crate::SECTOR;
use crate::error::DiskError;
use crate::host_file::lock::{FileLock, FileLocks, LockError, LockMode};

/// A plain disk.
#[derive(Debug)]
pub(crate) struct BaseDisk {
    /// By queue.
    files: Vec<Arc<File>>,
    /// How many queues there were.
    queues: AtomicUsize,
    /// For syncs beside the queues'; absent where nothing is written.
    sync: Option<File>,
    /// Absent where the drive is not to be locked.
    lock: Option<FileLock>,
    size: u64,
}

impl BaseDisk {
    /// Opens and locks the disk of `options`; to write to it only where no overlay takes the writes.
    pub(crate) fn open(options: &DiskOptions, locks: &FileLocks) -> Result<Self, DiskError> {
        let path = &*options.path;
        let failed = |source| DiskError::Open { path: path.into(), source };
        let writable = !options.read_only && options.overlay.is_none();
        let open = || open(path, writable);
        let file = open().map_err(failed)?;
        let kind = file.metadata().map_err(failed)?.file_type();
        if !kind.is_file() && !kind.is_block_device() {
            return Err(DiskError::NotADisk { path: path.into() });
        }
        let size = size_of(&file, path).map_err(failed)?;
        // A disk of no size cannot be written to: nobody is kept from it.
        let mode = if writable && size > 0 { LockMode::Exclusive } else { LockMode::Shared };
        let lock = options.lock.then(|| locks.lock(path, &file, mode, &open)).transpose()?;
        let again = || {
            let again = open().map_err(failed)?;
            let same = is_same(&again, &file).map_err(failed)?;
            same.then_some(again).ok_or_else(|| LockError::Replaced { path: path.into() }.into())
        };
        let sync = writable.then(again).transpose()?;
        let more = if writable { usize::from(options.io_threads.max(1)) - 1 } else { 0 };
        let more = (0..more).map(|_| again().map(Arc::new)).collect::<Result<Vec<_>, DiskError>>()?;
        let files = std::iter::once(Arc::new(file)).chain(more).collect();
        Ok(BaseDisk { files, queues: AtomicUsize::new(0), sync, lock, size })
    }

    /// A disk of `size` bytes that is only read.
    #[cfg(test)]
    pub(crate) fn of(file: File, size: u64) -> Arc<Self> {
        let files = vec![Arc::new(file)];
        Arc::new(BaseDisk { files, queues: AtomicUsize::new(0), sync: None, lock: None, size })
    }

    /// Size in bytes, a multiple of 512.
    pub(crate) fn size(&self) -> u64 {
        self.size
    }

    /// The file, for who reads it or looks at it.
    pub(crate) fn file(&self) -> &Arc<File> {
        &self.files[0]
    }

    /// The file for one more queue.
    pub(crate) fn queue_file(&self) -> &Arc<File> {
        &self.files[self.queues.fetch_add(1, Ordering::Relaxed) % self.files.len()]
    }

    /// The file for syncs beside the queues', where it is written to.
    pub(crate) fn sync_file(&self) -> Option<&File> {
        self.sync.as_ref()
    }

    /// Whether both are one file or device, written to by both.
    pub(crate) fn shares_writes_with(&self, other: &BaseDisk) -> bool {
        self.sync.is_some()
            && other.sync.is_some()
            && is_same(self.file(), other.file()).is_ok_and(|same| same)
    }

    /// Whether both are one file or device.
    pub(crate) fn is_same_disk(&self, other: &BaseDisk) -> bool {
        is_same(self.file(), other.file()).is_ok_and(|same| same)
    }

    /// Changes the lock: shared for a base that others may put overlays on, exclusive for a disk that is written to.
    pub(crate) fn set_lock(&self, mode: LockMode) -> Result<(), LockError> {
        let mode = if self.size == 0 { LockMode::Shared } else { mode };
        self.lock.as_ref().map_or(Ok(()), |lock| lock.set(mode))
    }
}

/// Whether two open files are one file, or two nodes of one device.
fn is_same(one: &File, other: &File) -> io::Result<bool> {
    let (one, other) = (one.metadata()?, other.metadata()?);
    if one.file_type().is_block_device() && other.file_type().is_block_device() {
        return Ok(one.rdev() == other.rdev());
    }
    Ok((one.dev(), one.ino()) == (other.dev(), other.ino()))
}

fn open(path: &Path, writable: bool) -> io::Result<File> {
    // A pipe without a writer must not hold us up; what is no disk is refused later.
    let nonblocking = OFlags::NONBLOCK.bits().cast_signed();
    let file = File::options().read(true).write(writable).custom_flags(nonblocking).open(path)?;
    let flags = rustix::fs::fcntl_getfl(&file)?;
    rustix::fs::fcntl_setfl(&file, flags - OFlags::NONBLOCK)?;
    Ok(file)
}

/// The size of the disk in `file`, rounded down to a sector.
fn size_of(file: &File, path: &Path) -> io::Result<u64> {
    // The end of a block device is found like that of a file.
    let size = rustix::fs::seek(file, SeekFrom::End(0))?;
    let whole = size / SECTOR * SECTOR;
    if whole != size {
        log::warn!(
            "disk {} has {size} bytes, which is no multiple of {SECTOR}: the guest sees the first {whole}",
            path.display()
        );
    }
    Ok(whole)
}
