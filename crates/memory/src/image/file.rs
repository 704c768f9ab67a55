//! Operations on image files: opening, finding data, punching holes, sharing blocks.

use std::fs::File;
use std::io;
use std::ops::Range;
use std::path::{Path, PathBuf};
use std::time::Duration;

use rustix::fs::{FallocateFlags, Mode, OFlags, SeekFrom};
use rustix::io::Errno;

use super::error::ImageError;
use crate::observer::Observer;

/// The most bytes that are copied or written between two calls of the [`Observer`].
pub(super) const CHUNK: u64 = 4 << 20;

/// How often opening a file with a lease is tried, a millisecond apart.
const OPEN_TRIES: u32 = 1000;

/// Opens the file at `path` for `access` (`RDONLY`, `RDWR`). Does not block on a FIFO or a device,
/// which the caller must refuse. Waits up to a second for a process that has a lease on the file:
/// see [`lease`](crate::sys::lease).
pub(super) fn open_image(path: &Path, access: OFlags) -> io::Result<File> {
    let flags = access | OFlags::NONBLOCK | OFlags::NOCTTY | OFlags::CLOEXEC;
    let mut tries = OPEN_TRIES;
    loop {
        match rustix::fs::open(path, flags, Mode::empty()) {
            Err(Errno::INTR) => {}
            Err(Errno::WOULDBLOCK) if tries > 0 => {
                tries -= 1;
                std::thread::sleep(Duration::from_millis(1));
            }
            opened => return Ok(File::from(opened?)),
        }
    }
}

/// The ranges of `file` within `range` that may have data (`SEEK_DATA`). On a file system without
/// holes it is one range.
pub(super) fn data_extents(file: &File, range: Range<u64>) -> DataExtents<'_> {
    DataExtents { file, at: range.start, end: range.end }
}

/// The iterator of [`data_extents`].
pub(super) struct DataExtents<'a> {
    file: &'a File,
    at: u64,
    end: u64,
}

impl Iterator for DataExtents<'_> {
    type Item = io::Result<Range<u64>>;

    fn next(&mut self) -> Option<Self::Item> {
        if self.at >= self.end {
            return None;
        }
        let start = match rustix::fs::seek(self.file, SeekFrom::Data(self.at)) {
            Ok(start) => start,
            Err(Errno::NXIO) => {
                self.at = self.end;
                return None;
            }
            Err(Errno::INVAL | Errno::OPNOTSUPP) => {
                let all = self.at..self.end;
                self.at = self.end;
                return Some(Ok(all));
            }
            Err(e) => {
                self.at = self.end;
                return Some(Err(e.into()));
            }
        };
        if start >= self.end {
            self.at = self.end;
            return None;
        }
        let end = match rustix::fs::seek(self.file, SeekFrom::Hole(start)) {
            Ok(end) => end.min(self.end),
            Err(e) => {
                self.at = self.end;
                return Some(Err(e.into()));
            }
        };
        self.at = end;
        Some(Ok(start..end))
    }
}

/// Makes `range` of `file` a hole, or writes zeros if the file system does not support holes.
pub(super) fn punch_hole(file: &File, range: Range<u64>) -> io::Result<()> {
    use std::os::unix::fs::FileExt;
    let flags = FallocateFlags::PUNCH_HOLE | FallocateFlags::KEEP_SIZE;
    match rustix::fs::fallocate(file, flags, range.start, range.end - range.start) {
        Err(Errno::OPNOTSUPP | Errno::NOSYS) => {}
        done => return done.map_err(Into::into),
    }
    let zeros = vec![0; (range.end - range.start).min(CHUNK) as usize];
    let mut at = range.start;
    while at < range.end {
        let len = (range.end - at).min(zeros.len() as u64);
        file.write_all_at(&zeros[..len as usize], at)?;
        at += len;
    }
    Ok(())
}

/// Makes `to` a copy of `from` that shares its blocks (`FICLONE`). Returns false if the file system
/// does not support it.
pub(super) fn reflink(from: &File, to: &File) -> bool {
    rustix::fs::ioctl_ficlone(to, from).is_ok()
}

/// A file that is being written, with its path and size for errors, and its observer.
#[derive(Clone, Copy)]
pub(super) struct ImageTarget<'a> {
    pub(super) file: &'a File,
    pub(super) path: &'a Path,
    /// Its full size in bytes.
    pub(super) size: u64,
    pub(super) observer: &'a dyn Observer,
}

impl ImageTarget<'_> {
    /// A write error at `offset`.
    pub(super) fn error(&self, offset: u64, source: io::Error) -> ImageError {
        ImageError::Write { path: self.path.to_path_buf(), size: self.size, offset, source }
    }

    /// Sets the file to its full size.
    pub(super) fn set_size(&self) -> Result<(), ImageError> {
        self.file.set_len(self.size).map_err(|e| self.error(0, e))
    }

    /// Reports progress. An error if the observer cancels.
    pub(super) fn report(&self, done: u64, total: u64) -> Result<(), ImageError> {
        self.observer.progress(done, total);
        if self.observer.cancelled() {
            return Err(ImageError::Cancelled { path: PathBuf::from(self.path) });
        }
        Ok(())
    }
}
