//! Committing two files as one step.

use rustix::fs::AtFlags;

use super::atomic::Staged;
use super::destination::{FileError, Replaced};
use super::redo_log::RedoLog;

/// Gives a memory file and the state file that names its [`FileId`](super::FileId) their final
/// names as one step. A crash in between leaves the old pair, or the new state whose memory file
/// [`find`](super::find) finds.
///
/// After an error the old pair is unchanged. The exception is a file system that cannot exchange
/// two names: if the memory file's rename fails there, the new state stays, and its memory file
/// keeps the temporary name, which [`find`](super::find) knows.
pub fn commit_pair(mut memory: Staged, mut state: Staged) -> Result<(), FileError> {
    sync_both(&memory, &state)?;
    memory.link()?;
    state.link()?;
    let mut memory = memory.destination;
    let mut state = state.destination;
    // Renames within one directory reach the disk in order. Renames in two directories do not, so
    // each step is synced by itself.
    let apart = memory.dir_identity() != state.dir_identity();
    if apart {
        memory.sync_dir()?;
    }
    let replaced = state.exchange_or_rename()?;
    let renamed = if apart { state.sync_dir().and_then(|()| memory.rename()) } else { memory.rename() };
    if let Err(e) = renamed {
        match replaced {
            // Undo the exchange. Dropping `state` and `memory` then removes the new files.
            Replaced::Exchanged => {
                state.exchange().map_err(|e| state.error("restore the old file", e.into()))?;
            }
            Replaced::Nothing => rustix::fs::unlinkat(&state.dir, &state.name, AtFlags::empty())
                .map_err(|e| state.error("remove", e.into()))?,
            Replaced::Gone => memory.linked = false,
        }
        return Err(e);
    }
    // After an exchange the old state has the temporary name, and dropping `state` removes it.
    state.sync_dir()?;
    memory.sync_dir()?;
    memory.remove_leftovers();
    state.remove_leftovers();
    Ok(())
}

/// Makes a redo log and the state file that names its [`FileId`](super::FileId) appear as one step.
/// A kill before that step leaves the old state, and a kill after it leaves the new state with the
/// log. Without a state, only the log appears.
///
/// After an error before that step the old state is unchanged and there is no log. After that step
/// the log is never removed.
pub fn commit_redo(mut redo: Staged, state: Option<Staged>) -> Result<RedoLog, FileError> {
    let Some(mut state) = state else {
        redo.sync()?;
        redo.link()?;
        redo.destination.sync_dir()?;
        return Ok(RedoLog::from_staged(redo));
    };
    sync_both(&redo, &state)?;
    redo.link()?;
    state.link()?;
    if redo.destination.dir_identity() != state.destination.dir_identity() {
        redo.destination.sync_dir()?;
    }
    state.destination.exchange_or_rename()?;
    // After an exchange the old state has the temporary name, and dropping `state` removes it.
    let log = RedoLog::from_staged(redo);
    state.destination.sync_dir()?;
    state.destination.remove_leftovers();
    Ok(log)
}

/// Syncs both files in parallel: the file system can then commit its journal once for both.
fn sync_both(one: &Staged, other: &Staged) -> Result<(), FileError> {
    std::thread::scope(|scope| {
        let first = sync::thread::spawn_scoped(scope, "sync", || one.sync());
        other.sync()?;
        match first {
            Ok(first) => first.join().unwrap_or_else(|panic| std::panic::resume_unwind(panic)),
            Err(_) => one.sync(),
        }
    })
}
