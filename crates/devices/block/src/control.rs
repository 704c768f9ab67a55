//! Changes a block device while it works: its limits and its disk.
//!
//! # Replacing the disk
//!
//! [`BlockControl::replace`] gives each [slot](crate::backend_slot) its part of the new disk, then changes
//! the capacity and interrupts. The old disk is free when [`DiskSwap::wait`] says so.

use std::sync::Arc;
use std::sync::atomic::Ordering;

use sync::locked;
use virtio::rate_limiter::{RateLimiterConfig, RateLimiterUpdate};
use virtio::worker::Nanos;

use crate::backend_slot::{DiskSwap, Lane, parts};
use crate::disk::Disk;
use crate::engine::Patience;
use crate::error::BlockError;
use crate::shared::Shared;
use crate::stats::BlockStats;

/// Changes the device while it works.
#[derive(Debug, Clone)]
pub struct BlockControl {
    pub(crate) patience: Patience,
    pub(crate) read_only: bool,
    pub(crate) flush: bool,
    pub(crate) lanes: Vec<Arc<Lane>>,
    pub(crate) shared: Arc<Shared>,
}

impl BlockControl {
    /// Whether nothing works with its disk: its workers are paused and have nothing in flight, or the guest does not use it.
    pub fn is_still(&self) -> bool {
        self.lanes.iter().all(|lane| lane.is_parked())
    }

    /// The disk in use.
    pub fn disk(&self) -> Disk {
        locked(&self.shared.front).disk.clone()
    }

    /// What the device counts.
    pub fn stats(&self) -> &BlockStats {
        &self.shared.stats
    }

    /// The limits in force.
    pub fn limits(&self) -> RateLimiterConfig {
        locked(&self.shared.limits).limiter.config()
    }

    /// Changes limits at the time `now`. Requests that wait are looked at again.
    pub fn update_limits(&self, update: RateLimiterUpdate, now: Nanos) {
        let mut limits = locked(&self.shared.limits);
        limits.limiter.update(update, now);
        limits.now = now;
        self.shared.limited.store(!limits.limiter.is_unlimited(), Ordering::Release);
        drop(limits);
        self.shared.stats.update_count.add(1);
        self.lanes.iter().for_each(|lane| lane.event.signal());
    }

    /// Goes on with `disk`. The guest sees its capacity at once.
    ///
    /// On an error nothing has changed. A disk with an overlay must not be the one in use, which has it locked.
    pub fn replace(&self, disk: Disk) -> Result<DiskSwap, BlockError> {
        let differs = |was| BlockError::Differs { id: self.shared.id.clone(), was };
        if disk.is_read_only() != self.read_only {
            return Err(differs(if self.read_only { "read-only" } else { "writable" }));
        }
        if disk.can_flush() != self.flush {
            return Err(differs(if self.flush { "one that can be flushed" } else { "one without flushes" }));
        }
        let parts = parts(&disk, &self.shared.id, self.lanes.len() as u16, self.patience)?;
        // The lanes first: a request for the new capacity must not meet the old disk.
        let old = self.lanes.iter().zip(parts).map(|(lane, part)| lane.post(part)).collect();
        let mut front = locked(&self.shared.front);
        let old_disk = std::mem::replace(&mut front.disk, disk);
        front.generation = front.generation.wrapping_add(1);
        if let Some(interrupt) = &front.interrupt {
            interrupt.config();
        }
        drop(front);
        self.shared.stats.update_count.add(1);
        Ok(DiskSwap::new(old_disk, old))
    }
}
