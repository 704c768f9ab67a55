//! Telling map B of an overlay what a request changed, before its end is told.
//!
//! The data of a change stands in the file before map B speaks of it, and map B speaks of it before whoever asked hears that the
//! change is over. So a monitor that is killed at any moment loses nothing of what it had answered: only requests in flight.
//!
//! Map B is written in runs. A run writes all that map B lacks when it begins, a bounded share at a time, so that one large change
//! needs no memory for all of the map. What is changed meanwhile waits for the next run: changes that end together share one, and
//! those of a few pages of the map need a few writes, however many they are. What changes sectors that map B has already waits for nothing.
//!
//! Once a sync of the overlay has failed, map B is not written any more ([`format`](super::overlay)), and no change waits for it.
//!
//! A stretch that cannot be written is noted as missing again, for the next run, and fails the changes that need it and no others.

use rustix::io::Errno;

use super::active::ActiveLayer;
use super::map::Dirty;
use crate::engine::{Engine, Transfer};
use crate::io_request::{Tag, Token};

/// Most stretches of the map that are written at a time; each is at most 4 KiB.
const ROUND: usize = 64;

/// A change that is over, and how it went.
pub(crate) type Finished = (Token, Result<(), Errno>);

/// The changes of one overlay that wait for map B.
#[derive(Debug, Default)]
pub(crate) struct MapCommit {
    /// Those that the run is for.
    running: Vec<Change>,
    /// Those that came too late for it.
    next: Vec<Change>,
    /// What the run has not taken yet.
    missing: Dirty,
    /// All that it is covered, while it goes on.
    covered: Dirty,
    /// Writes in flight.
    in_flight: usize,
    /// What it could not write, and why.
    failed: Option<(Dirty, Errno)>,
    /// The last run failed, and it was logged.
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
    /// The `count` sectors from `sector`, which are not none, are in the file. Whether map B says so already; if not, the change
    /// waits.
    pub(crate) fn changed(&mut self, token: Token, sector: u64, count: u64, top: &ActiveLayer) -> bool {
        let is_missing = top.mark_allocated(sector, count);
        // Once a sync has failed, nobody is to believe map B.
        if !top.health().is_known() || (!is_missing && !self.covered.meets(sector, count)) {
            return true;
        }
        self.next.push(Change { token, sector, count });
        false
    }

    /// Begins a run, if changes wait for one. To be called when all changes that ended at the same time were noted.
    pub(crate) fn start_run(
        &mut self,
        (file, top): (u8, &ActiveLayer),
        engine: &mut dyn Engine<Tag>,
        finished: &mut impl Extend<Finished>,
    ) {
        if !self.running.is_empty() || self.next.is_empty() {
            return;
        }
        std::mem::swap(&mut self.running, &mut self.next);
        self.missing = std::mem::take(&mut top.state().dirty_commit);
        self.forget_if_unknown(top);
        self.covered = self.missing.clone();
        if self.missing.is_empty() {
            // They waited for the run before, which wrote what they need.
            finished.extend(self.end(top));
        } else {
            self.round(file, top, engine);
        }
    }

    /// Takes in the end of one write of `words` of page `page`.
    pub(crate) fn step(
        &mut self,
        (page, words): (u64, std::ops::RangeInclusive<u16>),
        result: Result<(), Errno>,
        (file, top): (u8, &ActiveLayer),
        engine: &mut dyn Engine<Tag>,
        finished: &mut impl Extend<Finished>,
    ) {
        self.in_flight -= 1;
        if let Err(errno) = result {
            self.failed.get_or_insert_with(|| (Dirty::default(), errno)).0.mark_words(page, words);
        }
        if self.in_flight == 0 {
            self.forget_if_unknown(top);
            if self.missing.is_empty() {
                finished.extend(self.end(top));
            } else {
                self.round(file, top, engine);
            }
        }
    }

    /// Once a sync has failed map B is not to be believed, and nothing more is written to it.
    fn forget_if_unknown(&mut self, top: &ActiveLayer) {
        if !top.health().is_known() {
            self.missing = Dirty::default();
        }
    }

    fn round(&mut self, file: u8, top: &ActiveLayer, engine: &mut dyn Engine<Tag>) {
        let state = top.state();
        while self.in_flight < ROUND
            && let Some((page, words)) = self.missing.pop()
        {
            let (offset, bytes) = state.bytes(page, words.clone());
            let tag = Tag::CommitMap { page, words };
            engine.push(Transfer::write_bytes(file, top.layout.commit_map + offset, bytes, tag));
            self.in_flight += 1;
        }
    }

    /// Ends the run; how it went for each change.
    fn end(&mut self, top: &ActiveLayer) -> impl Iterator<Item = Finished> {
        self.covered = Dirty::default();
        let failed = self.failed.take();
        if let Some((dirty, errno)) = &failed {
            if !self.logged {
                log::warn!("cannot write the map of overlay {}: {errno}", top.path().display());
            }
            top.state().dirty_commit.merge(dirty.clone());
        }
        self.logged = failed.is_some();
        std::mem::take(&mut self.running).into_iter().map(move |Change { token, sector, count }| {
            let failed = failed.as_ref().filter(|(dirty, _)| dirty.meets(sector, count));
            (token, failed.map_or(Ok(()), |&(_, errno)| Err(errno)))
        })
    }
}
