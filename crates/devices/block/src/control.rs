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

use crate::backend_slot::{BackendSlot, DiskSwap, backend_handles};
use crate::disk::Disk;
use crate::engine::Blocking;
use crate::error::BlockError;
use crate::shared::Shared;
use crate::stats::BlockStats;

/// Changes the device while it works.
#[derive(Debug, Clone)]
pub struct BlockControl {
    pub(crate) blocking: Blocking,
    pub(crate) read_only: bool,
    pub(crate) flush: bool,
    pub(crate) slots: Vec<Arc<BackendSlot>>,
    pub(crate) shared: Arc<Shared>,
}

impl BlockControl {
    /// Whether nothing works with its disk: its workers are paused and have nothing in flight, or the guest does not use it.
    pub fn is_quiesced(&self) -> bool {
        self.slots.iter().all(|slot| slot.is_parked())
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
        self.slots.iter().for_each(|slot| slot.event.signal());
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
        let backend_handles =
            backend_handles(&disk, &self.shared.id, self.slots.len() as u16, self.blocking)?;
        // The slots first: a request for the new capacity must not meet the old disk.
        let old = self.slots.iter().zip(backend_handles).map(|(slot, part)| slot.post(part)).collect();
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
