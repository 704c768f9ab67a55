//! A Diff that is written into its base: through a redo log, so that the image is the old one or
//! the new one at any moment.
//!
//! # How
//!
//! ```text
//! pages -> redo log beside the base    the base is untouched: a kill leaves the old image
//! sync the log and the state file, rename the state file, which names the log's id
//! ------------------------------------ from here on the image is the base with the log
//! mark the base, write the pages to it, sync it, remove the mark and the log
//! ```
//!
//! A log that is found later (its writer was killed, or the base could not be written) is put into
//! the image by [`settle`], which makes a new file: by then others may have the base open.
//!
//! # Who may
//!
//! A base is changed in place only if no other process can see it change ([`open_base`]): it has
//! one name, no other process has it open or mapped ([`lease`]), and it lies on a file system that
//! is this host's alone and keeps promised space. A guest that was restored from the base itself
//! does not count as another user unless its memory is shared with a fork. In all other cases the
//! base is copied, as [`write_diff`](super::write_diff) says.
//!
//! # Format
//!
//! [`MAGIC`], then records: offset and length in the image (bytes, both of whole pages) and a kind,
//! 8 bytes each, little-endian; after a `DATA` record so many bytes. An `END` record comes last. It
//! is checked as anything that comes from a disk: no record reaches beyond the image.

use std::fs::File;
use std::io;
use std::ops::Range;
use std::os::unix::fs::{FileExt, MetadataExt};
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use rustix::fs::{FallocateFlags, Mode, OFlags, XattrFlags, fgetxattr, fremovexattr, fsetxattr};
use rustix::io::Errno;
use snapshot::{AtomicFile, FileId, RedoLog, Staged};

use super::copy::copy;
use super::file::{STEP, Target, extents, make_hole, share};
use super::{ImageError, Observer, partial};
use crate::pages::PAGE;
use crate::ram::GuestRam;
use crate::source::Source;
use crate::sys::guest_io;
use crate::sys::lease;
use crate::sys::span::Span;

const MAGIC: [u8; 8] = *b"VESTREDO";
/// Bytes of a record's head.
const HEAD: u64 = 24;
/// Bytes follow.
const DATA: u64 = 0;
/// All of it is zero; no bytes follow.
const ZERO: u64 = 1;
/// There are no more records.
const END: u64 = 2;

/// On a base that is being written: the id of its redo log.
const MARK: &std::ffi::CStr = c"user.vesta.redo";

/// How long a log that another process applies is waited for.
const LOCK_TIMEOUT: Duration = Duration::from_secs(10);

/// File systems that are this host's alone, have extended attributes and keep space that was
/// promised (fallocate). By the numbers of statfs(2): ext2 to ext4, XFS, tmpfs.
const FILE_SYSTEMS: [i64; 3] = [0xef53, 0x5846_5342, 0x0102_1994];

/// A Diff of `ram` in its redo log, for the base at `path`.
#[derive(Debug)]
pub(super) struct Patch {
    log: AtomicFile,
    ram: GuestRam,
    path: PathBuf,
}

/// Opens the base at `path` for a change in place, if `ram` may make one now.
pub(super) fn open_base(ram: &GuestRam, path: &Path) -> Option<File> {
    let wanted = std::fs::metadata(path).ok()?;
    let same = |other: &std::fs::Metadata| (other.dev(), other.ino()) == (wanted.dev(), wanted.ino());
    let own = match ram.source() {
        Source::File(own) if own.metadata().is_ok_and(|own| same(&own)) => Some(own),
        _ => None,
    };
    // The lease counts open files: of a base that the guest itself is mapped from, that one; else
    // the one that writes.
    if own.is_some_and(|own| ram.is_shared() || !lease::is_alone(own)) {
        return None;
    }
    let flags = OFlags::RDWR | OFlags::NONBLOCK | OFlags::NOCTTY | OFlags::CLOEXEC;
    let file = File::from(rustix::fs::open(path, flags, Mode::empty()).ok()?);
    let is = file.metadata().ok()?;
    let file_system = rustix::fs::fstatfs(&file).ok()?.f_type;
    if !is.is_file() || !same(&is) || is.nlink() != 1 || !FILE_SYSTEMS.contains(&file_system) {
        return None;
    }
    let alone = own.is_some() || lease::is_alone(&file);
    // A first mark shows that there can be one.
    let markable = fsetxattr(&file, c"user.vesta.probe", b"1", XattrFlags::empty())
        .and_then(|()| fremovexattr(&file, c"user.vesta.probe"));
    (alone && markable.is_ok()).then_some(file)
}

/// Writes a redo log, record by record.
pub(super) struct LogWriter<'a> {
    log: AtomicFile,
    ram: &'a GuestRam,
    base: File,
    path: &'a Path,
    size: u64,
    at: u64,
}

impl<'a> LogWriter<'a> {
    /// Begins a log for `base`, which [`open_base`] opened.
    pub(super) fn new(ram: &'a GuestRam, base: File, path: &'a Path) -> Result<Self, ImageError> {
        let log = AtomicFile::create_redo(path)?;
        let size = ram.layout().file_size();
        let mut writer = LogWriter { log, ram, base, path, size, at: 0 };
        writer.bytes(&MAGIC)?;
        Ok(writer)
    }

    fn error(&self, source: io::Error) -> ImageError {
        ImageError::Write { path: self.path.to_path_buf(), size: self.size, offset: self.at, source }
    }

    fn bytes(&mut self, bytes: &[u8]) -> Result<(), ImageError> {
        self.log.file().write_all_at(bytes, self.at).map_err(|e| self.error(e))?;
        self.at += bytes.len() as u64;
        Ok(())
    }

    fn head(&mut self, range: &Range<u64>, kind: u64) -> Result<(), ImageError> {
        let words = [range.start, range.end - range.start, kind];
        self.bytes(&words.map(u64::to_le_bytes).concat())
    }

    /// Adds what `span` holds, for `range` of the image. The base has space for it when this
    /// returns.
    pub(super) fn data(&mut self, range: Range<u64>, span: Span) -> Result<(), ImageError> {
        // The base must not run out of space once the state names the log. Blocks that it has stay
        // as they are.
        rustix::fs::fallocate(&self.base, FallocateFlags::KEEP_SIZE, range.start, range.end - range.start)
            .map_err(|e| self.error(e.into()))?;
        self.head(&range, DATA)?;
        guest_io::write_all(self.log.file(), span, self.at).map_err(|e| self.error(e))?;
        self.at += range.end - range.start;
        Ok(())
    }

    /// Adds pages of zeros.
    pub(super) fn zeros(&mut self, range: Range<u64>) -> Result<(), ImageError> {
        self.head(&range, ZERO)
    }

    /// The log is complete.
    pub(super) fn finish(mut self) -> Result<Patch, ImageError> {
        self.head(&(0..0), END)?;
        Ok(Patch { log: self.log, ram: self.ram.clone(), path: self.path.to_path_buf() })
    }
}

impl Patch {
    /// What the state file calls the image with this Diff in it.
    pub(super) fn id(&self) -> FileId {
        self.log.id()
    }

    /// Makes the log and the state appear as one step, and writes the Diff to the base.
    pub(super) fn commit(self, state: Option<Staged>) -> Result<(), ImageError> {
        let Patch { log, ram, path } = self;
        let log = snapshot::commit_redo(log.stage(), state)?;
        let (redo, id) = (log.path(), log.id());
        // Another process may have opened the base since: then the base is left as it is.
        let written = match open_base(&ram, &path) {
            Some(base) => {
                write_to_base(&base, &log, ram.layout().file_size()).and_then(|()| Ok(log.remove()?))
            }
            None => complete(&path, log, &()),
        };
        written.map_err(|source| ImageError::Unapplied { redo, id, source: Box::new(source) })
    }
}

#[cfg(test)]
impl Patch {
    /// Commits the log, and nothing more.
    fn into_log(self) -> RedoLog {
        snapshot::commit_redo(self.log.stage(), None).unwrap()
    }
}

fn write_to_base(base: &File, log: &RedoLog, size: u64) -> Result<(), ImageError> {
    let path = log.path();
    let target = Target { file: base, path: &path, size, observer: &() };
    let failed = |e: Errno| target.error(0, e.into());
    fsetxattr(base, MARK, log.id().to_string().as_bytes(), XattrFlags::empty()).map_err(failed)?;
    base.sync_all().map_err(|e| target.error(0, e))?;
    apply(log.file(), &path, &target)?;
    base.sync_all().map_err(|e| target.error(0, e))?;
    // The log goes after it: a mark without a log says nothing.
    fremovexattr(base, MARK).map_err(failed)
}

/// Puts what the log at `path` holds into `target`. It may be done again after it was cut short.
fn apply(log: &File, path: &Path, target: &Target<'_>) -> Result<(), ImageError> {
    let read = |source| ImageError::read(path)(source);
    let damaged = || read(io::Error::new(io::ErrorKind::InvalidData, "the redo log is damaged"));
    let mut magic = [0; MAGIC.len()];
    log.read_exact_at(&mut magic, 0).map_err(read)?;
    if magic != MAGIC {
        return Err(damaged());
    }
    // In a Diff a hole means something else.
    let holes = !partial::is_marked(target.file);
    let mut buffer = Vec::new();
    let mut at = MAGIC.len() as u64;
    loop {
        let mut head = [0; HEAD as usize];
        log.read_exact_at(&mut head, at).map_err(read)?;
        at += HEAD;
        let word = |index: usize| {
            let bytes = head[index * 8..(index + 1) * 8].try_into().expect("eight bytes");
            u64::from_le_bytes(bytes)
        };
        let (offset, len, kind) = (word(0), word(1), word(2));
        if kind == END {
            return target.step(target.size, target.size);
        }
        let end = offset.checked_add(len).filter(|end| *end <= target.size).ok_or_else(damaged)?;
        if len == 0 || len > STEP || !offset.is_multiple_of(PAGE) {
            return Err(damaged());
        }
        let written = match kind {
            DATA => {
                buffer.resize(len as usize, 0);
                log.read_exact_at(&mut buffer, at).map_err(read)?;
                at += len;
                target.file.write_all_at(&buffer, offset)
            }
            ZERO if holes => make_hole(target.file, offset..end),
            ZERO => {
                buffer.clear();
                buffer.resize(len as usize, 0);
                target.file.write_all_at(&buffer, offset)
            }
            _ => return Err(damaged()),
        };
        written.map_err(|e| target.error(offset, e))?;
        target.step(end, target.size)?;
    }
}

/// The log that the file at `path` is marked with, if there is a file and a mark.
fn marked(path: &Path) -> Option<FileId> {
    let flags = OFlags::RDONLY | OFlags::NONBLOCK | OFlags::NOCTTY | OFlags::CLOEXEC;
    let file = rustix::fs::open(path, flags, Mode::empty()).ok()?;
    let mut id = [0; 16];
    let len = fgetxattr(&file, MARK, &mut id[..]).ok()?;
    std::str::from_utf8(id.get(..len)?).ok()?.parse().ok()
}

/// Completes the image at `path` if a Diff was to be written into it and is still in a redo log:
/// the one that belongs to the state `id`, or the one that was begun. It is a new file then, so
/// that a process that has the old one open sees no change. Does nothing where there is no log.
pub fn settle(path: &Path, id: Option<FileId>, observer: &dyn Observer) -> Result<(), ImageError> {
    let deadline = Instant::now() + LOCK_TIMEOUT;
    let candidates = id.into_iter().chain(marked(path));
    for id in candidates {
        let log = loop {
            match RedoLog::open(path, id) {
                // Its writer lives, and is about to write it to the image.
                Err(e) if e.source.kind() == io::ErrorKind::WouldBlock && Instant::now() < deadline => {
                    if observer.cancelled() {
                        return Err(ImageError::Cancelled { path: path.to_path_buf() });
                    }
                    std::thread::sleep(Duration::from_millis(10));
                }
                other => break other?,
            }
        };
        if let Some(log) = log {
            let redo = log.path();
            complete(path, log, observer).map_err(|source| match source {
                cancelled @ ImageError::Cancelled { .. } => cancelled,
                source => ImageError::Unapplied { redo, id, source: Box::new(source) },
            })?;
        }
    }
    Ok(())
}

/// Makes a new image at `path` of the one that is there and a log, which is removed.
fn complete(path: &Path, log: RedoLog, observer: &dyn Observer) -> Result<(), ImageError> {
    let base = File::open(path).map_err(ImageError::read(path))?;
    let size = base.metadata().map_err(ImageError::read(path))?.size();
    let file = AtomicFile::create(path)?;
    let target = Target { file: file.file(), path, size, observer };
    if !share(&base, file.file()) {
        target.set_size()?;
        for extent in extents(&base, 0..size) {
            copy(&base, &target, extent.map_err(ImageError::read(path))?, |_| target.step(0, size))?;
        }
    }
    if partial::is_marked(&base) {
        partial::mark(file.file());
    }
    apply(log.file(), &log.path(), &target)?;
    file.commit()?;
    Ok(log.remove()?)
}

#[cfg(test)]
#[path = "redo_tests.rs"]
mod tests;
