//! An overlay that is only read: a layer between the base disk and the active overlay.

use std::fs::{File, OpenOptions};
use std::path::Path;
use std::sync::Arc;

use rustix::fs::FlockOperation;

use super::error::OverlayError;
use super::file::{Opened, check_base, open, read_headers, read_maps};
use super::format::{BackingId, LayerId, Layout, UNKNOWN};
use super::map::{Map, layer_run};
use crate::SECTOR;

/// An overlay that is only read.
#[derive(Debug)]
pub(crate) struct BackingLayer {
    pub(crate) file: Arc<File>,
    pub(crate) layout: Layout,
    pub(crate) size: u64,
    pub(crate) identity: LayerId,
    /// Sectors of what lies beneath; those after it are always the overlay's.
    below: u64,
    map: Map,
    _lock: File,
}

impl BackingLayer {
    /// Opens the overlay at `path` to read it, on top of what `beneath` describes.
    pub(crate) fn open(path: &Path, beneath: BackingId) -> Result<Self, OverlayError> {
        let opened = open(path, OpenOptions::new().read(true), FlockOperation::NonBlockingLockShared)?;
        let Opened { file, lock, len, .. } = opened;
        let (header, session) = read_headers(&file, path, len)?;
        check_base(&header, path, beneath)?;
        if session.state.get() == UNKNOWN {
            return Err(OverlayError::LeftUnknown { path: path.into() });
        }
        let maps = read_maps(&file, path, &header, &session)?;
        Ok(BackingLayer {
            layout: Layout::of(header.virtual_size.get()),
            size: header.virtual_size.get(),
            identity: LayerId { uuid: header.uuid, sessions: session.sessions.get() },
            below: beneath.size / SECTOR,
            map: maps.map,
            file: Arc::new(file),
            _lock: lock,
        })
    }

    /// Whether `sector` is this overlay's, and how many sectors from there on are alike; at most `max`, which is not 0.
    pub(crate) fn run(&self, sector: u64, max: u64) -> (bool, u64) {
        layer_run(&self.map, self.below, sector, max)
    }
}
