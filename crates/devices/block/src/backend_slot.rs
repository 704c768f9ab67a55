//! What one task needs of a disk, and how it is given another.
//!
//! There are as many lanes as the drive has I/O threads, and the virtqueues are dealt out to them in turn. A lane is made with the
//! device, so that activating it makes nothing and cannot fail for want of anything. While its task is not at work (the
//! device is not active, is being reset, or is paused), the lane's part of the disk is parked here, and that of a new disk takes its
//! place at once. While the task is at work, the new part is posted: the task finishes what it has in flight, takes nothing new
//! meanwhile, changes over, and hands the old part back to [`DiskSwap`].

use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc::{self, Receiver, RecvTimeoutError, SyncSender};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use crate::disk::Disk;
use crate::disk::backlog::Backlog;
use crate::disk::queue::DiskQueue;
use crate::engine::Patience;
use crate::error::BlockError;
use sync::EventFd;
use sync::locked;

/// What one task needs of the disk, and how it is told that this changes.
#[derive(Debug)]
pub(crate) struct Lane {
    slot: Mutex<Slot>,
    /// Whether `slot.next` is there: spares the lock where it is not.
    posted: AtomicBool,
    /// Wakes the task: something was posted, or limits changed.
    pub(crate) event: Arc<EventFd>,
}

#[derive(Debug, Default)]
struct Slot {
    /// The lane's part of the disk while no task works with it.
    parked: Option<Box<Part>>,
    /// What the task is to change over to.
    next: Option<Next>,
}

/// A lane's part of a disk.
#[derive(Debug)]
pub(crate) struct Part {
    pub(crate) queue: DiskQueue,
    /// Size of the disk in bytes.
    pub(crate) size: u64,
}

#[derive(Debug)]
pub(crate) struct Next {
    pub(crate) part: Box<Part>,
    /// Where the old part goes.
    pub(crate) old: SyncSender<Box<Part>>,
}

/// A disk that is being replaced.
#[derive(Debug)]
#[must_use = "the old disk is in use until it was waited for"]
pub struct DiskSwap {
    old: Vec<Receiver<Box<Part>>>,
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

impl Lane {
    pub(crate) fn new(part: Part) -> Result<Arc<Self>, BlockError> {
        let event = Arc::new(EventFd::new().map_err(BlockError::Event)?);
        part.queue.set_waker(Arc::clone(&event));
        Ok(Arc::new(Lane {
            slot: Mutex::new(Slot { parked: Some(Box::new(part)), next: None }),
            posted: AtomicBool::new(false),
            event,
        }))
    }

    /// Gives the lane another part of a disk: at once if it is parked, else as soon as its task gets to it.
    pub(crate) fn post(&self, part: Part) -> Receiver<Box<Part>> {
        part.queue.set_waker(Arc::clone(&self.event));
        let part = Box::new(part);
        let (old, receiver) = mpsc::sync_channel(1);
        let mut slot = locked(&self.slot);
        let unused = if let Some(parked) = &mut slot.parked {
            // There is room for one: it cannot fail.
            let _ = old.send(std::mem::replace(parked, part));
            None
        } else {
            let unused = slot.next.replace(Next { part, old });
            self.posted.store(true, Ordering::Release);
            unused
        };
        drop(slot);
        self.event.signal();
        if let Some(Next { part, old }) = unused {
            // Replaced before it was ever used.
            let _ = old.send(part);
        }
        receiver
    }

    /// Whether no task works with the lane's part of the disk.
    pub(crate) fn is_parked(&self) -> bool {
        locked(&self.slot).parked.is_some()
    }

    /// Takes the lane's part of the disk out.
    pub(crate) fn take(&self) -> Option<Box<Part>> {
        locked(&self.slot).parked.take()
    }

    /// What the task is to change over to.
    pub(crate) fn take_next(&self) -> Option<Next> {
        if !self.posted.swap(false, Ordering::AcqRel) {
            return None;
        }
        locked(&self.slot).next.take()
    }

    /// Parks the lane; what was posted meanwhile takes effect.
    pub(crate) fn park(&self, part: Box<Part>, next: Option<Next>) {
        let mut slot = locked(&self.slot);
        let later = slot.next.take();
        self.posted.store(false, Ordering::Release);
        let mut part = part;
        for Next { part: new, old } in next.into_iter().chain(later) {
            let _ = old.send(std::mem::replace(&mut part, new));
        }
        slot.parked = Some(part);
    }
}

impl DiskSwap {
    pub(crate) fn new(disk: Disk, old: Vec<Receiver<Box<Part>>>) -> Self {
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

/// One part of `disk` for each lane.
pub(crate) fn parts(disk: &Disk, id: &str, lanes: u16, patience: Patience) -> Result<Vec<Part>, BlockError> {
    if disk.has_overlay() && lanes > 1 {
        return Err(BlockError::OverlayThreads { id: id.into(), threads: lanes });
    }
    let named = |source| BlockError::Disk { id: id.into(), source };
    let backlog = Backlog::new(lanes.into());
    let part = |lane: u16| {
        let queue = disk.queue(patience).map_err(named)?.with_backlog(Arc::clone(&backlog), lane.into());
        Ok(Part { queue, size: disk.size() })
    };
    (0..lanes).map(part).collect()
}
