//! The active overlay: the layer of a disk that takes the writes.

use std::fs::{File, OpenOptions};
use std::io;
use std::os::unix::fs::{FileExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard};

use rustix::fs::FlockOperation;
use zerocopy::IntoBytes;

use super::error::OverlayError;
use super::file::{
    HostBoot, Opened, check_base, check_size, clear, create, io_error, is_blank, open, read_headers,
    read_maps,
};
use super::format::{BackingId, CLOSED, Layout, OPEN, OPEN_UNSAFE, SESSION_OFFSET, Session, UNKNOWN};
use super::map::{Dirty, PAGE_BYTES};
use super::state::{ActiveState, MapCopy};
use crate::SECTOR;
use crate::creator_pid::CreatorPid;
use crate::host_file::health::DiskHealth;
use crate::host_file::is_same_inode;
use crate::host_file::name::make_name_durable;
use sync::locked;

/// The overlay that takes the writes of a disk.
#[derive(Debug)]
pub(crate) struct ActiveLayer {
    pub(crate) file: Arc<File>,
    pub(crate) layout: Layout,
    pub(crate) size: u64,
    path: PathBuf,
    wait_for_disk: bool,
    state: Mutex<ActiveState>,
    /// Whether a session has begun: the overlay may have changed since it was opened.
    session_open: AtomicBool,
    /// Whether opening it or the last attempt to close it failed: `Drop` does not close it then.
    left_open: AtomicBool,
    health: Arc<DiskHealth>,
    /// How the file is to be marked once its contents are unknown. `None`: it is marked already, or
    /// what it says is enough.
    mark: Mutex<Option<Mark>>,
    creator: CreatorPid,
    /// Also for all syncs but those of the queue; see [`health`](crate::host_file::health).
    lock: File,
}

/// How the file of an overlay with unknown contents is marked.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Mark {
    /// The durable map is true, and the commit map is not to be used.
    DurableOnly,
    /// Only the commit map has the contents, and it is not to be trusted: the overlay is lost.
    Unknown,
}

/// How the active overlay is opened.
#[derive(Debug)]
pub(crate) struct ActiveOptions<'a> {
    /// The files of the layers below.
    pub(crate) backing_files: &'a [Arc<File>],
    /// Size of the disk in bytes; that of an existing overlay, or of the disk below, where absent.
    pub(crate) size: Option<u64>,
    /// Whether flushes of the guest wait for the disk (`cache_type` Writeback).
    pub(crate) wait_for_disk: bool,
    /// Whether the directory entry of an existing empty file is durable already.
    pub(crate) name_is_durable: bool,
    /// The health of the disk.
    pub(crate) health: Arc<DiskHealth>,
}

impl ActiveLayer {
    /// Opens the overlay at `path` on the disk that `backing` identifies. Creates it if the file
    /// does not exist or is empty.
    pub(crate) fn open(
        path: &Path,
        backing: BackingId,
        how: ActiveOptions<'_>,
    ) -> Result<Self, OverlayError> {
        let ActiveOptions { backing_files, size, wait_for_disk, name_is_durable, health } = how;
        // Before the file is created.
        check_size(path, backing, size.unwrap_or(backing.size))?;
        // Before the lock is taken: the layers below have locked this file.
        let is_own_backing = std::fs::metadata(path).is_ok_and(|this| {
            let others = backing_files.iter().filter_map(|file| file.metadata().ok());
            others.into_iter().any(|other| is_same_inode(&this, &other))
        });
        if is_own_backing {
            return Err(OverlayError::OwnBacking { path: path.into() });
        }
        let mut options = OpenOptions::new();
        options.read(true).write(true).create(true).truncate(false).mode(0o600);
        let Opened { file, lock, mut len, is_new } =
            open(path, &options, FlockOperation::NonBlockingLockExclusive)?;
        let look = |file: &File| file.metadata().map_err(|e| io_error("read the metadata", path, e));
        let this = look(&file)?;
        for other in backing_files {
            if is_same_inode(&this, &look(other)?) {
                return Err(OverlayError::OwnBacking { path: path.into() });
            }
        }
        if is_blank(&file, len) {
            len = create(&file, path, backing, size.unwrap_or(backing.size))?;
            if (is_new || !name_is_durable)
                && let Err(error) = make_name_durable(path)
            {
                if is_new {
                    let _ = std::fs::remove_file(path);
                }
                return Err(io_error("sync the directory", path, error));
            }
        }
        let (header, session) = read_headers(&file, path, len)?;
        check_base(&header, path, backing)?;
        let virtual_size = header.virtual_size.get();
        if let Some(size) = size.filter(|&size| size != virtual_size) {
            let why = format!("it was created with {virtual_size} bytes");
            return Err(OverlayError::Size { path: path.into(), size, why });
        }
        let left = session.state.get();
        if left == UNKNOWN {
            if wait_for_disk {
                return Err(OverlayError::LeftUnknown { path: path.into() });
            }
            log::warn!(
                "overlay {}: a sync failed in an earlier session; any of its sectors may be lost",
                path.display()
            );
        }
        let maps = read_maps(&file, path, &header, &session)?;
        // The mark for a failure of the very first sync. An overlay whose flushes do not wait for
        // the disk has promised nothing, so it needs none.
        let mark = match left {
            OPEN => Some(Mark::DurableOnly),
            _ if wait_for_disk => Some(Mark::Unknown),
            _ => None,
        };
        let active = ActiveLayer {
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
                backing_sectors: backing.size / SECTOR,
                map: maps.map,
                dirty_durable: maps.missing_in_durable,
                dirty_commit: Dirty::default(),
            }),
        };
        if let Err(error) = active.recover(maps.trust_commit_map) {
            // Closing it would declare the maps true.
            active.left_open.store(true, Ordering::Release);
            return Err(error);
        }
        if wait_for_disk {
            // The durable map now has all allocated sectors.
            *locked(&active.mark) = Some(Mark::DurableOnly);
        }
        Ok(active)
    }

    /// The state, for the worker that serves the disk.
    pub(crate) fn state(&self) -> MutexGuard<'_, ActiveState> {
        locked(&self.state)
    }

    /// Whether no sector is allocated. Sectors past the end of the disk below always count as
    /// allocated.
    pub(crate) fn is_unwritten(&self) -> bool {
        let state = self.state();
        let sectors = self.size / SECTOR;
        state.backing_sectors == sectors && (sectors == 0 || state.map.run(0, sectors) == (false, sectors))
    }

    /// The path of the file.
    pub(crate) fn path(&self) -> &Path {
        &self.path
    }

    /// Whether flushes wait for the disk.
    pub(crate) fn waits_for_disk(&self) -> bool {
        self.wait_for_disk
    }

    /// Writes the maps to the file and, if flushes wait for the disk, makes all of it durable.
    /// `what` names the reason in an error. Blocks.
    pub(crate) fn sync(&self, what: &'static str) -> Result<(), OverlayError> {
        let written = |e| io_error("write the map", &self.path, e);
        if !self.wait_for_disk {
            return self.write_map(&mut self.state(), MapCopy::Commit).map_err(written);
        }
        self.sync_file(what)?;
        // The durable map never has sectors whose data is not durable.
        let mut state = self.state();
        if !state.dirty_durable.is_empty() {
            self.write_map(&mut state, MapCopy::Durable).map_err(written)?;
            drop(state);
            self.sync_file(what)?;
        }
        Ok(())
    }

    /// Writes dirty pages to the disk. Blocks. Requests may be in flight.
    pub(crate) fn write_back(&self) -> Result<(), OverlayError> {
        self.sync_file("a write-back of what was written")
    }

    /// A sync beside those of the queue. On failure, marks the contents as unknown.
    fn sync_file(&self, what: &'static str) -> Result<(), OverlayError> {
        let synced = self.health.sync(&self.lock, what);
        if synced.is_err() {
            self.mark_unknown();
        }
        Ok(synced?)
    }

    /// The health of the disk.
    pub(crate) fn health(&self) -> &DiskHealth {
        &self.health
    }

    /// The session that marks the contents as unknown, and its offset in the file. `None` if the
    /// file is marked already.
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

    /// The mark was overwritten: [`unknown_mark`](Self::unknown_mark) is needed again.
    pub(crate) fn require_mark_again(&self) {
        *locked(&self.mark) = Some(Mark::DurableOnly);
    }

    /// Offset and length of the commit map. Clearing it is as good as
    /// [`unknown_mark`](Self::unknown_mark): only the durable map is left to be used.
    pub(crate) fn commit_map(&self) -> (u64, u64) {
        (self.layout.commit_map, self.layout.data - self.layout.commit_map)
    }

    /// Marks the contents as unknown in the file. Blocks.
    fn mark_unknown(&self) {
        let Some((offset, session)) = self.unknown_mark() else { return };
        let Err(error) = self.file.write_all_at(&session, offset) else { return };
        let (offset, len) = self.commit_map();
        if clear(&self.file, offset, len).is_err() {
            self.log_unmarked(&error);
        }
    }

    /// Logs that the contents could not be marked as unknown.
    pub(crate) fn log_unmarked(&self, why: &dyn std::fmt::Display) {
        log::error!(
            "overlay {}: cannot mark its contents as unknown: {why}; do not use it again",
            self.path.display()
        );
    }

    /// Brings the maps of a session that was not closed into line with what was read from them. The
    /// set of allocated sectors stays the same.
    fn recover(&self, trust_commit_map: bool) -> Result<(), OverlayError> {
        let what = "the sync of the overlay when it was opened";
        if !trust_commit_map {
            let (offset, len) = self.commit_map();
            clear(&self.file, offset, len).map_err(|e| io_error("clear the map", &self.path, e))?;
            self.sync_file(what)?;
        }
        if self.wait_for_disk && !self.state().dirty_durable.is_empty() {
            // Sectors that only the commit map had must be as durable as the others before the next
            // session.
            self.sync(what)?;
        }
        Ok(())
    }

    /// Whether a session has begun, so that the overlay may be changed.
    pub(crate) fn has_session(&self) -> bool {
        self.session_open.load(Ordering::Acquire)
    }

    /// The session to write before the first change, and its offset in the file.
    pub(crate) fn session_start(&self) -> (u64, Box<[u8]>) {
        let session = Self::session(self.state().sessions + 1, self.open_state());
        (SESSION_OFFSET, session.as_bytes().into())
    }

    /// The session was written: changes may follow.
    pub(crate) fn session_opened(&self) {
        let mut state = self.state();
        state.sessions += 1;
        state.closed = false;
        self.session_open.store(true, Ordering::Release);
    }

    /// Marks `count` sectors from `sector` as allocated; their data is in the file. Whether the
    /// commit map in the file lacks any of them.
    pub(crate) fn mark_allocated(&self, sector: u64, count: u64) -> bool {
        let mut state = self.state();
        state.mark_allocated(sector, count, self.wait_for_disk);
        state.dirty_commit.meets(sector, count)
    }

    /// Ends the session: the two maps together are then true on any host. Nothing may be in flight.
    /// The next change begins a new session. Blocks. If it fails, the file stays as after a kill of
    /// the monitor or, if a sync failed, is marked as unknown.
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
        // Without a session, this closes an earlier one, whose flushes may have waited for the
        // disk.
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

    /// Closes the session, and downgrades the lock so that others can open the file as a backing
    /// layer. It must not be written then.
    pub(crate) fn freeze(&self) -> Result<(), OverlayError> {
        self.close()?;
        rustix::fs::flock(&self.lock, FlockOperation::NonBlockingLockShared)
            .map_err(|e| io_error("unlock", &self.path, e))
    }

    /// Undoes [`ActiveLayer::freeze`], if no other has opened the file. The next change begins a
    /// new session, so that overlays created on it meanwhile do not fit any more.
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

    /// Writes what a copy of the map in the file lacks. On an error the rest stays dirty.
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
        // In a fork the session is still the parent's. A failed close is not repeated: its second
        // sync may succeed wrongly.
        if self.creator.is_current()
            && self.health.is_known()
            && !self.left_open.load(Ordering::Acquire)
            && let Err(error) = self.end()
        {
            log::error!("overlay {}: cannot close: {error}", self.path.display());
        }
    }
}
