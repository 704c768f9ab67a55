//! The overlay that takes the writes of a disk.

use std::fs::{File, OpenOptions};
use std::io;
use std::os::unix::fs::{FileExt, MetadataExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard};

use rustix::fs::FlockOperation;
use zerocopy::IntoBytes;

use super::error::OverlayError;
use super::file::{
    HostBoot, Opened, check_base, check_size, clear, create, io_error, is_blank, is_same_file, open,
    read_headers, read_maps,
};
use super::format::{BackingId, CLOSED, Layout, OPEN, OPEN_UNSAFE, SESSION_OFFSET, Session, UNKNOWN};
use super::map::{Dirty, PAGE_BYTES};
use super::state::{ActiveState, MapCopy};
use crate::SECTOR;
use crate::creator_pid::CreatorPid;
use crate::host_file::health::DiskHealth;
use crate::host_file::name::make_name_durable;
use sync::locked;

/// The overlay that is written to.
#[derive(Debug)]
pub(crate) struct ActiveLayer {
    pub(crate) file: Arc<File>,
    pub(crate) layout: Layout,
    pub(crate) size: u64,
    path: PathBuf,
    wait_for_disk: bool,
    state: Mutex<ActiveState>,
    /// Whether its session has session_open: something may have changed since it was opened.
    session_open: AtomicBool,
    /// Whether the last attempt to close it failed, or it could not be opened: `Drop` leaves it as it is.
    left_open: AtomicBool,
    health: Arc<DiskHealth>,
    /// What the file says of itself once its contents are unknown; `None` leaves what it says now.
    mark: Mutex<Option<Mark>>,
    creator: CreatorPid,
    /// Also for all syncs but the queue's: see [`health`](super::health).
    lock: File,
}

/// How an overlay is given up.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Mark {
    /// Map A is true: map B is not to be believed.
    DurableOnly,
    /// Map B is all there is: nothing is to be believed.
    Unknown,
}

/// How an overlay is to be written to.
#[derive(Debug)]
pub(crate) struct ActiveOptions<'a> {
    /// The files that it lies on.
    pub(crate) below: &'a [Arc<File>],
    /// Size of the disk in bytes; where absent, the existing overlay's or that of what lies beneath.
    pub(crate) size: Option<u64>,
    /// Whether flushes of the guest wait for the disk (`cache_type` Writeback).
    pub(crate) wait_for_disk: bool,
    /// Whether the directory entry of an existing empty file is known to be durable.
    pub(crate) name_is_durable: bool,
    /// That of the disk.
    pub(crate) health: Arc<DiskHealth>,
}

impl ActiveLayer {
    /// Opens the overlay at `path`, or makes it if the file does not exist or is empty, on top of what `beneath` describes.
    pub(crate) fn open(
        path: &Path,
        beneath: BackingId,
        how: ActiveOptions<'_>,
    ) -> Result<Self, OverlayError> {
        let ActiveOptions { below, size, wait_for_disk, name_is_durable, health } = how;
        // Before anything is made.
        check_size(path, beneath, size.unwrap_or(beneath.size))?;
        // And before it is found locked, as what it is to lie on.
        let is_beneath = std::fs::metadata(path).is_ok_and(|this| {
            let others = below.iter().filter_map(|file| file.metadata().ok());
            others.into_iter().any(|other| (this.dev(), this.ino()) == (other.dev(), other.ino()))
        });
        if is_beneath {
            return Err(OverlayError::IsBeneath { path: path.into() });
        }
        let mut options = OpenOptions::new();
        options.read(true).write(true).create(true).truncate(false).mode(0o600);
        let Opened { file, lock, mut len, is_new } =
            open(path, &options, FlockOperation::NonBlockingLockExclusive)?;
        for other in below {
            if is_same_file(&file, other).map_err(|e| io_error("look at", path, e))? {
                return Err(OverlayError::IsBeneath { path: path.into() });
            }
        }
        if is_blank(&file, len) {
            len = create(&file, path, beneath, size.unwrap_or(beneath.size))?;
            if (is_new || !name_is_durable)
                && let Err(error) = make_name_durable(path)
            {
                if is_new {
                    let _ = std::fs::remove_file(path);
                }
                return Err(io_error("make durable the name of", path, error));
            }
        }
        let (header, session) = read_headers(&file, path, len)?;
        check_base(&header, path, beneath)?;
        let virtual_size = header.virtual_size.get();
        if let Some(size) = size.filter(|&size| size != virtual_size) {
            let why = format!("it was made with {virtual_size} bytes");
            return Err(OverlayError::Size { path: path.into(), size, why });
        }
        let left = session.state.get();
        if left == UNKNOWN {
            if wait_for_disk {
                return Err(OverlayError::LeftUnknown { path: path.into() });
            }
            log::warn!("overlay {}: a sync of it failed: any of its sectors may be lost", path.display());
        }
        let maps = read_maps(&file, path, &header, &session)?;
        // What is to be said should the very first sync fail. Where nothing is waited for, nothing was promised.
        let mark = match left {
            OPEN => Some(Mark::DurableOnly),
            _ if wait_for_disk => Some(Mark::Unknown),
            _ => None,
        };
        let top = ActiveLayer {
            file: Arc::new(file),
            creator: CreatorPid::current(),
            session_open: AtomicBool::new(false),
            left_open: AtomicBool::new(false),
            health,
            mark: Mutex::new(mark),
            lock,
            layout: Layout::of(virtual_size),
            size: virtual_size,
            path: path.into(),
            wait_for_disk,
            state: Mutex::new(ActiveState {
                sessions: session.sessions.get(),
                closed: matches!(left, CLOSED | UNKNOWN),
                below: beneath.size / SECTOR,
                map: maps.map,
                dirty_durable: maps.missing_in_durable,
                dirty_commit: Dirty::default(),
            }),
        };
        if let Err(error) = top.recover(maps.trust_commit_map) {
            // To close it would say that the maps are as they should be.
            top.left_open.store(true, Ordering::Release);
            return Err(error);
        }
        if wait_for_disk {
            // All that the overlay holds is in map A by now.
            *locked(&top.mark) = Some(Mark::DurableOnly);
        }
        Ok(top)
    }

    /// The state, for the worker that serves the disk.
    pub(crate) fn state(&self) -> MutexGuard<'_, ActiveState> {
        locked(&self.state)
    }

    /// Whether it holds no sector yet. One that is larger than what lies beneath holds those that are only its own.
    pub(crate) fn is_unwritten(&self) -> bool {
        let state = self.state();
        let sectors = self.size / SECTOR;
        state.below == sectors && (sectors == 0 || state.map.run(0, sectors) == (false, sectors))
    }

    /// The file's name.
    pub(crate) fn path(&self) -> &Path {
        &self.path
    }

    /// Whether flushes wait for the disk.
    pub(crate) fn waits_for_disk(&self) -> bool {
        self.wait_for_disk
    }

    /// Makes the file say all that it holds, and durable if flushes wait for the disk, for `what`. Blocks.
    pub(crate) fn sync(&self, what: &'static str) -> Result<(), OverlayError> {
        let written = |e| io_error("write the map of", &self.path, e);
        if !self.wait_for_disk {
            return self.write_map(&mut self.state(), MapCopy::Commit).map_err(written);
        }
        self.sync_file(what)?;
        // Map A never speaks of what may not be on the disk.
        let mut state = self.state();
        if !state.dirty_durable.is_empty() {
            self.write_map(&mut state, MapCopy::Durable).map_err(written)?;
            drop(state);
            self.sync_file(what)?;
        }
        Ok(())
    }

    /// Lets the disk itself have what was written so far. Blocks; requests may come meanwhile.
    pub(crate) fn write_back(&self) -> Result<(), OverlayError> {
        self.sync_file("a write-back of what was written")
    }

    /// A sync beside those of the disk's queue. Where it fails, the overlay is given up.
    fn sync_file(&self, what: &'static str) -> Result<(), OverlayError> {
        let synced = self.health.sync(&self.lock, what);
        if synced.is_err() {
            self.mark_unknown();
        }
        Ok(synced?)
    }

    /// Whether its contents are known.
    pub(crate) fn health(&self) -> &DiskHealth {
        &self.health
    }

    /// What the file is to say now that its contents are unknown, and where; `None` if it says so already.
    pub(crate) fn unknown_mark(&self) -> Option<(u64, Box<[u8]>)> {
        let mark = locked(&self.mark).take()?;
        let HostBoot { id, time } = HostBoot::INVALID;
        let state = match mark {
            Mark::DurableOnly => OPEN,
            Mark::Unknown => UNKNOWN,
        };
        let session = Session {
            sessions: self.state().sessions.into(),
            boot_id: id,
            boot_time: time.into(),
            state: state.into(),
            crc: 0.into(),
        };
        Some((SESSION_OFFSET, session.sealed().as_bytes().into()))
    }

    /// The file says something else again: [`unknown_mark`](Self::unknown_mark) is needed once more.
    pub(crate) fn require_mark_again(&self) {
        *locked(&self.mark) = Some(Mark::DurableOnly);
    }

    /// Where map B stands and how long it is. Cleared, it is as good a mark as [`unknown_mark`](Self::unknown_mark): map A alone is there to be believed.
    pub(crate) fn commit_map(&self) -> (u64, u64) {
        (self.layout.commit_map, self.layout.data - self.layout.commit_map)
    }

    /// Lets the file say that its contents are unknown. Blocks.
    fn mark_unknown(&self) {
        let Some((offset, session)) = self.unknown_mark() else { return };
        let Err(error) = self.file.write_all_at(&session, offset) else { return };
        let (offset, len) = self.commit_map();
        if clear(&self.file, offset, len).is_err() {
            self.log_unmarked(&error);
        }
    }

    /// Says that the file does not say that its contents are unknown.
    pub(crate) fn log_unmarked(&self, why: &dyn std::fmt::Display) {
        log::error!(
            "overlay {}: cannot note in it that its contents are unknown: {why}; do not use it again",
            self.path.display()
        );
    }

    /// Lets the maps of a session that was not closed say what is believed of them. What the overlay holds stays the same.
    fn recover(&self, trust_commit_map: bool) -> Result<(), OverlayError> {
        let what = "the sync of the overlay when it was opened";
        if !trust_commit_map {
            let (offset, len) = self.commit_map();
            clear(&self.file, offset, len).map_err(|e| io_error("clear the map of", &self.path, e))?;
            self.sync_file(what)?;
        }
        if self.wait_for_disk && !self.state().dirty_durable.is_empty() {
            // What only map B knew so far becomes as durable as the rest before map B's word is worth less.
            self.sync(what)?;
        }
        Ok(())
    }

    /// Whether something may be changed: the file says that somebody writes to it.
    pub(crate) fn has_session(&self) -> bool {
        self.session_open.load(Ordering::Acquire)
    }

    /// What the file must say before the first change, and where.
    pub(crate) fn session_start(&self) -> (u64, Box<[u8]>) {
        let session = Self::session(self.state().sessions + 1, self.open_state());
        (SESSION_OFFSET, session.as_bytes().into())
    }

    /// The file says so.
    pub(crate) fn session_opened(&self) {
        let mut state = self.state();
        state.sessions += 1;
        state.closed = false;
        self.session_open.store(true, Ordering::Release);
    }

    /// Notes that the overlay holds `count` sectors from `sector`: their data is in the file. Whether map B has yet to be told of any of
    /// them.
    pub(crate) fn mark_allocated(&self, sector: u64, count: u64) -> bool {
        let mut state = self.state();
        state.mark_allocated(sector, count, self.wait_for_disk);
        state.dirty_commit.meets(sector, count)
    }

    /// Ends the session: both maps together are true now, on whichever host. Nothing may be in flight, and what changes it from here on begins
    /// another. Blocks. An overlay that cannot be closed stays as a killed monitor leaves it, or, where a sync failed, is given up.
    pub(crate) fn close(&self) -> Result<(), OverlayError> {
        let closed = self.end();
        self.left_open.store(closed.is_err(), Ordering::Release);
        closed
    }

    fn end(&self) -> Result<(), OverlayError> {
        self.health.check()?;
        let what = "the sync of the overlay when it was closed";
        let (sessions, closed) = {
            let state = self.state();
            (state.sessions, state.closed)
        };
        if !self.has_session() && closed {
            return Ok(());
        }
        // One that never began speaks for another that was left open, which waited for the disk perhaps.
        let durable = self.wait_for_disk || !self.has_session();
        self.sync(what)?;
        if durable && !self.wait_for_disk {
            self.sync_file(what)?;
        }
        self.file
            .write_all_at(Self::session(sessions, CLOSED).as_bytes(), SESSION_OFFSET)
            .map_err(|e| io_error("close", &self.path, e))?;
        if durable {
            self.sync_file(what)?;
        }
        self.state().closed = true;
        self.session_open.store(false, Ordering::Release);
        Ok(())
    }

    /// Closes the session, and lets others read the file as a layer. Nothing may be written through this one any more.
    pub(crate) fn freeze(&self) -> Result<(), OverlayError> {
        self.close()?;
        rustix::fs::flock(&self.lock, FlockOperation::NonBlockingLockShared)
            .map_err(|e| io_error("unlock", &self.path, e))
    }

    /// Undoes [`ActiveLayer::freeze`], if nobody has an overlay on it open. The next change begins a session of its own, so that one which was made on
    /// it meanwhile is told from those that still fit.
    pub(crate) fn thaw(&self) -> Result<(), OverlayError> {
        rustix::fs::flock(&self.lock, FlockOperation::NonBlockingLockExclusive)
            .map_err(|e| io_error("lock", &self.path, e))
    }

    fn open_state(&self) -> u32 {
        if self.wait_for_disk { OPEN } else { OPEN_UNSAFE }
    }

    fn session(sessions: u64, state: u32) -> Session {
        let start = HostBoot::now();
        Session {
            sessions: sessions.into(),
            boot_id: start.id,
            boot_time: start.time.into(),
            state: state.into(),
            crc: 0.into(),
        }
        .sealed()
    }

    /// Writes what one copy of the map does not have yet. What could not be written is noted as before.
    fn write_map(&self, state: &mut ActiveState, copy: MapCopy) -> io::Result<()> {
        let start = match copy {
            MapCopy::Durable => self.layout.durable_map,
            MapCopy::Commit => self.layout.commit_map,
        };
        while let Some((page, words)) = state.dirty(copy).pop() {
            let bytes = state.map.bytes(page, words.clone());
            let offset = start + page * PAGE_BYTES + u64::from(*words.start()) * 8;
            if let Err(error) = self.file.write_all_at(&bytes, offset) {
                state.dirty(copy).mark_words(page, words);
                return Err(error);
            }
        }
        Ok(())
    }
}

impl Drop for ActiveLayer {
    fn drop(&mut self) {
        // In a fork the session is still the parent's. What could not be closed is not tried again: a second sync may succeed wrongly.
        if self.creator.is_current()
            && self.health.is_known()
            && !self.left_open.load(Ordering::Acquire)
            && let Err(error) = self.end()
        {
            log::error!("cannot close overlay {} in order: {error}", self.path.display());
        }
    }
}
