//! Flushes of a disk, one at a time. An overlay's data becomes durable first, then its durable map.
//!
//! The durable map must never have sectors whose data is not durable. So each round copies the
//! words of the map that it will write *before* it syncs the data: their data was written by then.
//! After the sync it writes them to the durable map. When the words of all rounds are written, a
//! last sync makes the map durable. A round has at most [`ROUND`] ranges, so that a flush after a
//! large discard does not need memory for the whole map. A disk without an overlay has no map: its
//! flush is one sync.
//!
//! One flush runs at a time. Flushes that come meanwhile share the next one. Two syncs of one open
//! file would share one report of a failed write-back, and one of them would succeed wrongly; see
//! [`health`](crate::host_file::health).
//!
//! An error ends the flush: it fails all flushes that share it, and all its words are dirty again.
//! After a failed sync, of anything that syncs the disk, no flush is tried and the durable map is
//! not written.

use std::collections::VecDeque;

use rustix::io::Errno;

use super::active::ActiveLayer;
use super::map::Dirty;
use crate::engine::{Engine, Transfer};
use crate::host_file::health::DiskHealth;
use crate::io_request::{Tag, Token};

/// Most ranges of the map that one round writes; each is at most 4 KiB.
const ROUND: usize = 64;

/// What a flush makes durable.
#[derive(Debug, Clone, Copy)]
pub(crate) struct FlushTarget<'a> {
    /// Number of the file that is written.
    pub(crate) file: u8,
    /// The overlay in that file, if it is one.
    pub(crate) layer: Option<&'a ActiveLayer>,
    /// The health of the disk.
    pub(crate) health: &'a DiskHealth,
}

/// The flushes of one queue of a disk.
#[derive(Debug, Default)]
pub(crate) struct Flushes {
    phase: Phase,
    /// Flushes that the running one completes.
    running: Vec<Token>,
    /// Flushes that wait for the next one.
    next: Vec<Token>,
    /// Words of the durable map that the flush still has to write.
    missing: Dirty,
    /// What this round writes: offsets in the durable map, and bytes.
    round: Vec<(u64, Box<[u8]>)>,
    /// Words that this flush has taken out of `missing` so far.
    taken: Dirty,
    finished: VecDeque<(Token, Result<(), Errno>)>,
}

#[derive(Debug, Default, PartialEq, Eq)]
enum Phase {
    #[default]
    Idle,
    /// The data is being synced.
    Data,
    /// The durable map is being written; `left` writes are in flight.
    Map { left: usize, failed: Option<Errno> },
    /// The durable map is being synced.
    End,
}

impl Flushes {
    /// Adds a flush.
    pub(crate) fn start(&mut self, token: Token, target: FlushTarget<'_>, engine: &mut dyn Engine<Tag>) {
        if self.phase == Phase::Idle {
            self.running.push(token);
            self.begin(target, engine);
        } else {
            self.next.push(token);
        }
    }

    /// Takes the next completed flush.
    pub(crate) fn finished(&mut self) -> Option<(Token, Result<(), Errno>)> {
        self.finished.pop_front()
    }

    /// Handles the end of a transfer of the flush. True if it was a sync that failed.
    #[must_use = "a sync that failed is for the disk's health"]
    pub(crate) fn step(
        &mut self,
        result: Result<(), Errno>,
        target: FlushTarget<'_>,
        engine: &mut dyn Engine<Tag>,
    ) -> bool {
        let is_sync = matches!(self.phase, Phase::Data | Phase::End);
        if let (Err(errno), true) = (result, is_sync) {
            // Before anything else is started.
            target.health.sync_failed("a flush", errno);
        }
        // If another sync has failed meanwhile, the success of this one means nothing.
        let result = result.and_then(|()| still_known(target.health));
        match &mut self.phase {
            Phase::Idle => {}
            Phase::Data => match (result, target.layer) {
                (Err(errno), _) => self.end(Err(errno), target, engine),
                (Ok(()), Some(active)) if !self.round.is_empty() => {
                    self.phase = Phase::Map { left: self.round.len(), failed: None };
                    let file = target.file;
                    for (offset, bytes) in self.round.drain(..) {
                        let offset = active.layout.durable_map + offset;
                        engine.push(Transfer::write_bytes(file, offset, bytes, Tag::Flush));
                    }
                }
                (Ok(()), _) => self.end(Ok(()), target, engine),
            },
            Phase::Map { left, failed } => {
                *left -= 1;
                *failed = failed.or(result.err());
                match (*left, *failed) {
                    (0, Some(errno)) => self.end(Err(errno), target, engine),
                    (0, None) if self.missing.is_empty() => {
                        self.phase = Phase::End;
                        engine.push(Transfer::sync(target.file, Tag::Flush));
                    }
                    (0, None) => self.begin_round(target, engine),
                    _ => {}
                }
            }
            Phase::End => self.end(result, target, engine),
        }
        is_sync && result.is_err()
    }

    /// Starts a flush for those in `running`.
    fn begin(&mut self, target: FlushTarget<'_>, engine: &mut dyn Engine<Tag>) {
        if let Err(errno) = still_known(target.health) {
            self.finished.extend(self.running.drain(..).map(|token| (token, Err(errno))));
            return;
        }
        if let Some(active) = target.layer {
            self.missing = std::mem::take(&mut active.state().dirty_durable);
        }
        self.begin_round(target, engine);
    }

    fn begin_round(&mut self, target: FlushTarget<'_>, engine: &mut dyn Engine<Tag>) {
        if let Some(active) = target.layer {
            self.take_round(active);
        }
        self.phase = Phase::Data;
        engine.push(Transfer::sync(target.file, Tag::Flush));
    }

    /// Takes the words of one round.
    fn take_round(&mut self, active: &ActiveLayer) {
        let state = active.state();
        while self.round.len() < ROUND
            && let Some((page, words)) = self.missing.pop()
        {
            self.round.push(state.bytes(page, words.clone()));
            self.taken.mark_words(page, words);
        }
    }

    fn end(&mut self, result: Result<(), Errno>, target: FlushTarget<'_>, engine: &mut dyn Engine<Tag>) {
        let mut taken = std::mem::take(&mut self.taken);
        let mut missing = std::mem::take(&mut self.missing);
        self.round.clear();
        if let (Err(_), Some(active)) = (result, target.layer) {
            let dirty = &mut active.state().dirty_durable;
            while let Some((page, words)) = taken.pop().or_else(|| missing.pop()) {
                dirty.mark_words(page, words);
            }
        }
        self.finished.extend(self.running.drain(..).map(|token| (token, result)));
        self.phase = Phase::Idle;
        if !self.next.is_empty() {
            std::mem::swap(&mut self.running, &mut self.next);
            self.begin(target, engine);
        }
    }
}

/// `EIO` after a failed sync of the disk.
fn still_known(health: &DiskHealth) -> Result<(), Errno> {
    if health.is_known() { Ok(()) } else { Err(Errno::IO) }
}
