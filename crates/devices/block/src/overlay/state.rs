//! The allocated sectors of the active overlay, and those that the maps in its file lack.

use super::map::{Dirty, Map, PAGE_BYTES, layer_run};

/// The mutable state of the active overlay. Locked for moments, by the one worker that serves the
/// disk.
#[derive(Debug)]
pub(crate) struct ActiveState {
    /// Number of sessions that have written to it, including the current one.
    pub(crate) sessions: u64,
    /// Whether there is nothing to close while no session has begun: the last one is closed or
    /// unknown.
    pub(crate) closed: bool,
    pub(crate) backing_sectors: u64,
    pub(crate) map: Map,
    /// Words that the durable map in the file lacks.
    pub(crate) dirty_durable: Dirty,
    /// Words that the commit map in the file lacks.
    pub(crate) dirty_commit: Dirty,
}

/// One of the two copies of the map in the file.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum MapCopy {
    Durable,
    Commit,
}

impl ActiveState {
    /// Whether `sector` is allocated in this overlay, and the number of sectors from there on for
    /// which that is the same. At most `max`, which is not 0.
    pub(crate) fn run(&self, sector: u64, max: u64) -> (bool, u64) {
        layer_run(&self.map, self.backing_sectors, sector, max)
    }

    pub(crate) fn mark_allocated(&mut self, sector: u64, count: u64, wait_for_disk: bool) {
        let count = count.min(self.backing_sectors.saturating_sub(sector));
        if count == 0 || self.map.all_set(sector, count) {
            return;
        }
        self.map.set(sector, count);
        self.dirty_commit.mark(sector, count);
        if wait_for_disk {
            self.dirty_durable.mark(sector, count);
        }
    }

    /// The bytes of a range of the map, and their offset in a copy of it.
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
