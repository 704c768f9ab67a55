//! Writes newly allocated sectors to an overlay's commit map before a request completes.
//!
//! The data of a change is in the file before the commit map has its sectors, and the commit map
//! has them before the request completes. So a killed monitor loses nothing that had completed,
//! only requests in flight.
//!
//! The commit map is written in runs. A run writes everything that the map lacks when the run
//! begins, [`ROUND`] ranges at a time, so that a large change does not need memory for the whole
//! map. Changes that come meanwhile wait for the next run, and share it. A change of sectors that
//! the commit map already has waits for nothing.
//!
//! After a failed sync of the overlay the commit map is not written any more (see
//! [`format`](super::format)), and no change waits for it.
//!
//! A range that cannot be written stays dirty for the next run. It fails the changes that need it,
//! and no others.

use rustix::io::Errno;

use super::active::ActiveLayer;
use super::map::Dirty;
use crate::engine::{Engine, Transfer};
use crate::io_request::{Tag, Token};

/// Most ranges of the map in flight; each is at most 4 KiB.
const ROUND: usize = 64;

/// A completed change and its result.
pub(crate) type Finished = (Token, Result<(), Errno>);

/// The changes of an overlay that wait for the commit map.
#[derive(Debug, Default)]
pub(crate) struct MapCommit {
    /// Changes that the current run completes.
    running: Vec<Change>,
    /// Changes that wait for the next run.
    waiting: Vec<Change>,
    /// What the run still has to write.
    unwritten: Dirty,
    /// Everything that the run writes.
    covered: Dirty,
    /// Writes in flight.
    in_flight: usize,
    /// What the run could not write, and the error.
    failed: Option<(Dirty, Errno)>,
    /// The last run failed, and that was logged.
    logged: bool,
}

/// A change of sectors whose data is in the file.
#[derive(Debug)]
struct Change {
    token: Token,
    sector: u64,
    count: u64,
}

impl MapCommit {
    /// Adds the change of `count` sectors from `sector`, at least one, whose data is in the file.
    /// True if the commit map in the file already has them; if not, the change waits.
    pub(crate) fn commit(&mut self, token: Token, sector: u64, count: u64, active: &ActiveLayer) -> bool {
        let is_missing = active.mark_allocated(sector, count);
        // After a failed sync the commit map is not to be used.
        if !active.health().is_known() || (!is_missing && !self.covered.meets(sector, count)) {
            return true;
        }
        self.waiting.push(Change { token, sector, count });
        false
    }

    /// Starts a run if changes wait. The caller has added all changes that ended at the same time.
    pub(crate) fn start_run(
        &mut self,
        (file, active): (u8, &ActiveLayer),
        engine: &mut dyn Engine<Tag>,
        finished: &mut impl Extend<Finished>,
    ) {
        if !self.running.is_empty() || self.waiting.is_empty() {
            return;
        }
        std::mem::swap(&mut self.running, &mut self.waiting);
        self.unwritten = std::mem::take(&mut active.state().dirty_commit);
        self.forget_if_unknown(active);
        self.covered = self.unwritten.clone();
        if self.unwritten.is_empty() {
            // The previous run has written what they need.
            finished.extend(self.end(active));
        } else {
            self.round(file, active, engine);
        }
    }

    /// Handles the end of the write of `words` of page `page`.
    pub(crate) fn step(
        &mut self,
        (page, words): (u64, std::ops::RangeInclusive<u16>),
        result: Result<(), Errno>,
        (file, active): (u8, &ActiveLayer),
        engine: &mut dyn Engine<Tag>,
        finished: &mut impl Extend<Finished>,
    ) {
        self.in_flight -= 1;
        if let Err(errno) = result {
            self.failed.get_or_insert_with(|| (Dirty::default(), errno)).0.mark_words(page, words);
        }
        if self.in_flight == 0 {
            self.forget_if_unknown(active);
            if self.unwritten.is_empty() {
                finished.extend(self.end(active));
            } else {
                self.round(file, active, engine);
            }
        }
    }

    /// After a failed sync nothing more is written to the commit map.
    fn forget_if_unknown(&mut self, active: &ActiveLayer) {
        if !active.health().is_known() {
            self.unwritten = Dirty::default();
        }
    }

    fn round(&mut self, file: u8, active: &ActiveLayer, engine: &mut dyn Engine<Tag>) {
        let state = active.state();
        while self.in_flight < ROUND
            && let Some((page, words)) = self.unwritten.pop()
        {
            let (offset, bytes) = state.bytes(page, words.clone());
            let tag = Tag::CommitMap { page, words };
            engine.push(Transfer::write_bytes(file, active.layout.commit_map + offset, bytes, tag));
            self.in_flight += 1;
        }
    }

    /// Ends the run, and returns the result of each change.
    fn end(&mut self, active: &ActiveLayer) -> impl Iterator<Item = Finished> {
        self.covered = Dirty::default();
        let failed = self.failed.take();
        if let Some((dirty, errno)) = &failed {
            if !self.logged {
                log::warn!("overlay {}: cannot write the map: {errno}", active.path().display());
            }
            active.state().dirty_commit.merge(dirty.clone());
        }
        self.logged = failed.is_some();
        std::mem::take(&mut self.running).into_iter().map(move |Change { token, sector, count }| {
            let failed = failed.as_ref().filter(|(dirty, _)| dirty.meets(sector, count));
            (token, failed.map_or(Ok(()), |&(_, errno)| Err(errno)))
        })
    }
}
