//! Merging a Diff onto its base.

use std::fs::File;
use std::os::unix::fs::{FileExt, MetadataExt};
use std::path::Path;

use rustix::fs::OFlags;
use snapshot::{AtomicFile, FileId};

use super::copy::copy;
use super::error::ImageError;
use super::file::{CHUNK, ImageTarget, data_extents, punch_hole, reflink};
use super::partial;
use super::redo::open_consistent;
use crate::observer::Observer;
use crate::pages::PAGE;

/// What a merge did.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct MergeStats {
    /// Bytes of data in the Diff.
    pub data_bytes: u64,
    /// Of these, bytes of zero pages, which became holes.
    pub zero_bytes: u64,
    /// The id of the new file; none for a merge in place.
    pub id: Option<FileId>,
}

/// Merges the Diff at `diff` into the image at `base` in place. No guest may be mapped from the
/// base. An interrupted merge can be repeated. Until then the base is neither the old nor the new
/// image; [`merge`] is atomic.
pub fn merge_in_place(base: &Path, diff: &Path, observer: &dyn Observer) -> Result<MergeStats, ImageError> {
    let file = open_consistent(base, OFlags::RDWR, observer)?;
    let (diff_file, size) = open_diff(&file, base, diff, observer)?;
    let target = ImageTarget { file: &file, path: base, size, observer };
    let merged = apply(&diff_file, diff, &target)?;
    file.sync_all().map_err(|e| target.error(0, e))?;
    Ok(merged)
}

/// Merges the Diff at `diff` onto the image at `base` into the file `output`, which may be either
/// of them. It appears when it is complete. It shares the blocks of the base if the file system
/// supports it.
pub fn merge(
    base: &Path,
    diff: &Path,
    output: &Path,
    observer: &dyn Observer,
) -> Result<MergeStats, ImageError> {
    let base_file = open_consistent(base, OFlags::RDONLY, observer)?;
    let (diff_file, size) = open_diff(&base_file, base, diff, observer)?;
    let file = AtomicFile::create(output)?;
    let target = ImageTarget { file: file.file(), path: output, size, observer };
    if !reflink(&base_file, file.file()) {
        target.set_size()?;
        for extent in data_extents(&base_file, 0..size) {
            copy(&base_file, &target, extent.map_err(ImageError::read(base))?, |_| target.report(0, size))?;
        }
    }
    let mut merged = apply(&diff_file, diff, &target)?;
    if partial::is_marked(&base_file) {
        partial::mark(file.file());
    }
    merged.id = Some(file.id());
    file.commit()?;
    Ok(merged)
}

/// Opens the Diff at `diff` and checks that it fits the base. Returns it and its size.
fn open_diff(
    base_file: &File,
    base: &Path,
    diff: &Path,
    observer: &dyn Observer,
) -> Result<(File, u64), ImageError> {
    let file = open_consistent(diff, OFlags::RDONLY, observer)?;
    let base_is = base_file.metadata().map_err(ImageError::read(base))?;
    let diff_is = file.metadata().map_err(ImageError::read(diff))?;
    let irregular = || std::io::Error::new(std::io::ErrorKind::InvalidInput, "it is not a regular file");
    for (is, path) in [(&base_is, base), (&diff_is, diff)] {
        if !is.is_file() {
            return Err(ImageError::read(path)(irregular()));
        }
    }
    if (base_is.dev(), base_is.ino()) == (diff_is.dev(), diff_is.ino()) {
        return Err(ImageError::SameFile { path: diff.to_path_buf() });
    }
    if base_is.size() != diff_is.size() {
        return Err(ImageError::SizeMismatch {
            base: base.to_path_buf(),
            base_size: base_is.size(),
            diff: diff.to_path_buf(),
            diff_size: diff_is.size(),
        });
    }
    Ok((file, base_is.size()))
}

/// Copies all data of the Diff to `target`.
fn apply(diff: &File, diff_path: &Path, target: &ImageTarget<'_>) -> Result<MergeStats, ImageError> {
    let mut merged = MergeStats { data_bytes: 0, zero_bytes: 0, id: None };
    let mut buffer = vec![0; CHUNK as usize];
    for extent in data_extents(diff, 0..target.size) {
        let extent = extent.map_err(ImageError::read(diff_path))?;
        let mut at = extent.start;
        while at < extent.end {
            let len = (extent.end - at).min(CHUNK);
            let data = &mut buffer[..len as usize];
            diff.read_exact_at(data, at).map_err(ImageError::read(diff_path))?;
            merged.zero_bytes += put(data, target, at)?;
            merged.data_bytes += len;
            at += len;
            target.report(at, target.size)?;
        }
    }
    Ok(merged)
}

/// Writes `data` at offset `at`, zero pages as holes. Returns the bytes of zero pages.
fn put(data: &[u8], target: &ImageTarget<'_>, at: u64) -> Result<u64, ImageError> {
    const ZERO: [u8; PAGE as usize] = [0; PAGE as usize];
    let is_zero = |page: &[u8]| *page == ZERO[..page.len()];
    let mut pages = data.chunks(PAGE as usize).peekable();
    let (mut start, mut zero_bytes) = (0, 0);
    while let Some(first) = pages.next() {
        let zero = is_zero(first);
        let mut end = start + first.len();
        while let Some(page) = pages.next_if(|page| is_zero(page) == zero) {
            end += page.len();
        }
        let (from, to) = (at + start as u64, at + end as u64);
        let done = if zero {
            zero_bytes += to - from;
            punch_hole(target.file, from..to)
        } else {
            target.file.write_all_at(&data[start..end], from)
        };
        done.map_err(|e| target.error(from, e))?;
        start = end;
    }
    Ok(zero_bytes)
}
