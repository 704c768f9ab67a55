//! Opening an image that another process may be changing, and recovering one whose writer was
//! killed: R1 to R3 of [the module](super).

use std::fs::File;
use std::io;
use std::os::unix::fs::MetadataExt;
use std::path::Path;
use std::time::{Duration, Instant};

use rustix::fs::OFlags;
use snapshot::{AtomicFile, FileId, RedoLog};

use super::base::is_at_path;
use super::log::apply;
use super::mark;
use crate::image::copy::copy;
use crate::image::error::ImageError;
use crate::image::file::{ImageTarget, data_extents, open_image, reflink};
use crate::image::partial;
use crate::observer::Observer;

/// How long to wait for a log that another process applies.
const LOCK_TIMEOUT: Duration = Duration::from_secs(10);

/// How often a reader opens a base that is marked each time.
const RECOVER_TRIES: u32 = 16;

/// The id of the log that the file at `path` is marked with, if there is a file and a mark.
pub(super) fn marked(path: &Path) -> Result<Option<FileId>, ImageError> {
    match open_image(path, OFlags::RDONLY) {
        Ok(file) => mark::get(&file).map_err(ImageError::read(path)),
        Err(e) if e.kind() == io::ErrorKind::NotFound => Ok(None),
        Err(e) => Err(ImageError::read(path)(e)),
    }
}

/// Recovers the image at `path` if its last Diff is still in a redo log: the log `id` that the
/// state file names, or the log that the image is marked with. The result is a new file, so that a
/// process that has the old one open sees no change. Does nothing if there is no log.
pub fn recover(path: &Path, id: Option<FileId>, observer: &dyn Observer) -> Result<(), ImageError> {
    if let Some(id) = id {
        recover_log(path, id, observer)?;
    }
    marked(path)?.map_or(Ok(()), |id| recover_log(path, id, observer))
}

/// Waits for the writer of the log `id`, or recovers the image if that writer is gone.
fn recover_log(path: &Path, id: FileId, observer: &dyn Observer) -> Result<(), ImageError> {
    let deadline = Instant::now() + LOCK_TIMEOUT;
    let log = loop {
        match RedoLog::open(path, id) {
            // Its writer lives and is applying it.
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

/// The state of an image that a reader has opened: R2 and R3 of [the module](super).
#[derive(Debug, PartialEq, Eq)]
pub(super) enum BaseState {
    /// It is complete and does not change while it is open.
    Whole,
    /// A writer is applying this log, or was killed while it did.
    Marked(FileId),
    /// Its writer was killed, and a recovered file has replaced it.
    Replaced,
}

/// Reads the mark of an open image.
pub(super) fn inspect(file: &File, path: &Path) -> io::Result<BaseState> {
    Ok(match mark::get(file)? {
        None => BaseState::Whole,
        Some(id) if snapshot::redo_path(path, id).is_some() => BaseState::Marked(id),
        Some(_) if is_at_path(file, path) => BaseState::Whole,
        Some(_) => BaseState::Replaced,
    })
}

/// Opens the image at `path` as a reader. The image is complete, and no other process changes it
/// while the file is open. If its writer was killed, it is recovered first.
pub(in crate::image) fn open_consistent(
    path: &Path,
    access: OFlags,
    observer: &dyn Observer,
) -> Result<File, ImageError> {
    open_consistent_for(path, access, None, observer)
}

/// [`open_consistent`] for the owner of the log `own`, which may be partly applied.
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

/// Replaces the image at `path` by a new file with the log applied, and removes the log.
pub(super) fn recover_to_new_file(
    path: &Path,
    log: RedoLog,
    observer: &dyn Observer,
) -> Result<(), ImageError> {
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
