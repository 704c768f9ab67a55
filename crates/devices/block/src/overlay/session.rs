//! The first change of an overlay's session.
//!
//! Before anything is changed the file must say so: it counts who wrote to it, for the overlays that were made on it, and says
//! how far its map can be trusted should this session not be closed. So the first change waits until that is written (and durable,
//! where flushes wait for the disk), and those that come meanwhile wait with it. A disk that is only opened changes nothing.
//!
//! An error is that of all changes that wait; the next one tries again. But once a sync has failed, of this or of anything else, no session
//! begins any more: it would take the place of what says that the contents are unknown.

use rustix::io::Errno;

use super::active::ActiveLayer;
use crate::engine::{Engine, Transfer};
use crate::io_request::{Request, Tag, Token};

/// A change that waits.
pub(crate) type WaitingChange = (Token, u64, Request);

/// The changes that wait for the session to begin.
#[derive(Debug, Default)]
pub(crate) struct SessionStart {
    waiting: Vec<WaitingChange>,
    phase: Phase,
}

#[derive(Debug, Default, PartialEq, Eq)]
enum Phase {
    #[default]
    Idle,
    /// The session is being written.
    Write,
    /// It is being synced.
    Sync,
}

impl SessionStart {
    /// Lets a change wait. Gives it back where no session can begin any more.
    pub(crate) fn wait(
        &mut self,
        change: WaitingChange,
        file: u8,
        top: &ActiveLayer,
        engine: &mut dyn Engine<Tag>,
    ) -> Result<(), WaitingChange> {
        if !top.health().is_known() && self.phase == Phase::Idle {
            return Err(change);
        }
        self.waiting.push(change);
        if self.phase == Phase::Idle {
            self.phase = Phase::Write;
            let (offset, bytes) = top.session_start();
            engine.push(Transfer::write_bytes(file, offset, bytes, Tag::Begin));
        }
        Ok(())
    }

    /// Whether the session is being synced.
    pub(crate) fn is_syncing(&self) -> bool {
        self.phase == Phase::Sync
    }

    /// Takes in the end of a step. When it was the last one: how that went, and the changes that waited.
    pub(crate) fn step(
        &mut self,
        result: Result<(), Errno>,
        file: u8,
        top: &ActiveLayer,
        engine: &mut dyn Engine<Tag>,
    ) -> Option<(Result<(), Errno>, Vec<WaitingChange>)> {
        if result.is_ok() && self.phase == Phase::Write && top.health().is_known() && top.waits_for_disk() {
            self.phase = Phase::Sync;
            engine.push(Transfer::sync(file, Tag::Begin));
            return None;
        }
        self.phase = Phase::Idle;
        let known = if top.health().is_known() { Ok(()) } else { Err(Errno::IO) };
        let result = result.and(known);
        if result.is_ok() {
            top.session_opened();
        }
        Some((result, std::mem::take(&mut self.waiting)))
    }
}
