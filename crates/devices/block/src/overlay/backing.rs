//! A backing layer: a read-only overlay between the base disk and the active overlay.

use std::fs::{File, OpenOptions};
use std::path::Path;
use std::sync::Arc;

use rustix::fs::FlockOperation;

use super::error::OverlayError;
use super::file::{Opened, check_base, open, read_headers, read_maps};
use super::format::{BackingId, LayerId, Layout, UNKNOWN};
use super::map::{Map, layer_run};
use crate::SECTOR;

/// A read-only overlay.
#[derive(Debug)]
pub(crate) struct BackingLayer {
    pub(crate) file: Arc<File>,
    pub(crate) layout: Layout,
    pub(crate) size: u64,
    pub(crate) identity: LayerId,
    /// Sectors of the disk below. Those after them always count as allocated.
    backing_sectors: u64,
    map: Map,
    _lock: File,
}

impl BackingLayer {
    /// Opens the overlay at `path` for reading, on the disk that `backing` identifies.
    pub(crate) fn open(path: &Path, backing: BackingId) -> Result<Self, OverlayError> {
        let opened = open(path, OpenOptions::new().read(true), FlockOperation::NonBlockingLockShared)?;
        let Opened { file, lock, len, .. } = opened;
        let (header, session) = read_headers(&file, path, len)?;
        check_base(&header, path, backing)?;
        if session.state.get() == UNKNOWN {
            return Err(OverlayError::LeftUnknown { path: path.into() });
        }
        let maps = read_maps(&file, path, &header, &session)?;
        Ok(BackingLayer {
            layout: Layout::of(header.virtual_size.get()),
            size: header.virtual_size.get(),
            identity: LayerId { uuid: header.uuid, sessions: session.sessions.get() },
            backing_sectors: backing.size / SECTOR,
            map: maps.map,
            file: Arc::new(file),
            _lock: lock,
        })
    }

    /// Whether `sector` is allocated in this overlay, and the number of sectors from there on for
    /// which that is the same. At most `max`, which is not 0.
    pub(crate) fn run(&self, sector: u64, max: u64) -> (bool, u64) {
        layer_run(&self.map, self.backing_sectors, sector, max)
    }
}
