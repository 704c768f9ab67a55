//! The disk at the bottom of the layers: a file or a block device, opened several times.
//!
//! Linux reports a failed write-back once for each open file
//! ([`health`](crate::host_file::health)). So each queue of a writable disk has an open file of its
//! own, and one more serves the syncs beside the queues.

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
use crate::host_file::is_same_inode;
use crate::host_file::lock::{FileLock, FileLocks, LockError, LockMode};

/// A file or a block device.
#[derive(Debug)]
pub(crate) struct BaseDisk {
    /// The open files of the queues.
    files: Vec<Arc<File>>,
    /// Number of queues so far.
    queues: AtomicUsize,
    /// For syncs beside the queues; absent if the disk is not written.
    sync: Option<File>,
    /// Absent if the drive is not locked.
    lock: Option<FileLock>,
    size: u64,
}

impl BaseDisk {
    /// Opens and locks the disk of `options`. It is opened for writing only if no overlay takes the
    /// writes.
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
        // A disk of size 0 cannot be written, so others may use it, too.
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

    /// A read-only disk of `size` bytes.
    #[cfg(test)]
    pub(crate) fn of(file: File, size: u64) -> Arc<Self> {
        let files = vec![Arc::new(file)];
        Arc::new(BaseDisk { files, queues: AtomicUsize::new(0), sync: None, lock: None, size })
    }

    /// Size in bytes, a multiple of 512.
    pub(crate) fn size(&self) -> u64 {
        self.size
    }

    /// An open file, for reads and metadata.
    pub(crate) fn file(&self) -> &Arc<File> {
        &self.files[0]
    }

    /// The open file for one more queue.
    pub(crate) fn queue_file(&self) -> &Arc<File> {
        &self.files[self.queues.fetch_add(1, Ordering::Relaxed) % self.files.len()]
    }

    /// The open file for syncs beside the queues, if the disk is written.
    pub(crate) fn sync_file(&self) -> Option<&File> {
        self.sync.as_ref()
    }

    /// Whether both are the same file or device and both are written.
    pub(crate) fn shares_writes_with(&self, other: &BaseDisk) -> bool {
        self.sync.is_some()
            && other.sync.is_some()
            && is_same(self.file(), other.file()).is_ok_and(|same| same)
    }

    /// Whether both are the same file or device.
    pub(crate) fn is_same_disk(&self, other: &BaseDisk) -> bool {
        is_same(self.file(), other.file()).is_ok_and(|same| same)
    }

    /// Changes the lock: shared for the base of other overlays, exclusive for a disk that is
    /// written.
    pub(crate) fn set_lock(&self, mode: LockMode) -> Result<(), LockError> {
        let mode = if self.size == 0 { LockMode::Shared } else { mode };
        self.lock.as_ref().map_or(Ok(()), |lock| lock.set(mode))
    }
}

/// Whether two open files are the same file, or nodes of the same device.
fn is_same(one: &File, other: &File) -> io::Result<bool> {
    let (one, other) = (one.metadata()?, other.metadata()?);
    if one.file_type().is_block_device() && other.file_type().is_block_device() {
        return Ok(one.rdev() == other.rdev());
    }
    Ok(is_same_inode(&one, &other))
}

fn open(path: &Path, writable: bool) -> io::Result<File> {
    // The open of a FIFO without a writer must not block. It is refused later, as no disk.
    let nonblocking = OFlags::NONBLOCK.bits().cast_signed();
    let file = File::options().read(true).write(writable).custom_flags(nonblocking).open(path)?;
    let flags = rustix::fs::fcntl_getfl(&file)?;
    rustix::fs::fcntl_setfl(&file, flags - OFlags::NONBLOCK)?;
    Ok(file)
}

/// The size of `file` in bytes, rounded down to a sector.
fn size_of(file: &File, path: &Path) -> io::Result<u64> {
    // Works for a block device as for a file.
    let size = rustix::fs::seek(file, SeekFrom::End(0))?;
    let whole = size / SECTOR * SECTOR;
    if whole != size {
        log::warn!(
            "disk {}: its size is {size} bytes, not a multiple of {SECTOR}; the guest sees the first {whole}",
            path.display()
        );
    }
    Ok(whole)
}
