//! Committing a Diff that is in a redo log: W1 to W7 of [the module](super).

use std::fs::File;

use rustix::io::Errno;
use snapshot::{FileId, RedoLog, Staged};

use super::base::{CommitStep, mark_base};
use super::log::{RedoDiff, apply};
use super::mark;
use super::reader::recover_to_new_file;
use crate::image::error::ImageError;
use crate::image::file::ImageTarget;

impl RedoDiff {
    /// The id by which the state file names the image with this Diff in it.
    pub(in crate::image) fn id(&self) -> FileId {
        self.log.id()
    }

    /// Commits the log and the state as one step, and writes the Diff to the base.
    pub(in crate::image) fn commit(self, state: Option<Staged>) -> Result<(), ImageError> {
        self.commit_in_steps(state, &mut |_| {})
    }

    /// [`Self::commit`], which calls `reached` after each step.
    pub(super) fn commit_in_steps(
        self,
        state: Option<Staged>,
        reached: &mut dyn FnMut(CommitStep),
    ) -> Result<(), ImageError> {
        let RedoDiff { log, ram, path } = self;
        let log = snapshot::commit_redo(log.stage(), state)?;
        let (redo, id) = (log.path(), log.id());
        reached(CommitStep::Committed);
        // If another process has opened the base since, the base is not changed.
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
    /// Commits only the log.
    pub(super) fn into_log(self) -> RedoLog {
        snapshot::commit_redo(self.log.stage(), None).unwrap()
    }
}

/// Applies the log to the marked `base`: W5 and W6 of [the module](super).
fn write_to_base(
    base: &File,
    log: &RedoLog,
    size: u64,
    reached: &mut dyn FnMut(CommitStep),
) -> Result<(), ImageError> {
    let path = log.path();
    let target = ImageTarget { file: base, path: &path, size, observer: &() };
    // The mark must be on disk before the first page.
    base.sync_all().map_err(|e| target.error(0, e))?;
    apply(log.file(), &path, &target)?;
    base.sync_all().map_err(|e| target.error(0, e))?;
    reached(CommitStep::Written);
    // The caller removes the log after this: a mark without a log is ignored.
    mark::clear(base).map_err(|e: Errno| target.error(0, e.into()))?;
    reached(CommitStep::Unmarked);
    Ok(())
}
