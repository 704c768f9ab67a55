//! Writing images of guest RAM.

use std::fs::File;
use std::io::ErrorKind;
use std::ops::Range;
use std::os::unix::fs::MetadataExt;
use std::path::Path;
use std::time::Duration;

use rustix::fs::OFlags;
use snapshot::{AtomicFile, Staged};

use super::copy::copy;
use super::error::ImageError;
use super::file::{CHUNK, ImageTarget, data_extents, punch_hole, reflink};
use super::info::{ImageInfo, ImageKind};
use super::partial;
use super::redo::{self, LogWriter, RedoDiff};
use crate::backing::Backing;
use crate::observer::Observer;
use crate::page_server;
use crate::pages::{PAGE, PageSet};
use crate::ram::GuestRam;
use crate::sys::span::Span;
use crate::sys::span_io;

/// How long a page server may send no page while an image needs its pages.
const FETCH_TIMEOUT: Duration = Duration::from_secs(10);

/// A complete image without its final name, which it gets together with the state file.
#[derive(Debug)]
pub struct WrittenImage {
    /// The file. Dropping it removes it.
    pub file: StagedImage,
    /// The section for the state file.
    pub info: ImageInfo,
    /// Bytes that were written or copied: neither holes nor blocks shared with the base.
    pub data_bytes: u64,
}

/// A complete image that is not committed: a file that replaces the old one, or a Diff in a redo
/// log.
#[derive(Debug)]
pub struct StagedImage(StagedKind);

#[derive(Debug)]
enum StagedKind {
    File(Staged),
    RedoDiff(RedoDiff),
}

impl StagedImage {
    /// Commits the image and `state`, which names its id, as one step.
    pub fn commit_with(self, state: Staged) -> Result<(), ImageError> {
        match self.0 {
            StagedKind::File(file) => Ok(snapshot::commit_pair(file, state)?),
            StagedKind::RedoDiff(diff) => diff.commit(Some(state)),
        }
    }

    /// Commits the image without a state file.
    pub fn commit(self) -> Result<(), ImageError> {
        match self.0 {
            StagedKind::File(file) => Ok(file.commit().map(drop)?),
            StagedKind::RedoDiff(diff) => diff.commit(None),
        }
    }
}

#[cfg(test)]
impl StagedImage {
    /// The Diff, if it is in a redo log.
    pub(super) fn into_redo_diff(self) -> Option<RedoDiff> {
        match self.0 {
            StagedKind::File(_) => None,
            StagedKind::RedoDiff(diff) => Some(diff),
        }
    }
}

/// Writes all of the guest's memory to a new file for `path`. The memory must not change meanwhile:
/// the machine is paused, or this process is a fork of it.
pub fn write_full(ram: &GuestRam, path: &Path, observer: &dyn Observer) -> Result<WrittenImage, ImageError> {
    let pages = match ram.backing() {
        // Only the server has the pages that are not sent yet.
        Backing::PageServer(_) => ram.all_pages(),
        Backing::Anonymous => ram.private_pages()?,
        Backing::File(_) => ram.changed_pages()?,
    };
    let file = AtomicFile::create(path)?;
    let mut writer = ImageWriter::new(ram, &file, &pages, observer);
    let zeros = match ram.backing() {
        Backing::File(base) => writer.start_from(base, &pages)?,
        Backing::Anonymous | Backing::PageServer(_) => {
            writer.target.set_size()?;
            ZeroPages::Skip
        }
    };
    writer.write_pages(&pages, zeros)?;
    let written = writer.written;
    Ok(finish(ram, file, ImageKind::Full, written))
}

/// Writes `pages` of the guest's memory as a Diff to `path`. If a file of the image's size is there
/// (the base, or an older Diff of it), the pages are merged onto it. Otherwise the new file has
/// only these pages. The memory must not change meanwhile. Without dirty tracking, `pages` are
/// [`GuestRam::changed_pages`].
///
/// If the file system can share blocks, the base is replaced by a file that shares its blocks.
/// Otherwise the pages are written into the base in place if it has no other user
/// (`redo`), or else into a full copy that replaces it.
pub fn write_diff(
    ram: &GuestRam,
    path: &Path,
    pages: &PageSet,
    observer: &dyn Observer,
) -> Result<WrittenImage, ImageError> {
    let mut base = open_base(path, ram.layout().file_size(), observer)?;
    let file = AtomicFile::create(path)?;
    let shared = base.as_ref().is_some_and(|base| reflink(base, file.file()));
    // Close it: this descriptor would count as another user of the base.
    if base.take_if(|_| !shared).is_some() {
        if let Some(writable) = redo::open_base(ram, path) {
            drop(file);
            return write_redo(ram, path, writable, pages, observer);
        }
        base = open_base(path, ram.layout().file_size(), observer)?;
    }
    let mut writer = ImageWriter::new(ram, &file, pages, observer);
    match &base {
        Some(_) if shared => {}
        Some(base) => {
            writer.target.set_size()?;
            for extent in data_extents(base, 0..writer.target.size) {
                let extent = extent.map_err(ImageError::read(path))?;
                writer.total += extent.end - extent.start;
                writer.copy(base, extent)?;
            }
        }
        None => writer.target.set_size()?,
    }
    writer.write_pages(pages, ZeroPages::Write)?;
    if base.is_none() {
        writer.fill_coarse_extents(pages)?;
    }
    if match &base {
        Some(base) => partial::is_marked(base),
        None => writer.is_missing_pages(pages)?,
    } {
        partial::mark(file.file());
    }
    let written = writer.written;
    Ok(finish(ram, file, ImageKind::Diff, written))
}

/// Opens the file at `path`, if it is a regular file of this size.
fn open_base(path: &Path, size: u64, observer: &dyn Observer) -> Result<Option<File>, ImageError> {
    let file = match redo::open_consistent(path, OFlags::RDONLY, observer) {
        Ok(file) => file,
        Err(ImageError::Read { source, .. }) if source.kind() == ErrorKind::NotFound => return Ok(None),
        Err(e) => return Err(e),
    };
    let metadata = file.metadata().map_err(ImageError::read(path))?;
    Ok((metadata.is_file() && metadata.size() == size).then_some(file))
}

fn finish(ram: &GuestRam, file: AtomicFile, kind: ImageKind, data_bytes: u64) -> WrittenImage {
    let (layout, id, huge_pages) = (ram.layout().clone(), file.id(), ram.huge_pages());
    let file = StagedImage(StagedKind::File(file.stage()));
    WrittenImage { file, info: ImageInfo { layout, kind, id, huge_pages }, data_bytes }
}

/// Writes `pages` to a redo log of `base`.
fn write_redo(
    ram: &GuestRam,
    path: &Path,
    base: File,
    pages: &PageSet,
    observer: &dyn Observer,
) -> Result<WrittenImage, ImageError> {
    fetch(ram, pages, observer)?;
    let mut log = LogWriter::new(ram, base, path)?;
    let (mut written, mut done, total) = (0, 0, pages.count() * PAGE);
    for (index, region) in ram.layout().regions().iter().enumerate() {
        let span = ram.spans()[index];
        for run in pages.runs(index) {
            let mut page = run.start;
            while page < run.end {
                let most = run.end.min(page + CHUNK / PAGE);
                let zero = span_io::is_zero(span, page * PAGE);
                let end = (page + 1..most).find(|page| span_io::is_zero(span, page * PAGE) != zero);
                let end = end.unwrap_or(most);
                let bytes = page * PAGE..end * PAGE;
                let range = region.offset + bytes.start..region.offset + bytes.end;
                if zero {
                    log.zeros(range)?;
                } else {
                    written += bytes.end - bytes.start;
                    log.data(range, span.subspan(bytes))?;
                }
                done += (end - page) * PAGE;
                page = end;
                observer.progress(done, total);
                if observer.cancelled() {
                    return Err(ImageError::Cancelled { path: path.to_path_buf() });
                }
            }
        }
    }
    let diff = log.finish()?;
    let info = ImageInfo {
        layout: ram.layout().clone(),
        kind: ImageKind::Diff,
        id: diff.id(),
        huge_pages: ram.huge_pages(),
    };
    Ok(WrittenImage { file: StagedImage(StagedKind::RedoDiff(diff)), info, data_bytes: written })
}

/// Fetches `pages` from the page server, if there is one. Reading a page that never arrives would
/// block for ever.
fn fetch(ram: &GuestRam, pages: &PageSet, observer: &dyn Observer) -> Result<(), ImageError> {
    if let Backing::PageServer(link) = ram.backing() {
        page_server::fetch(link, ram, pages, FETCH_TIMEOUT, observer)?;
    }
    Ok(())
}

/// What to do with zero pages.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum ZeroPages {
    /// Write them: in a Diff a hole means "as in the base".
    Write,
    /// Skip them: in a new file they are holes already.
    Skip,
    /// Punch a hole: the file may have data there.
    PunchHole,
}

/// Writes an image into a new file.
struct ImageWriter<'a> {
    ram: &'a GuestRam,
    target: ImageTarget<'a>,
    written: u64,
    /// Bytes that are complete, of `total`.
    done: u64,
    total: u64,
}

impl<'a> ImageWriter<'a> {
    fn new(ram: &'a GuestRam, file: &'a AtomicFile, pages: &PageSet, observer: &'a dyn Observer) -> Self {
        let size = ram.layout().file_size();
        let target = ImageTarget { file: file.file(), path: file.path(), size, observer };
        ImageWriter { ram, target, written: 0, done: 0, total: pages.count() * PAGE }
    }

    /// Fills the new file with the unchanged pages of the image that the guest was restored from:
    /// all but `changed`. Returns how to write zero pages.
    fn start_from(&mut self, base: &File, changed: &PageSet) -> Result<ZeroPages, ImageError> {
        if reflink(base, self.target.file) {
            // The file may be longer than the image.
            self.target.set_size()?;
            return Ok(ZeroPages::PunchHole);
        }
        self.target.set_size()?;
        let mut rest = self.data_pages(base)?;
        rest.remove_all(changed);
        self.total += rest.count() * PAGE;
        for (index, region) in self.ram.layout().regions().iter().enumerate() {
            for run in rest.runs(index) {
                self.copy(base, region.offset + run.start * PAGE..region.offset + run.end * PAGE)?;
            }
        }
        Ok(ZeroPages::Skip)
    }

    /// The pages for which `file` may have data.
    fn data_pages(&self, file: &File) -> Result<PageSet, ImageError> {
        let mut pages = self.ram.empty_page_set();
        for (index, region) in self.ram.layout().regions().iter().enumerate() {
            for extent in data_extents(file, region.offset..region.offset + region.size) {
                let extent = extent.map_err(ImageError::read(self.target.path))?;
                let (start, end) = (extent.start - region.offset, extent.end - region.offset);
                pages.insert(index, start / PAGE..end.div_ceil(PAGE));
            }
        }
        Ok(pages)
    }

    /// Whether pages other than these may have data.
    fn is_missing_pages(&self, pages: &PageSet) -> Result<bool, ImageError> {
        let mut others = match self.ram.backing() {
            Backing::PageServer(_) => self.ram.all_pages(),
            Backing::Anonymous => self.ram.private_pages()?,
            Backing::File(base) => {
                let mut others = self.data_pages(base)?;
                others.insert_all(&self.ram.private_pages()?);
                others
            }
        };
        others.remove_all(pages);
        Ok(!others.is_empty())
    }

    fn copy(&mut self, from: &File, range: Range<u64>) -> Result<(), ImageError> {
        let (target, total, before) = (self.target, self.total, self.done);
        self.done += range.end - range.start;
        self.written += range.end - range.start;
        copy(from, &target, range, |copied| target.report(before + copied, total))
    }

    /// Writes pages of the guest's memory.
    fn write_pages(&mut self, pages: &PageSet, zeros: ZeroPages) -> Result<(), ImageError> {
        fetch(self.ram, pages, self.target.observer)?;
        for (index, region) in self.ram.layout().regions().iter().enumerate() {
            let span = self.ram.spans()[index];
            for run in pages.runs(index) {
                let mut page = run.start;
                while page < run.end {
                    let end = run.end.min(page + CHUNK / PAGE);
                    self.write_chunk(span, region.offset, page..end, zeros)?;
                    page = end;
                }
            }
        }
        Ok(())
    }

    /// Writes the pages of one chunk, with one call for each run of pages that are all zero or all
    /// not.
    fn write_chunk(
        &mut self,
        span: Span,
        offset: u64,
        pages: Range<u64>,
        zeros: ZeroPages,
    ) -> Result<(), ImageError> {
        let mut start = pages.start;
        while start < pages.end {
            let zero = zeros != ZeroPages::Write && span_io::is_zero(span, start * PAGE);
            let same = |page: &u64| zeros == ZeroPages::Write || span_io::is_zero(span, page * PAGE) == zero;
            let end = (start + 1..pages.end).find(|page| !same(page)).unwrap_or(pages.end);
            let (bytes, at) = (start * PAGE..end * PAGE, offset + start * PAGE);
            let done = match (zero, zeros) {
                (true, ZeroPages::Skip) => Ok(()),
                (true, _) => punch_hole(self.target.file, at..at + (end - start) * PAGE),
                (false, _) => span_io::write_all(self.target.file, span.subspan(bytes), at),
            };
            done.map_err(|e| self.target.error(at, e))?;
            if !zero {
                self.written += (end - start) * PAGE;
            }
            start = end;
        }
        self.done += (pages.end - pages.start) * PAGE;
        self.target.report(self.done, self.total)
    }

    /// Writes the neighbours of written pages that the file system reports as data. With large
    /// blocks, or huge pages of tmpfs, one written page makes its whole block data, and a merge
    /// would write zeros there.
    fn fill_coarse_extents(&mut self, written: &PageSet) -> Result<(), ImageError> {
        let mut written = written.clone();
        loop {
            let mut more = self.data_pages(self.target.file)?;
            more.remove_all(&written);
            if more.is_empty() {
                return Ok(());
            }
            self.total += more.count() * PAGE;
            self.write_pages(&more, ZeroPages::Write)?;
            written.insert_all(&more);
        }
    }
}
