//! A task's handle of the disk, and how it is swapped for that of another disk.
//!
//! A device has one slot for each I/O thread of the drive, and the virtqueues are dealt to them in
//! turn. Slots are made with the device, so activation allocates no backend and cannot fail for
//! lack of one.
//!
//! While the task does not run (the device is not active, is being reset, or is paused), its handle
//! is parked in the slot and a new handle replaces it at once. While the task runs, the new handle
//! is posted: the task completes its requests in flight, takes no new ones, swaps the handles, and
//! returns the old one to [`DiskSwap`].

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

/// A task's handle of the disk, and the handle to swap it for.
#[derive(Debug)]
pub(crate) struct BackendSlot {
    state: Mutex<SlotState>,
    /// Whether `state.pending` is set; spares the lock where it is not.
    posted: AtomicBool,
    /// Wakes the task: a handle was posted, or the limits changed.
    pub(crate) event: Arc<EventFd>,
}

#[derive(Debug, Default)]
struct SlotState {
    /// The handle while no task uses it.
    parked: Option<Box<BackendHandle>>,
    /// The handle to swap to.
    pending: Option<PendingSwap>,
}

/// The part of a disk that one task uses.
#[derive(Debug)]
pub(crate) struct BackendHandle {
    pub(crate) queue: DiskQueue,
    /// Size of the disk in bytes.
    pub(crate) size: u64,
}

#[derive(Debug)]
pub(crate) struct PendingSwap {
    pub(crate) handle: Box<BackendHandle>,
    /// Takes the old handle.
    pub(crate) old: SyncSender<Box<BackendHandle>>,
}

/// A swap of the disk of a device, which lasts until the old disk has no requests in flight.
#[derive(Debug)]
#[must_use = "the old disk is in use until it was waited for"]
pub struct DiskSwap {
    old: Vec<Receiver<Box<BackendHandle>>>,
    /// Last, so that the old disk is closed on the thread that waits.
    _disk: Disk,
}

/// The old disk still has requests in flight.
#[derive(Debug, thiserror::Error)]
#[error("the old disk still has requests in flight after {waited:?}")]
pub struct StillInUse {
    /// How long the caller has waited.
    pub waited: Duration,
}

impl BackendSlot {
    pub(crate) fn new(handle: BackendHandle) -> Result<Arc<Self>, BlockError> {
        let event = Arc::new(EventFd::new().map_err(BlockError::Event)?);
        handle.queue.set_waker(Arc::clone(&event));
        Ok(Arc::new(BackendSlot {
            state: Mutex::new(SlotState { parked: Some(Box::new(handle)), pending: None }),
            posted: AtomicBool::new(false),
            event,
        }))
    }

    /// Gives the slot a handle of another disk. It takes effect at once if the old one is parked,
    /// else when the task has nothing in flight. The receiver gets the old handle.
    pub(crate) fn post(&self, handle: BackendHandle) -> Receiver<Box<BackendHandle>> {
        handle.queue.set_waker(Arc::clone(&self.event));
        let handle = Box::new(handle);
        let (old, receiver) = mpsc::sync_channel(1);
        let mut state = locked(&self.state);
        let unused = if let Some(parked) = &mut state.parked {
            // The channel holds one message, so this cannot fail.
            let _ = old.send(std::mem::replace(parked, handle));
            None
        } else {
            let unused = state.pending.replace(PendingSwap { handle, old });
            self.posted.store(true, Ordering::Release);
            unused
        };
        drop(state);
        self.event.signal();
        if let Some(PendingSwap { handle, old }) = unused {
            // This handle was replaced before a task used it.
            let _ = old.send(handle);
        }
        receiver
    }

    /// Whether no task uses the handle.
    pub(crate) fn is_parked(&self) -> bool {
        locked(&self.state).parked.is_some()
    }

    /// Takes the parked handle out.
    pub(crate) fn take(&self) -> Option<Box<BackendHandle>> {
        locked(&self.state).parked.take()
    }

    /// Takes the handle that was posted.
    pub(crate) fn take_pending(&self) -> Option<PendingSwap> {
        if !self.posted.swap(false, Ordering::AcqRel) {
            return None;
        }
        locked(&self.state).pending.take()
    }

    /// Parks the handle. A handle that was posted meanwhile replaces it.
    pub(crate) fn park(&self, handle: Box<BackendHandle>, pending: Option<PendingSwap>) {
        let mut state = locked(&self.state);
        let later = state.pending.take();
        self.posted.store(false, Ordering::Release);
        let mut handle = handle;
        for PendingSwap { handle: new, old } in pending.into_iter().chain(later) {
            let _ = old.send(std::mem::replace(&mut handle, new));
        }
        state.parked = Some(handle);
    }
}

impl DiskSwap {
    pub(crate) fn new(disk: Disk, old: Vec<Receiver<Box<BackendHandle>>>) -> Self {
        DiskSwap { old, _disk: disk }
    }

    /// Waits at most `timeout`, which may be 0, until nothing uses the old disk. The old disk is
    /// closed when this is dropped.
    pub fn wait(&mut self, timeout: Duration) -> Result<(), StillInUse> {
        let start = Instant::now();
        while let Some(old) = self.old.last() {
            let left = timeout.saturating_sub(start.elapsed());
            if let Err(RecvTimeoutError::Timeout) = old.recv_timeout(left) {
                return Err(StillInUse { waited: start.elapsed() });
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
