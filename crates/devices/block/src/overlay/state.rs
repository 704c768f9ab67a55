//! What the active overlay holds, and what of that its file does not say yet.

use super::map::{Dirty, Map, PAGE_BYTES, layer_run};

/// What changes while an overlay is written to. Locked for moments, by the one worker that serves the disk.
#[derive(Debug)]
pub(crate) struct ActiveState {
    /// How often somebody has written to it, this session included once it has session_open.
    pub(crate) sessions: u64,
    /// Whether there is nothing to close while no session has session_open: the file's last one was closed, or its contents are unknown.
    pub(crate) closed: bool,
    pub(crate) below: u64,
    pub(crate) map: Map,
    /// What map A in the file does not have yet.
    pub(crate) dirty_durable: Dirty,
    /// What map B in the file does not have yet.
    pub(crate) dirty_commit: Dirty,
}

/// One of the two copies of the map in the file.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum MapCopy {
    Durable,
    Commit,
}

impl ActiveState {
    /// Whether `sector` is this overlay's, and how many sectors from there on are alike; at most `max`, which is not 0.
    pub(crate) fn run(&self, sector: u64, max: u64) -> (bool, u64) {
        layer_run(&self.map, self.below, sector, max)
    }

    pub(crate) fn mark_allocated(&mut self, sector: u64, count: u64, wait_for_disk: bool) {
        let count = count.min(self.below.saturating_sub(sector));
        if count == 0 || self.map.all_set(sector, count) {
            return;
        }
        self.map.set(sector, count);
        self.dirty_commit.mark(sector, count);
        if wait_for_disk {
            self.dirty_durable.mark(sector, count);
        }
    }

    /// The bytes of a stretch of the map, and where in a copy of it they stand.
    pub(crate) fn bytes(&self, page: u64, words: std::ops::RangeInclusive<u16>) -> (u64, Box<[u8]>) {
        let offset = page * PAGE_BYTES + u64::from(*words.start()) * 8;
        (offset, self.map.bytes(page, words))
    }

    pub(crate) fn dirty(&mut self, copy: MapCopy) -> &mut Dirty {
        match copy {
            MapCopy::Durable => &mut self.dirty_durable,
            MapCopy::Commit => &mut self.dirty_commit,
        }
    }
}
