//! Starts the session of an overlay before its first change.
//!
//! The file must show a session before anything is changed. The session counts the writers, for
//! overlays that were created on this one, and says how far the maps can be used if it is not
//! closed. So the first change waits until the session is written (and durable, if flushes wait for
//! the disk). Changes that come meanwhile wait with it. A disk that is only read begins no session.
//!
//! An error fails all waiting changes, and the next change tries again. After a failed sync no
//! session begins any more: it would overwrite the mark that the contents are unknown.

use rustix::io::Errno;

use super::active::ActiveLayer;
use crate::engine::{Engine, Transfer};
use crate::io_request::{Request, Tag, Token};

/// A change that waits for the session.
pub(crate) type WaitingChange = (Token, u64, Request);

/// The start of a session, and the changes that wait for it.
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
    /// Adds a change that waits for the session. Returns it if no session can begin any more.
    pub(crate) fn enqueue(
        &mut self,
        change: WaitingChange,
        file: u8,
        active: &ActiveLayer,
        engine: &mut dyn Engine<Tag>,
    ) -> Result<(), WaitingChange> {
        if !active.health().is_known() && self.phase == Phase::Idle {
            return Err(change);
        }
        self.waiting.push(change);
        if self.phase == Phase::Idle {
            self.phase = Phase::Write;
            let (offset, bytes) = active.session_start();
            engine.push(Transfer::write_bytes(file, offset, bytes, Tag::SessionStart));
        }
        Ok(())
    }

    /// Whether the session is being synced.
    pub(crate) fn is_syncing(&self) -> bool {
        self.phase == Phase::Sync
    }

    /// Handles the end of a step. After the last one, returns the result and the waiting changes.
    pub(crate) fn step(
        &mut self,
        result: Result<(), Errno>,
        file: u8,
        active: &ActiveLayer,
        engine: &mut dyn Engine<Tag>,
    ) -> Option<(Result<(), Errno>, Vec<WaitingChange>)> {
        if result.is_ok()
            && self.phase == Phase::Write
            && active.health().is_known()
            && active.waits_for_disk()
        {
            self.phase = Phase::Sync;
            engine.push(Transfer::sync(file, Tag::SessionStart));
            return None;
        }
        self.phase = Phase::Idle;
        let known = if active.health().is_known() { Ok(()) } else { Err(Errno::IO) };
        let result = result.and(known);
        if result.is_ok() {
            active.session_opened();
        }
        Some((result, std::mem::take(&mut self.waiting)))
    }
}
