//! A Diff that is written into its base: through a redo log, so that the image is the old one or
//! the new one at any moment.
//!
//! # How
//!
//! ```text
//! pages -> redo log beside the base    the base is untouched: a kill leaves the old image
//! sync the log and the state file, rename the state file, which names the log's id
//! ------------------------------------ from here on the image is the base with the log
//! mark the base, check that it has no other user, write the pages to it, sync it,
//! remove the mark, remove the log
//! ```
//!
//! A log that is found later (its writer was killed, or the base could not be written) is put into
//! the image by [`recover`], which makes a new file: by then others may have the base open.
//!
//! # Who may
//!
//! A base is changed in place only if no other process can see it change ([`BaseCandidate`]): it has
//! one name, no other process has it open or mapped ([`lease`]), and it lies on a file system that
//! is this host's alone and keeps promised space. A guest that was restored from the base itself
//! does not count as another user unless its memory is shared with a fork. In all other cases the
//! base is copied, as [`write_diff`](super::write_diff) says.
//!
//! # One writer and its readers
//!
//! The writer and a reader (a restore, a merge, a copy for another image) each announce themselves
//! first and look for the other second:
//!
//! ```text
//! writer                                      reader
//! W1 commit the log (locked) and the state    R1 open the base
//! W2 open the base                            R2 look at the mark
//! W3 mark the base with the log's id          R3 no mark: use the file
//! W4 check that no other process has it open     mark and log: close the file, wait for the log or
//! W5 write and sync the base                        complete the image (recover), start at R1
//! W6 remove the mark                             mark, no log: use the file if it still has its
//! W7 remove the log                                 name, else start at R1
//! ```
//!
//! A reader therefore never uses a file that changes, and never a half-written one:
//!
//! - R1 before W4, the file still open at W4: the kernel counts the reader, so W4 fails. The writer
//!   removes the mark and completes the image into a new file. The reader's file stays the old
//!   image, whether the reader looked before W3, after the mark was removed, or in between (then
//!   the reader closes it and opens the new one).
//! - R1 after W4: W3 came before, so R2 sees the mark until W6, and W5 was before W6. With a mark,
//!   the reader waits for the log's lock, which the writer holds until W7. Without one, the file is
//!   the whole new image, and the reader is counted by the next writer.
//! - R2 sees the mark, R3 no log. Either the writer reached W7, so the file is whole; or the writer
//!   was killed and another process completed the image, which gives the name to a new file before
//!   it removes the log. R3 tells the two apart by the name. A mark that a crash or a copy left
//!   without a log is thus ignored, and the next writer replaces it.
//!
//! Two writers: a writer that finds a mark with a log at W2 leaves both alone and completes its own
//! image as a reader of the other's. Two writers between W2 and W4 may overwrite or remove each
//! other's mark, but both have the base open. So W4 also checks that the mark is still its own and
//! the file still at its path: at that moment no other process has the base open, and one that
//! opens it later sees the mark and does not touch it.
//!
//! Killed before W3, or with the mark removed after a failed W4: the base is the old image, and the
//! state names the log. Killed from W3 to W6: the mark and the state name the log; the mark is on
//! disk before the first page is. Killed after W6: the base is whole, and applying the log again
//! changes nothing.
//!
//! Programs that ignore the mark are protected only by W4: a copy that another program begins
//! between W4 and W6 may hold half of a Diff.
//!
//! # Format
//!
//! [`MAGIC`], then records: offset and length in the image (bytes, both of whole pages) and a kind,
//! 8 bytes each, little-endian; after a `DATA` record so many bytes. An `END` record comes last. It
//! is checked as anything that comes from a disk: no record reaches beyond the image.

use std::fs::{File, Metadata};
use std::io;
use std::ops::Range;
use std::os::unix::fs::{FileExt, MetadataExt};
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use rustix::fs::{FallocateFlags, OFlags};
use rustix::io::Errno;
use snapshot::{AtomicFile, FileId, RedoLog, Staged};

use super::copy::copy;
use super::error::ImageError;
use super::file::{CHUNK, ImageTarget, data_extents, open_image, punch_hole, reflink};
use super::{partial, redo_mark};
use crate::backing::Backing;
use crate::observer::Observer;
use crate::pages::PAGE;
use crate::ram::GuestRam;
use crate::sys::lease;
use crate::sys::span::Span;
use crate::sys::span_io;

const MAGIC: [u8; 8] = *b"VESTREDO";
/// Bytes of a record's head.
const HEAD: u64 = 24;
/// Bytes follow.
const DATA: u64 = 0;
/// All of it is zero; no bytes follow.
const ZERO: u64 = 1;
/// There are no more records.
const END: u64 = 2;

/// How long a log that another process applies is waited for.
const LOCK_TIMEOUT: Duration = Duration::from_secs(10);

/// How many times a reader opens a base that it finds marked each time.
const RECOVER_TRIES: u32 = 16;

/// File systems that are this host's alone, have extended attributes and keep space that was
/// promised (fallocate). By the numbers of statfs(2): ext2 to ext4, XFS, tmpfs.
const FILE_SYSTEMS: [i64; 3] = [0xef53, 0x5846_5342, 0x0102_1994];

/// A Diff of `ram` in its redo log, for the base at `path`.
#[derive(Debug)]
pub(super) struct RedoDiff {
    log: AtomicFile,
    ram: GuestRam,
    path: PathBuf,
}

/// A base that may be changed in place if no other process has it open. It holds the one file
/// that the lease counts.
enum BaseCandidate<'a> {
    /// The file that the guest is mapped from.
    Mapped(&'a File),
    /// A file for writing, of a base that the guest is not mapped from.
    Writable(File),
}

impl<'a> BaseCandidate<'a> {
    /// Opens the base at `path`, if all but its other users allow a change in place.
    fn open(ram: &'a GuestRam, path: &Path) -> Option<Self> {
        let candidate = match ram.backing() {
            Backing::File(own) if is_at_path(own, path) => BaseCandidate::Mapped(own),
            _ => BaseCandidate::Writable(open_image(path, OFlags::RDWR).ok()?),
        };
        let file_system = rustix::fs::fstatfs(candidate.file()).ok()?.f_type;
        let shared = matches!(candidate, BaseCandidate::Mapped(_)) && ram.is_shared();
        (!shared && candidate.has_one_name(path) && FILE_SYSTEMS.contains(&file_system)).then_some(candidate)
    }

    fn file(&self) -> &File {
        match self {
            BaseCandidate::Mapped(file) => file,
            BaseCandidate::Writable(file) => file,
        }
    }

    /// Whether it is a regular file at `path` and nowhere else.
    fn has_one_name(&self, path: &Path) -> bool {
        let file = self.file();
        file.metadata().is_ok_and(|is| is.is_file() && is.nlink() == 1) && is_at_path(file, path)
    }

    /// The file for writing, if no other process has the base open and it is still at `path`.
    fn into_writable(self, path: &Path) -> Option<File> {
        if !lease::is_sole_user(self.file()) || !self.has_one_name(path) {
            return None;
        }
        match self {
            BaseCandidate::Writable(file) => Some(file),
            // Only now: the lease would have counted this one.
            BaseCandidate::Mapped(own) => {
                let file = open_image(path, OFlags::RDWR).ok()?;
                is_same(&file.metadata().ok()?, &own.metadata().ok()?).then_some(file)
            }
        }
    }
}

fn is_same(one: &Metadata, other: &Metadata) -> bool {
    (one.dev(), one.ino()) == (other.dev(), other.ino())
}

/// Whether `file` is what `path` names.
fn is_at_path(file: &File, path: &Path) -> bool {
    let (Ok(is), Ok(there)) = (file.metadata(), std::fs::metadata(path)) else { return false };
    is_same(&is, &there)
}

/// Opens the base at `path` for a redo log, if `ram` could change it in place now.
pub(super) fn open_base(ram: &GuestRam, path: &Path) -> Option<File> {
    let candidate = BaseCandidate::open(ram, path)?;
    redo_mark::is_possible(candidate.file()).then(|| candidate.into_writable(path))?
}

/// A step of [`RedoDiff::commit`] that is done: W1 to W6 of [the module](self).
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
enum CommitStep {
    Committed,
    Opened,
    Marked,
    Alone,
    Written,
    Unmarked,
}

/// Marks the base at `path` with `log`, and opens it for writing if no other process has it open:
/// W2 to W4 of [the module](self). On `None` the base is as it was.
fn mark_base(ram: &GuestRam, path: &Path, log: FileId, reached: &mut dyn FnMut(CommitStep)) -> Option<File> {
    let candidate = BaseCandidate::open(ram, path)?;
    reached(CommitStep::Opened);
    if redo_mark::get(candidate.file()).ok()?.is_some_and(|other| snapshot::redo_path(path, other).is_some())
    {
        return None;
    }
    // A mark that says nothing to anyone else can be removed through any descriptor.
    let marked = candidate.file().try_clone().ok()?;
    let is_marked = redo_mark::set(&marked, log).is_ok();
    reached(CommitStep::Marked);
    let base = candidate.into_writable(path).filter(|_| is_marked);
    // Another writer may have replaced or removed the mark until then.
    let base = base.filter(|base| redo_mark::get(base).is_ok_and(|found| found == Some(log)));
    if base.is_none() {
        // A mark that stays here is harmless: its log is complete, and removed last.
        let _ = redo_mark::clear(&marked);
        return None;
    }
    reached(CommitStep::Alone);
    base
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
        span_io::write_all(self.log.file(), span, self.at).map_err(|e| self.error(e))?;
        self.at += range.end - range.start;
        Ok(())
    }

    /// Adds pages of zeros.
    pub(super) fn zeros(&mut self, range: Range<u64>) -> Result<(), ImageError> {
        self.head(&range, ZERO)
    }

    /// The log is complete.
    pub(super) fn finish(mut self) -> Result<RedoDiff, ImageError> {
        self.head(&(0..0), END)?;
        Ok(RedoDiff { log: self.log, ram: self.ram.clone(), path: self.path.to_path_buf() })
    }
}

impl RedoDiff {
    /// What the state file calls the image with this Diff in it.
    pub(super) fn id(&self) -> FileId {
        self.log.id()
    }

    /// Makes the log and the state appear as one step, and writes the Diff to the base.
    pub(super) fn commit(self, state: Option<Staged>) -> Result<(), ImageError> {
        self.commit_in_steps(state, &mut |_| {})
    }

    /// [`Self::commit`], which says how far it is.
    fn commit_in_steps(
        self,
        state: Option<Staged>,
        reached: &mut dyn FnMut(CommitStep),
    ) -> Result<(), ImageError> {
        let RedoDiff { log, ram, path } = self;
        let log = snapshot::commit_redo(log.stage(), state)?;
        let (redo, id) = (log.path(), log.id());
        reached(CommitStep::Committed);
        // Another process may have opened the base since: then the base is left as it is.
        let written = match mark_base(&ram, &path, id, reached) {
            Some(base) => {
                write_to_base(&base, &log, ram.layout().file_size(), reached).and_then(|()| Ok(log.remove()?))
            }
            None => recover_to_new_file(&path, log, &()),
        };
        written.map_err(|source| ImageError::Unapplied { redo, id, source: Box::new(source) })
    }
}

#[cfg(test)]
impl RedoDiff {
    /// Commits the log, and nothing more.
    fn into_log(self) -> RedoLog {
        snapshot::commit_redo(self.log.stage(), None).unwrap()
    }
}

/// Writes the log to `base`, which is marked: W5 and W6 of [the module](self).
fn write_to_base(
    base: &File,
    log: &RedoLog,
    size: u64,
    reached: &mut dyn FnMut(CommitStep),
) -> Result<(), ImageError> {
    let path = log.path();
    let target = ImageTarget { file: base, path: &path, size, observer: &() };
    // The mark is on disk before the first page is.
    base.sync_all().map_err(|e| target.error(0, e))?;
    apply(log.file(), &path, &target)?;
    base.sync_all().map_err(|e| target.error(0, e))?;
    reached(CommitStep::Written);
    // The log goes after it: a mark without a log says nothing.
    redo_mark::clear(base).map_err(|e: Errno| target.error(0, e.into()))?;
    reached(CommitStep::Unmarked);
    Ok(())
}

/// Puts what the log at `path` holds into `target`. It may be done again after it was cut short.
fn apply(log: &File, path: &Path, target: &ImageTarget<'_>) -> Result<(), ImageError> {
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
            return target.report(target.size, target.size);
        }
        let end = offset.checked_add(len).filter(|end| *end <= target.size).ok_or_else(damaged)?;
        if len == 0 || len > CHUNK || !offset.is_multiple_of(PAGE) {
            return Err(damaged());
        }
        let written = match kind {
            DATA => {
                buffer.resize(len as usize, 0);
                log.read_exact_at(&mut buffer, at).map_err(read)?;
                at += len;
                target.file.write_all_at(&buffer, offset)
            }
            ZERO if holes => punch_hole(target.file, offset..end),
            ZERO => {
                buffer.clear();
                buffer.resize(len as usize, 0);
                target.file.write_all_at(&buffer, offset)
            }
            _ => return Err(damaged()),
        };
        written.map_err(|e| target.error(offset, e))?;
        target.report(end, target.size)?;
    }
}

/// The log that the file at `path` is marked with, if there is a file and a mark.
fn marked(path: &Path) -> Result<Option<FileId>, ImageError> {
    match open_image(path, OFlags::RDONLY) {
        Ok(file) => redo_mark::get(&file).map_err(ImageError::read(path)),
        Err(e) if e.kind() == io::ErrorKind::NotFound => Ok(None),
        Err(e) => Err(ImageError::read(path)(e)),
    }
}

/// Completes the image at `path` if a Diff was to be written into it and is still in a redo log:
/// the one that belongs to the state `id`, or the one that was begun. It is a new file then, so
/// that a process that has the old one open sees no change. Does nothing where there is no log.
pub fn recover(path: &Path, id: Option<FileId>, observer: &dyn Observer) -> Result<(), ImageError> {
    if let Some(id) = id {
        recover_log(path, id, observer)?;
    }
    marked(path)?.map_or(Ok(()), |id| recover_log(path, id, observer))
}

/// Waits for the writer of the log `id`, or completes the image if that writer is gone.
fn recover_log(path: &Path, id: FileId, observer: &dyn Observer) -> Result<(), ImageError> {
    let deadline = Instant::now() + LOCK_TIMEOUT;
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
    let Some(log) = log else { return Ok(()) };
    let redo = log.path();
    recover_to_new_file(path, log, observer).map_err(|source| match source {
        cancelled @ ImageError::Cancelled { .. } => cancelled,
        source => ImageError::Unapplied { redo, id, source: Box::new(source) },
    })
}

/// What a reader that has opened an image sees: R2 and R3 of [the module](self).
#[derive(Debug, PartialEq, Eq)]
enum BaseState {
    /// It is whole, and stays as it is while it is open.
    Whole,
    /// It is being written from this log, or its writer was killed.
    Marked(FileId),
    /// Its writer was killed, and another file has taken its place.
    Replaced,
}

fn inspect(file: &File, path: &Path) -> io::Result<BaseState> {
    Ok(match redo_mark::get(file)? {
        None => BaseState::Whole,
        Some(id) if snapshot::redo_path(path, id).is_some() => BaseState::Marked(id),
        Some(_) if is_at_path(file, path) => BaseState::Whole,
        Some(_) => BaseState::Replaced,
    })
}

/// Opens the image at `path` as a reader: no other process changes it while the file is open, and
/// it is whole. Completes it first if its writer was killed.
pub(super) fn open_consistent(
    path: &Path,
    access: OFlags,
    observer: &dyn Observer,
) -> Result<File, ImageError> {
    open_consistent_for(path, access, None, observer)
}

/// [`open_consistent`], for the owner of the log `own`: that log may be half in the image.
fn open_consistent_for(
    path: &Path,
    access: OFlags,
    own: Option<FileId>,
    observer: &dyn Observer,
) -> Result<File, ImageError> {
    for _ in 0..RECOVER_TRIES {
        let file = open_image(path, access).map_err(ImageError::read(path))?;
        match inspect(&file, path).map_err(ImageError::read(path))? {
            BaseState::Whole => return Ok(file),
            BaseState::Marked(id) if Some(id) == own => return Ok(file),
            BaseState::Marked(id) => {
                drop(file);
                recover_log(path, id, observer)?;
            }
            BaseState::Replaced => {}
        }
    }
    let busy = format!("other processes are writing to it: still so after {RECOVER_TRIES} tries");
    Err(ImageError::read(path)(io::Error::new(io::ErrorKind::ResourceBusy, busy)))
}

/// Makes a new image at `path` of the one that is there and a log, which is removed.
fn recover_to_new_file(path: &Path, log: RedoLog, observer: &dyn Observer) -> Result<(), ImageError> {
    let base = open_consistent_for(path, OFlags::RDONLY, Some(log.id()), observer)?;
    let size = base.metadata().map_err(ImageError::read(path))?.size();
    let file = AtomicFile::create(path)?;
    let target = ImageTarget { file: file.file(), path, size, observer };
    if !reflink(&base, file.file()) {
        target.set_size()?;
        for extent in data_extents(&base, 0..size) {
            copy(&base, &target, extent.map_err(ImageError::read(path))?, |_| target.report(0, size))?;
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
