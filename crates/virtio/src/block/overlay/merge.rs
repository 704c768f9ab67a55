//! Merging layers: one overlay that holds what several hold together.
//!
//! The new file takes the place of the topmost of them. It says that it is that one, so what was made on that one goes on this one too; it
//! lies on the plain disk itself.

use std::fs::{File, OpenOptions};
use std::io;
use std::ops::Range;
use std::os::unix::fs::FileExt;
use std::path::Path;

use rustix::fs::{FlockOperation, SeekFrom};
use rustix::io::Errno;
use zerocopy::IntoBytes;

use super::file::{Opened, io_error, is_blank, new_header, open};
use super::format::{CLOSED, Layout, SESSION_OFFSET, Session};
use super::map::{Map, PAGE_BYTES};
use super::{Beneath, Identity, OverlayError};
use crate::block::SECTOR;

/// Longest piece that is copied at once.
const CHUNK: u64 = 1 << 20;

/// What is merged: where its sectors are.
pub(in crate::block) trait Merged {
    /// Size in bytes.
    fn size(&self) -> u64;
    /// The file, and where in it, that holds the `len` bytes from `offset`, or as many of them as are in one place; `None` where they are the
    /// plain disk's.
    fn holder(&self, offset: u64, len: u64) -> (Option<(&File, u64)>, u64);
}

/// Writes what `layers` hold over the plain disk `beneath` to the blank file at `path`, as `identity`. Durable when this returns.
pub(in crate::block) fn merge(
    layers: &impl Merged,
    beneath: Beneath,
    identity: Identity,
    path: &Path,
) -> Result<(), OverlayError> {
    let mut options = OpenOptions::new();
    options.read(true).write(true);
    let Opened { file, lock: _lock, len } = open(path, &options, FlockOperation::NonBlockingLockExclusive)?;
    if !is_blank(&file, len) {
        return Err(io_error("make", path, io::Error::from(io::ErrorKind::AlreadyExists)));
    }
    let size = layers.size();
    let layout = Layout::of(size);
    let failed = |what: &'static str| move |e: io::Error| io_error(what, path, e);
    file.set_len(layout.file_len).map_err(failed("set the size of"))?;
    let mut map = Map::new(size / SECTOR);
    let mut at = 0;
    while at < size {
        let (holder, len) = layers.holder(at, size - at);
        if let Some((from, start)) = holder {
            copy(from, start..start + len, &file, layout.data + at).map_err(failed("copy layers to"))?;
            map.set(at / SECTOR, len / SECTOR);
        }
        at += len;
    }
    for page in 0..map.page_count() {
        let bytes = map.bytes(page, 0..=(PAGE_BYTES / 8 - 1) as u16);
        if bytes.iter().any(|byte| *byte != 0) {
            file.write_all_at(&bytes, layout.map_a + page * PAGE_BYTES)
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
    let durable = || Ok(rustix::fs::fdatasync(&file)?);
    let header = new_header(identity.uuid, beneath, size);
    // The header comes last: a file without it is no overlay.
    file.write_all_at(session.sealed().as_bytes(), SESSION_OFFSET)
        .and_then(|()| durable())
        .and_then(|()| file.write_all_at(header.as_bytes(), 0))
        .and_then(|()| durable())
        .map_err(failed("write the header of"))
}

/// Copies a range of a file to where `to` has a hole. Holes stay holes.
fn copy(from: &File, range: Range<u64>, to: &File, target: u64) -> io::Result<()> {
    let mut bytes = vec![0; CHUNK.min(range.end - range.start) as usize];
    let mut at = range.start;
    while at < range.end {
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
            to.write_all_at(piece, target + (at - range.start))?;
        }
        at += piece.len() as u64;
    }
    Ok(())
}
