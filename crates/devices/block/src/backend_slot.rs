//! What one task needs of a disk, and how it is given another.
//!
//! There are as many slots as the drive has I/O threads, and the virtqueues are dealt out to them in turn. A slot is made with the
//! device, so that activating it makes nothing and cannot fail for want of anything. While its task is not at work (the
//! device is not active, is being reset, or is paused), the slot's handle of the disk is parked here, and that of a new disk takes its
//! place at once. While the task is at work, the new handle is posted: the task finishes what it has in flight, takes nothing new
//! meanwhile, changes over, and hands the old handle back to [`DiskSwap`].

use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc::{self, Receiver, RecvTimeoutError, SyncSender};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use crate::disk::Disk;
use crate::disk::backlog::Backlog;
use crate::disk::queue::DiskQueue;
use crate::engine::Blocking;
use crate::error::BlockError;
use sync::EventFd;
use sync::locked;

/// What one task needs of the disk, and how it is told that this changes.
#[derive(Debug)]
pub(crate) struct BackendSlot {
    slot: Mutex<SlotState>,
    /// Whether `slot.pending` is there: spares the lock where it is not.
    posted: AtomicBool,
    /// Wakes the task: something was posted, or limits changed.
    pub(crate) event: Arc<EventFd>,
}

#[derive(Debug, Default)]
struct SlotState {
    /// The slot's handle of the disk while no task works with it.
    parked: Option<Box<BackendHandle>>,
    /// What the task is to change over to.
    pending: Option<PendingSwap>,
}

/// A slot's handle of a disk.
#[derive(Debug)]
pub(crate) struct BackendHandle {
    pub(crate) queue: DiskQueue,
    /// Size of the disk in bytes.
    pub(crate) size: u64,
}

#[derive(Debug)]
pub(crate) struct PendingSwap {
    pub(crate) handle: Box<BackendHandle>,
    /// Where the old handle goes.
    pub(crate) old: SyncSender<Box<BackendHandle>>,
}

/// A disk that is being replaced.
#[derive(Debug)]
#[must_use = "the old disk is in use until it was waited for"]
pub struct DiskSwap {
    old: Vec<Receiver<Box<BackendHandle>>>,
    /// Last, so that the old disk is closed by whoever waits.
    _disk: Disk,
}

/// The old disk is still in use: requests that were in flight have not ended.
#[derive(Debug, thiserror::Error)]
#[error("the old disk still has requests in flight after {waited:?}")]
pub struct StillInUse {
    /// How long it was waited for.
    pub waited: Duration,
}

impl BackendSlot {
    pub(crate) fn new(handle: BackendHandle) -> Result<Arc<Self>, BlockError> {
        let event = Arc::new(EventFd::new().map_err(BlockError::Event)?);
        handle.queue.set_waker(Arc::clone(&event));
        Ok(Arc::new(BackendSlot {
            slot: Mutex::new(SlotState { parked: Some(Box::new(handle)), pending: None }),
            posted: AtomicBool::new(false),
            event,
        }))
    }

    /// Gives the slot another handle of a disk: at once if it is parked, else as soon as its task gets to it.
    pub(crate) fn post(&self, handle: BackendHandle) -> Receiver<Box<BackendHandle>> {
        handle.queue.set_waker(Arc::clone(&self.event));
        let handle = Box::new(handle);
        let (old, receiver) = mpsc::sync_channel(1);
        let mut slot = locked(&self.slot);
        let unused = if let Some(parked) = &mut slot.parked {
            // There is room for one: it cannot fail.
            let _ = old.send(std::mem::replace(parked, handle));
            None
        } else {
            let unused = slot.pending.replace(PendingSwap { handle, old });
            self.posted.store(true, Ordering::Release);
            unused
        };
        drop(slot);
        self.event.signal();
        if let Some(PendingSwap { handle, old }) = unused {
            // Replaced before it was ever used.
            let _ = old.send(handle);
        }
        receiver
    }

    /// Whether no task works with the slot's handle of the disk.
    pub(crate) fn is_parked(&self) -> bool {
        locked(&self.slot).parked.is_some()
    }

    /// Takes the slot's handle of the disk out.
    pub(crate) fn take(&self) -> Option<Box<BackendHandle>> {
        locked(&self.slot).parked.take()
    }

    /// What the task is to change over to.
    pub(crate) fn take_pending(&self) -> Option<PendingSwap> {
        if !self.posted.swap(false, Ordering::AcqRel) {
            return None;
        }
        locked(&self.slot).pending.take()
    }

    /// Parks the slot; what was posted meanwhile takes effect.
    pub(crate) fn park(&self, handle: Box<BackendHandle>, pending: Option<PendingSwap>) {
        let mut slot = locked(&self.slot);
        let later = slot.pending.take();
        self.posted.store(false, Ordering::Release);
        let mut handle = handle;
        for PendingSwap { handle: new, old } in pending.into_iter().chain(later) {
            let _ = old.send(std::mem::replace(&mut handle, new));
        }
        slot.parked = Some(handle);
    }
}

impl DiskSwap {
    pub(crate) fn new(disk: Disk, old: Vec<Receiver<Box<BackendHandle>>>) -> Self {
        DiskSwap { old, _disk: disk }
    }

    /// Waits until nothing uses the old disk any more, at most `patience` (none is fine). It is closed when this is dropped.
    pub fn wait(&mut self, patience: Duration) -> Result<(), StillInUse> {
        let begun = Instant::now();
        while let Some(old) = self.old.last() {
            let left = patience.saturating_sub(begun.elapsed());
            if let Err(RecvTimeoutError::Timeout) = old.recv_timeout(left) {
                return Err(StillInUse { waited: begun.elapsed() });
            }
            self.old.pop();
        }
        Ok(())
    }
}

/// One handle of `disk` for each slot.
pub(crate) fn backend_handles(
    disk: &Disk,
    id: &str,
    slots: u16,
    blocking: Blocking,
) -> Result<Vec<BackendHandle>, BlockError> {
    if disk.has_overlay() && slots > 1 {
        return Err(BlockError::OverlayThreads { id: id.into(), threads: slots });
    }
    let named = |source| BlockError::Disk { id: id.into(), source };
    let backlog = Backlog::new(slots.into());
    let handle = |slot: u16| {
        let queue = disk.queue(blocking).map_err(named)?.with_backlog(Arc::clone(&backlog), slot.into());
        Ok(BackendHandle { queue, size: disk.size() })
    };
    (0..slots).map(handle).collect()
}
