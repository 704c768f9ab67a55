//! The flush of an overlay: data first, then map A, each made durable.
//!
//! Map A must never speak of data that is not durable. So a round takes the words of the map that are to be written *before* it
//! syncs the data: all that they speak of was written by then. After the sync they go to map A, and when the words of all rounds
//! are there, a last sync makes them durable. A round takes a bounded share, so that a flush after a large discard needs no
//! memory for all of the map.
//!
//! One flush runs at a time. Those that come meanwhile wait, and share the next one.
//!
//! An error ends the flush: whoever waited for it gets it, and all words are noted as missing in map A again.

use std::collections::VecDeque;

use rustix::io::Errno;

use super::engine::{Engine, Transfer};
use super::overlay::Top;
use super::overlay::map::Dirty;
use super::queue::{Tag, Token};

/// Most stretches of the map that one round writes; each is at most 4 KiB.
const ROUND: usize = 64;

/// The flushes of one overlay.
#[derive(Debug, Default)]
pub(super) struct Flush {
    file: u8,
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
    /// A guest's flush, of the overlay `top`, which is file number `file` of the engine.
    pub(super) fn start(&mut self, token: Token, file: u8, top: &Top, engine: &mut Engine<Tag>) {
        self.file = file;
        if self.phase == Phase::Idle {
            self.running.push(token);
            self.begin(top, engine);
        } else {
            self.next.push(token);
        }
    }

    /// The next flush that is over.
    pub(super) fn finished(&mut self) -> Option<(Token, Result<(), Errno>)> {
        self.finished.pop_front()
    }

    /// Takes in the end of a transfer of the flush.
    pub(super) fn step(&mut self, result: Result<(), Errno>, top: &Top, engine: &mut Engine<Tag>) {
        match &mut self.phase {
            Phase::Idle => {}
            Phase::Data => match result {
                Err(errno) => self.end(Err(errno), top, engine),
                Ok(()) if self.round.is_empty() => self.end(Ok(()), top, engine),
                Ok(()) => {
                    self.phase = Phase::Map { left: self.round.len(), failed: None };
                    for (offset, bytes) in self.round.drain(..) {
                        let offset = top.layout.map_a + offset;
                        engine.push(Transfer::write_bytes(self.file, offset, bytes, Tag::Flush));
                    }
                }
            },
            Phase::Map { left, failed } => {
                *left -= 1;
                *failed = failed.or(result.err());
                match (*left, *failed) {
                    (0, Some(errno)) => self.end(Err(errno), top, engine),
                    (0, None) if self.missing.is_empty() => {
                        self.phase = Phase::End;
                        engine.push(Transfer::sync(self.file, Tag::Flush));
                    }
                    (0, None) => self.begin_round(top, engine),
                    _ => {}
                }
            }
            Phase::End => self.end(result, top, engine),
        }
    }

    fn begin(&mut self, top: &Top, engine: &mut Engine<Tag>) {
        self.missing = std::mem::take(&mut top.state().dirty_a);
        self.begin_round(top, engine);
    }

    fn begin_round(&mut self, top: &Top, engine: &mut Engine<Tag>) {
        let state = top.state();
        while self.round.len() < ROUND
            && let Some((page, words)) = self.missing.pop()
        {
            self.round.push(state.bytes(page, words.clone()));
            self.taken.mark_words(page, words);
        }
        self.phase = Phase::Data;
        engine.push(Transfer::sync(self.file, Tag::Flush));
    }

    fn end(&mut self, result: Result<(), Errno>, top: &Top, engine: &mut Engine<Tag>) {
        let mut taken = std::mem::take(&mut self.taken);
        let mut missing = std::mem::take(&mut self.missing);
        self.round.clear();
        if result.is_err() {
            let dirty = &mut top.state().dirty_a;
            while let Some((page, words)) = taken.pop().or_else(|| missing.pop()) {
                dirty.mark_words(page, words);
            }
        }
        self.finished.extend(self.running.drain(..).map(|token| (token, result)));
        self.phase = Phase::Idle;
        if !self.next.is_empty() {
            std::mem::swap(&mut self.running, &mut self.next);
            self.begin(top, engine);
        }
    }
}
