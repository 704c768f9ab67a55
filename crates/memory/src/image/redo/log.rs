//! The redo log: writing it, and applying it to an image.

use std::fs::File;
use std::io;
use std::ops::Range;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};

use rustix::fs::FallocateFlags;
use snapshot::AtomicFile;

use crate::image::error::ImageError;
use crate::image::file::{CHUNK, ImageTarget, punch_hole};
use crate::image::partial;
use crate::pages::PAGE;
use crate::ram::GuestRam;
use crate::sys::span::Span;
use crate::sys::span_io;

const MAGIC: [u8; 8] = *b"VESTREDO";
/// Length of a record's header in bytes.
const HEADER: u64 = 24;
/// The kind of a record whose bytes follow its header.
const DATA: u64 = 0;
/// The kind of a record of zeros, which no bytes follow.
const ZERO: u64 = 1;
/// The kind of the last record.
const END: u64 = 2;

/// A Diff of `ram` in a complete redo log, for the base at `path`.
#[derive(Debug)]
pub(in crate::image) struct RedoDiff {
    pub(super) log: AtomicFile,
    pub(super) ram: GuestRam,
    pub(super) path: PathBuf,
}

/// Writes a redo log, record by record.
pub(in crate::image) struct LogWriter<'a> {
    log: AtomicFile,
    ram: &'a GuestRam,
    base: File,
    path: &'a Path,
    size: u64,
    at: u64,
}

impl<'a> LogWriter<'a> {
    /// Creates a log for `base`, which [`open_base`](super::open_base) opened.
    pub(in crate::image) fn new(ram: &'a GuestRam, base: File, path: &'a Path) -> Result<Self, ImageError> {
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

    fn header(&mut self, range: &Range<u64>, kind: u64) -> Result<(), ImageError> {
        let fields = [range.start, range.end - range.start, kind];
        self.bytes(&fields.map(u64::to_le_bytes).concat())
    }

    /// Adds the contents of `span` as `range` of the image, and reserves space for them in the
    /// base.
    pub(in crate::image) fn data(&mut self, range: Range<u64>, span: Span) -> Result<(), ImageError> {
        // The base must not run out of space once the state names the log. This does not change its
        // contents.
        rustix::fs::fallocate(&self.base, FallocateFlags::KEEP_SIZE, range.start, range.end - range.start)
            .map_err(|e| self.error(e.into()))?;
        self.header(&range, DATA)?;
        span_io::write_all(self.log.file(), span, self.at).map_err(|e| self.error(e))?;
        self.at += range.end - range.start;
        Ok(())
    }

    /// Adds zeros as `range` of the image.
    pub(in crate::image) fn zeros(&mut self, range: Range<u64>) -> Result<(), ImageError> {
        self.header(&range, ZERO)
    }

    /// Ends the log.
    pub(in crate::image) fn finish(mut self) -> Result<RedoDiff, ImageError> {
        self.header(&(0..0), END)?;
        Ok(RedoDiff { log: self.log, ram: self.ram.clone(), path: self.path.to_path_buf() })
    }
}

/// Writes the contents of the log at `path` to `target`. It can be repeated after an interruption.
pub(super) fn apply(log: &File, path: &Path, target: &ImageTarget<'_>) -> Result<(), ImageError> {
    let read = |source| ImageError::read(path)(source);
    let damaged = || read(io::Error::new(io::ErrorKind::InvalidData, "it is a damaged redo log"));
    let mut magic = [0; MAGIC.len()];
    log.read_exact_at(&mut magic, 0).map_err(read)?;
    if magic != MAGIC {
        return Err(damaged());
    }
    // In an unmerged Diff a hole means "as in the base", so zeros must be written.
    let holes = !partial::is_marked(target.file);
    let mut buffer = Vec::new();
    let mut at = MAGIC.len() as u64;
    loop {
        let mut header = [0; HEADER as usize];
        log.read_exact_at(&mut header, at).map_err(read)?;
        at += HEADER;
        let field = |index: usize| {
            let bytes = header[index * 8..(index + 1) * 8].try_into().expect("eight bytes");
            u64::from_le_bytes(bytes)
        };
        let (offset, len, kind) = (field(0), field(1), field(2));
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
