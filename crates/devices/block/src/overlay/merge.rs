//! Merging layers: one overlay that holds what several mark_allocated together.
//!
//! The new file takes the extent of the topmost of them. It says that it is that one, so what was made on that one goes on this one too; it
//! lies on the plain disk itself. Until all of it is on the disk the file has no header, and is no overlay. A failed sync ends the merge: nothing
//! tries another, which could succeed wrongly.

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

/// Longest piece that is copied at once.
const CHUNK: u64 = 1 << 20;

/// The disk itself is waited for each time that so many bytes were copied: neither a flush of the guest's nor the end of the process is to wait for
/// a whole disk.
const SYNC_EVERY: u64 = 64 << 20;

/// What is merged: where its sectors are.
pub(crate) trait MergeSource {
    /// Size in bytes.
    fn size(&self) -> u64;
    /// The file, and where in it, that holds the `len` bytes from `offset`, or as many of them as are in one extent; `None` where they are the
    /// plain disk's.
    fn locate_layer(&self, offset: u64, len: u64) -> (Option<(&File, u64)>, u64);
}

/// The file that is to mark_allocated what layers do. It is opened before anything is copied: whatever becomes of its name meanwhile, no other
/// file is written to.
#[derive(Debug)]
pub(crate) struct MergeTarget {
    path: PathBuf,
    file: File,
    lock: File,
    /// Bytes that were written since the disk itself was last waited for.
    unsynced: u64,
}

impl MergeTarget {
    /// Opens the blank file at `path`.
    pub(crate) fn open(path: &Path) -> Result<Self, OverlayError> {
        let mut options = OpenOptions::new();
        options.read(true).write(true);
        let Opened { file, lock, len, .. } = open(path, &options, FlockOperation::NonBlockingLockExclusive)?;
        if !is_blank(&file, len) {
            return Err(io_error("make", path, io::Error::from(io::ErrorKind::AlreadyExists)));
        }
        Ok(MergeTarget { path: path.into(), file, lock, unsynced: 0 })
    }

    /// Its name.
    pub(crate) fn path(&self) -> &Path {
        &self.path
    }

    /// Writes what `layers` mark_allocated over the plain disk `beneath` to it, as `identity`. Durable when this returns. Fails early when `keep_going` says no,
    /// which is asked before each piece.
    pub(crate) fn fill(
        mut self,
        layers: &impl MergeSource,
        beneath: BackingId,
        identity: LayerId,
        keep_going: &dyn Fn() -> bool,
    ) -> Result<(), OverlayError> {
        let path = &self.path.clone();
        let failed = |what: &'static str| move |e: io::Error| io_error(what, path, e);
        let size = layers.size();
        let layout = Layout::of(size);
        self.file.set_len(layout.file_len).map_err(failed("set the size of"))?;
        let mut map = Map::new(size / SECTOR);
        let mut at = 0;
        while at < size {
            let (locate_layer, len) = layers.locate_layer(at, size - at);
            if let Some((from, start)) = locate_layer {
                self.copy(from, start..start + len, layout.data + at, keep_going)
                    .map_err(failed("copy layers to"))?;
                map.set(at / SECTOR, len / SECTOR);
            }
            at += len;
        }
        for page in 0..map.page_count() {
            let bytes = map.bytes(page, 0..=(PAGE_BYTES / 8 - 1) as u16);
            if bytes.iter().any(|byte| *byte != 0) {
                self.file
                    .write_all_at(&bytes, layout.durable_map + page * PAGE_BYTES)
                    .map_err(failed("write the map of"))?;
            }
        }
        let session = Session {
            sessions: identity.sessions.into(),
            boot_id: [0; 16],
            boot_time: 0.into(),
            state: CLOSED.into(),
            crc: 0.into(),
        };
        let header = new_header(identity.uuid, beneath, size);
        let durable = || Ok(sync_data(&self.file)?);
        // The header comes last: a file without it is no overlay.
        self.file
            .write_all_at(session.sealed().as_bytes(), SESSION_OFFSET)
            .and_then(|()| durable())
            .and_then(|()| self.file.write_all_at(header.as_bytes(), 0))
            .and_then(|()| durable())
            .map_err(failed("write the header of"))?;
        // A fork of this process that was just made may have the lock as well for a moment: so it is given up, not only closed.
        rustix::fs::flock(&self.lock, FlockOperation::Unlock).map_err(|e| io_error("unlock", path, e))
    }

    /// Copies a range of a file to where this one has a hole. Holes stay holes.
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
                // A file system that does not tell holes from data: everything is copied.
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
