//! Describes an overlay file for tools. Reads it without a lock, and never changes it.
//!
//! An overlay that a monitor uses can be described too: the map is then that of the moment. The
//! contents of a disk with overlays are read with [`DiskImage`](crate::disk::DiskImage), which
//! locks its files for reading.
//!
//! The file identifies the disk below it, but has no paths: the process that opens an overlay
//! names its base and layers.

use std::fs::File;
use std::os::unix::fs::{MetadataExt, OpenOptionsExt};
use std::path::{Path, PathBuf};

use rustix::fs::OFlags;

use super::error::OverlayError;
use super::file::{HostBoot, io_error, is_invalidated, read_headers, read_maps};
use super::format::{CLOSED, OPEN, OPEN_UNSAFE, Session, VERSION};
use super::map::{Map, layer_run};
use crate::SECTOR;
pub use crate::host_file::lock::LockHolder;

/// An overlay file that was read.
#[derive(Debug)]
pub struct OverlayFile {
    info: OverlayInfo,
    map: Map,
}

/// What an overlay file says of itself. Its checksums are right.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct OverlayInfo {
    /// The file.
    pub path: PathBuf,
    /// Format version.
    pub version: u32,
    /// Random id of the overlay.
    pub uuid: [u8; 16],
    /// Size of the disk in bytes.
    pub virtual_size: u64,
    /// Bytes of the disk that are allocated in this overlay, holes included.
    pub allocated: u64,
    /// Bytes that the file takes on the host's disk.
    pub host_space: u64,
    /// Number of sessions that have written to it.
    pub sessions: u64,
    /// How its last session ended, if it did.
    pub state: SessionState,
    /// The process that has it locked. Best effort: some file systems do not show it.
    pub locked_by: Option<LockHolder>,
    /// The disk that it was created on.
    pub backing: BackingInfo,
}

/// Identity of the disk that an overlay was created on.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct BackingInfo {
    /// Size in bytes.
    pub size: u64,
    /// Id of the topmost overlay of that disk, and the sessions that had written to it; `None` for
    /// a disk without overlays.
    pub overlay: Option<([u8; 16], u64)>,
    /// CRC-32 of its first and last 64 KiB.
    pub fingerprint: u32,
}

/// State of an overlay's last session.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum SessionState {
    /// Closed, or never begun: the overlay is complete on any host.
    Closed,
    /// Not closed in this boot of the host: in use, or its monitor was killed. Complete on this
    /// host.
    Open,
    /// As `Open`, by a monitor that does not wait for the disk: after a crash of the host, sectors
    /// may be lost without notice.
    OpenUnsafe,
    /// Not closed in an earlier boot, or on another host: it has what the guest had flushed.
    Crashed,
    /// A sync failed: it has what the guest had flushed before.
    SyncFailed,
    /// A sync failed before anything was durable: the contents are unknown.
    Unknown,
}

/// Iterator over the allocated ranges of an overlay: offset and length in bytes.
#[derive(Debug)]
pub struct AllocatedRanges<'a> {
    map: &'a Map,
    backing_sectors: u64,
    sectors: u64,
    next: u64,
}

impl OverlayFile {
    /// Reads the overlay at `path`. Fails if it is damaged or is no overlay.
    pub fn open(path: &Path) -> Result<Self, OverlayError> {
        let nonblocking = OFlags::NONBLOCK.bits().cast_signed();
        let file = File::options().read(true).custom_flags(nonblocking).open(path);
        let file = file.map_err(|e| io_error("open", path, e))?;
        let metadata = file.metadata().map_err(|e| io_error("read the metadata", path, e))?;
        if !metadata.is_file() {
            return Err(OverlayError::NotAFile { path: path.into() });
        }
        let (header, session) = read_headers(&file, path, metadata.len())?;
        let map = read_maps(&file, path, &header, &session)?.map;
        let backing = BackingInfo {
            size: header.base_size.get(),
            overlay: (header.base_uuid != [0; 16]).then_some((header.base_uuid, header.base_sessions.get())),
            fingerprint: header.base_fingerprint.get(),
        };
        let info = OverlayInfo {
            path: path.into(),
            version: VERSION,
            uuid: header.uuid,
            virtual_size: header.virtual_size.get(),
            allocated: 0,
            host_space: metadata.blocks() * 512,
            sessions: session.sessions.get(),
            state: SessionState::of(&session),
            locked_by: LockHolder::find(&file),
            backing,
        };
        let mut file = OverlayFile { info, map };
        file.info.allocated = file.allocated().map(|(_, len)| len).sum();
        Ok(file)
    }

    /// What the file says of itself.
    pub fn info(&self) -> &OverlayInfo {
        &self.info
    }

    /// The allocated ranges, in order. What lies past the end of the disk below is always
    /// allocated.
    pub fn allocated(&self) -> AllocatedRanges<'_> {
        AllocatedRanges {
            map: &self.map,
            backing_sectors: self.info.backing.size / SECTOR,
            sectors: self.info.virtual_size / SECTOR,
            next: 0,
        }
    }
}

impl SessionState {
    fn of(session: &Session) -> Self {
        match session.state.get() {
            CLOSED => SessionState::Closed,
            OPEN if is_invalidated(session) => SessionState::SyncFailed,
            OPEN if HostBoot::now().is_of(session) => SessionState::Open,
            OPEN => SessionState::Crashed,
            OPEN_UNSAFE => SessionState::OpenUnsafe,
            // `read_headers` lets no other state pass than `UNKNOWN`.
            _ => SessionState::Unknown,
        }
    }
}

impl Iterator for AllocatedRanges<'_> {
    type Item = (u64, u64);

    fn next(&mut self) -> Option<(u64, u64)> {
        let mut start = None;
        while self.next < self.sectors {
            let left = self.sectors - self.next;
            let (allocated, count) = layer_run(self.map, self.backing_sectors, self.next, left);
            match (allocated, start) {
                (true, None) => start = Some(self.next),
                (false, Some(_)) => break,
                _ => {}
            }
            self.next += count;
        }
        start.map(|start| (start * SECTOR, (self.next - start) * SECTOR))
    }
}
