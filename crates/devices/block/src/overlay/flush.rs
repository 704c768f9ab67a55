//! Flushes of a disk, one at a time. On an overlay: data first, then map A, each made durable.
//!
//! Map A must never speak of data that is not durable. So a round takes the words of the map that are to be written *before* it
//! syncs the data: all that they speak of was written by then. After the sync they go to map A, and when the words of all rounds
//! are there, a last sync makes them durable. A round takes a bounded share, so that a flush after a large discard needs no
//! memory for all of the map. A plain disk has no map: its flush is one sync.
//!
//! One flush runs at a time. Those that come meanwhile wait, and share the next one. (Two syncs of one open file share one report of a
//! failed write-back: one of them could succeed wrongly. See [`health`](super::health).)
//!
//! An error ends the flush: all who waited for it get it, and all words are noted as missing in map A again. After a failed sync, of
//! whomever, no flush is tried any more, and map A is not written.

use std::collections::VecDeque;

use rustix::io::Errno;

use super::active::ActiveLayer;
use super::map::Dirty;
use crate::engine::{Engine, Transfer};
use crate::host_file::health::DiskHealth;
use crate::io_request::{Tag, Token};

/// Most stretches of the map that one round writes; each is at most 4 KiB.
const ROUND: usize = 64;

/// What a flush makes durable.
#[derive(Debug, Clone, Copy)]
pub(crate) struct FlushTarget<'a> {
    /// The file that takes the writes, by number.
    pub(crate) file: u8,
    /// The overlay in that file, if it is one.
    pub(crate) layer: Option<&'a ActiveLayer>,
    /// Whether a sync of the disk has failed.
    pub(crate) health: &'a DiskHealth,
}

/// The flushes of one disk's queue.
#[derive(Debug, Default)]
pub(crate) struct Flush {
    phase: Phase,
    /// Who waits for the flush that runs.
    running: Vec<Token>,
    /// Who came too late for it.
    next: Vec<Token>,
    /// What of map A this flush has not taken yet.
    missing: Dirty,
    /// What this round writes: where in map A, and what.
    round: Vec<(u64, Box<[u8]>)>,
    /// What this round took out of `missing`.
    taken: Dirty,
    finished: VecDeque<(Token, Result<(), Errno>)>,
}

#[derive(Debug, Default, PartialEq, Eq)]
enum Phase {
    #[default]
    Idle,
    /// The data is being synced.
    Data,
    /// Map A is being written; this many writes are left.
    Map { left: usize, failed: Option<Errno> },
    /// Map A is being synced.
    End,
}

impl Flush {
    /// A guest's flush.
    pub(crate) fn start(&mut self, token: Token, target: FlushTarget<'_>, engine: &mut dyn Engine<Tag>) {
        if self.phase == Phase::Idle {
            self.running.push(token);
            self.begin(target, engine);
        } else {
            self.next.push(token);
        }
    }

    /// The next flush that is over.
    pub(crate) fn finished(&mut self) -> Option<(Token, Result<(), Errno>)> {
        self.finished.pop_front()
    }

    /// Takes in the end of a transfer of the flush. True if it was a sync that failed.
    #[must_use = "a sync that failed is for the disk's health"]
    pub(crate) fn step(
        &mut self,
        result: Result<(), Errno>,
        target: FlushTarget<'_>,
        engine: &mut dyn Engine<Tag>,
    ) -> bool {
        let is_sync = matches!(self.phase, Phase::Data | Phase::End);
        if let (Err(errno), true) = (result, is_sync) {
            // Before anything else is session_open.
            target.health.sync_failed("a flush", errno);
        }
        // Whoever's sync failed: what this one says counts no more.
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

    /// Begins a flush for those in `running`.
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

/// `EIO` once a sync of the disk has failed.
fn still_known(health: &DiskHealth) -> Result<(), Errno> {
    if health.is_known() { Ok(()) } else { Err(Errno::IO) }
}
