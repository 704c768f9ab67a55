//! Changes a block device while the guest runs: its rate limits and its disk.
//!
//! # Swapping the disk
//!
//! [`BlockControl::replace`] gives each [slot](crate::backend_slot) its handle of the new disk,
//! then changes the capacity and raises a configuration interrupt. [`DiskSwap::wait`] returns when
//! the old disk has no requests in flight.
//!
//! The workers of a device are chosen when it is built. So a device on shared workers cannot get a
//! disk that only [`IoEngine::Sync`](config::IoEngine::Sync) can serve: such a disk blocks the
//! worker. This happens only if `io_uring` has become unavailable since. The swap fails then, and
//! the old disk stays.

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

/// Controls a block device: its rate limits and its disk.
#[derive(Debug, Clone)]
pub struct BlockControl {
    pub(crate) blocking: Blocking,
    pub(crate) read_only: bool,
    pub(crate) flush: bool,
    pub(crate) slots: Vec<Arc<BackendSlot>>,
    pub(crate) shared: Arc<Shared>,
}

impl BlockControl {
    /// Whether nothing uses the disk: the tasks are paused and have nothing in flight, or the
    /// device is not active.
    pub fn is_quiesced(&self) -> bool {
        self.slots.iter().all(|slot| slot.is_parked())
    }

    /// The disk in use.
    pub fn disk(&self) -> Disk {
        locked(&self.shared.live).disk.clone()
    }

    /// The device's counters.
    pub fn stats(&self) -> &Arc<BlockStats> {
        &self.shared.stats
    }

    /// The rate limits in force.
    pub fn limits(&self) -> RateLimiterConfig {
        locked(&self.shared.limits).limiter.config()
    }

    /// Changes rate limits at the time `now`. Throttled requests are checked against the new ones.
    pub fn update_limits(&self, update: RateLimiterUpdate, now: Nanos) {
        let mut limits = locked(&self.shared.limits);
        limits.limiter.update(update, now);
        limits.now = now;
        self.shared.limited.store(!limits.limiter.is_unlimited(), Ordering::Release);
        drop(limits);
        self.shared.stats.update_count.add(1);
        self.slots.iter().for_each(|slot| slot.event.signal());
    }

    /// Swaps the disk for `disk`. The guest sees the new capacity at once.
    ///
    /// On an error nothing has changed. A disk with an overlay must not be the one in use, whose
    /// overlay is locked.
    pub fn replace(&self, disk: Disk) -> Result<DiskSwap, BlockError> {
        check_disk(&disk, &self.shared.id, (self.read_only, self.flush))?;
        let handles = backend_handles(&disk, &self.shared.id, self.slots.len() as u16, self.blocking)?;
        // The slots first: a request within the new capacity must not reach the old disk.
        let old = self.slots.iter().zip(handles).map(|(slot, handle)| slot.post(handle)).collect();
        let mut live = locked(&self.shared.live);
        let old_disk = std::mem::replace(&mut live.disk, disk);
        live.generation = live.generation.wrapping_add(1);
        if let Some(interrupt) = &live.interrupt {
            interrupt.config();
        }
        drop(live);
        self.shared.stats.update_count.add(1);
        Ok(DiskSwap::new(old_disk, old))
    }
}

/// Checks that `disk` has the properties that the guest of drive `id` relies on.
pub(crate) fn check_disk(disk: &Disk, id: &str, (read_only, flush): (bool, bool)) -> Result<(), BlockError> {
    let differs = |was| BlockError::Differs { id: id.into(), was };
    if disk.is_read_only() != read_only {
        return Err(differs(if read_only { "that is read-only" } else { "that is writable" }));
    }
    if disk.can_flush() != flush {
        return Err(differs(if flush { "with cache_type Writeback" } else { "with cache_type Unsafe" }));
    }
    Ok(())
}
