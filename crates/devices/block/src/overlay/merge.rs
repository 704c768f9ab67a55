//! Merges layers into one new overlay.
//!
//! The new file replaces the topmost of the layers and has its identity, so overlays created on
//! that one fit on the new one. Its base is the base disk itself. It gets its header last, when
//! everything else is durable; until then it is no overlay. A failed sync ends the merge: a second
//! one could succeed wrongly.

use std::fs::{File, OpenOptions};
use std::io;
use std::ops::Range;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};

use rustix::fs::{FlockOperation, SeekFrom};
use rustix::io::Errno;
use zerocopy::IntoBytes;

use super::error::OverlayError;
use super::file::{Opened, io_error, is_blank, new_header, open};
use super::format::{BackingId, CLOSED, LayerId, Layout, SESSION_OFFSET, Session};
use super::map::{Map, PAGE_BYTES};
use crate::SECTOR;
use crate::host_file::health::sync_data;

/// Most bytes that are copied at once.
const CHUNK: u64 = 1 << 20;

/// Bytes after which the copy is synced, so that neither a flush of the guest nor the end of the
/// process has to wait for a whole disk.
const SYNC_EVERY: u64 = 64 << 20;

/// The layers to merge.
pub(crate) trait MergeSource {
    /// Size in bytes.
    fn size(&self) -> u64;
    /// The file and offset that store the `len` bytes from `offset`, or as many of them as are in
    /// one extent. `None` for the file if that is the base disk.
    fn locate_layer(&self, offset: u64, len: u64) -> (Option<(&File, u64)>, u64);
}

/// The file that layers are merged into. It is opened before the copy, so that no other file is
/// written if its name changes meanwhile.
#[derive(Debug)]
pub(crate) struct MergeTarget {
    path: PathBuf,
    file: File,
    lock: File,
    /// Bytes written since the last sync.
    unsynced: u64,
}

impl MergeTarget {
    /// Opens the blank file at `path`.
    pub(crate) fn open(path: &Path) -> Result<Self, OverlayError> {
        let mut options = OpenOptions::new();
        options.read(true).write(true);
        let Opened { file, lock, len, .. } = open(path, &options, FlockOperation::NonBlockingLockExclusive)?;
        if !is_blank(&file, len) {
            return Err(io_error("create", path, io::Error::from(io::ErrorKind::AlreadyExists)));
        }
        Ok(MergeTarget { path: path.into(), file, lock, unsynced: 0 })
    }

    /// Its path.
    pub(crate) fn path(&self) -> &Path {
        &self.path
    }

    /// Copies `layers` over the base disk `backing`, as the overlay `identity`. Durable when this
    /// returns. Fails early when `keep_going`, which is asked before each chunk, returns false.
    pub(crate) fn fill(
        mut self,
        layers: &impl MergeSource,
        backing: BackingId,
        identity: LayerId,
        keep_going: &dyn Fn() -> bool,
    ) -> Result<(), OverlayError> {
        let path = &self.path.clone();
        let failed = |what: &'static str| move |e: io::Error| io_error(what, path, e);
        let size = layers.size();
        let layout = Layout::of(size);
        self.file.set_len(layout.file_len).map_err(failed("set the size"))?;
        let mut map = Map::new(size / SECTOR);
        let mut at = 0;
        while at < size {
            let (locate_layer, len) = layers.locate_layer(at, size - at);
            if let Some((from, start)) = locate_layer {
                self.copy(from, start..start + len, layout.data + at, keep_going)
                    .map_err(failed("copy the layers"))?;
                map.set(at / SECTOR, len / SECTOR);
            }
            at += len;
        }
        for page in 0..map.page_count() {
            let bytes = map.bytes(page, 0..=(PAGE_BYTES / 8 - 1) as u16);
            if bytes.iter().any(|byte| *byte != 0) {
                self.file
                    .write_all_at(&bytes, layout.durable_map + page * PAGE_BYTES)
                    .map_err(failed("write the map"))?;
            }
        }
        let session = Session {
            sessions: identity.sessions.into(),
            boot_id: [0; 16],
            boot_time: 0.into(),
            state: CLOSED.into(),
            crc: 0.into(),
        };
        let header = new_header(identity.uuid, backing, size);
        let durable = || Ok(sync_data(&self.file)?);
        // The header comes last: without it the file is no overlay.
        self.file
            .write_all_at(session.sealed().as_bytes(), SESSION_OFFSET)
            .and_then(|()| durable())
            .and_then(|()| self.file.write_all_at(header.as_bytes(), 0))
            .and_then(|()| durable())
            .map_err(failed("write the header"))?;
        // Unlocked and not just closed: a fork of this process may share the open file for a
        // moment.
        rustix::fs::flock(&self.lock, FlockOperation::Unlock).map_err(|e| io_error("unlock", path, e))
    }

    /// Copies a range of a file to a hole of this one. Holes stay holes.
    fn copy(
        &mut self,
        from: &File,
        range: Range<u64>,
        target: u64,
        keep_going: &dyn Fn() -> bool,
    ) -> io::Result<()> {
        let mut bytes = vec![0; CHUNK.min(range.end - range.start) as usize];
        let mut at = range.start;
        while at < range.end {
            if !keep_going() {
                return Err(io::ErrorKind::Interrupted.into());
            }
            match rustix::fs::seek(from, SeekFrom::Data(at)) {
                Ok(data) => at = at.max(data),
                Err(Errno::NXIO) => break,
                // The file system does not support `SEEK_DATA`: everything is copied.
                Err(_) => {}
            }
            if at >= range.end {
                break;
            }
            let piece = &mut bytes[..CHUNK.min(range.end - at) as usize];
            from.read_exact_at(piece, at)?;
            if piece.iter().any(|byte| *byte != 0) {
                self.file.write_all_at(piece, target + (at - range.start))?;
                self.unsynced += piece.len() as u64;
            }
            at += piece.len() as u64;
            if self.unsynced >= SYNC_EVERY {
                sync_data(&self.file)?;
                self.unsynced = 0;
            }
        }
        Ok(())
    }
}
