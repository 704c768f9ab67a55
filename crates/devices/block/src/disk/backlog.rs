//! Bounds what a disk still has to move before its device can be paused or reset.
//!
//! A pause waits for every request in flight, and a flush in flight waits for all dirty pages of
//! the disk's file. So both are counted together, for all queues (I/O threads) of one disk:
//!
//! - *in flight*: bytes of requests that were taken and are not complete;
//! - *dirty*: bytes of pages that were written and that no completed sync covers. A page counts
//!   once, however often it was written. Only disks whose flushes wait for the disk have dirty
//!   bytes.
//!
//! # Bounds
//!
//! - A request is taken if the sum stays within the window, or if there is nothing else. Reads may
//!   exceed the window by [`READ_EXTRA`]. Requests in flight alone have at most
//!   [`MAX_IN_FLIGHT_BYTES`].
//! - Each [`WRITE_BACK_STEP`] of new dirty bytes starts write-back, so that little is left for a
//!   flush if the disk keeps up with the guest.
//! - If it does not, dirty bytes above half of the window start a sync without a flush of the
//!   guest.
//! - The window is [`MIN_WINDOW`], or what the disk has recently moved in [`DRAIN_TIME`], up to
//!   [`MAX_WINDOW`]. The rate is a lower bound: it counts only distinct pages that the disk did
//!   write, so rewriting one page does not make a slow disk look fast.
//!
//! # Syncs
//!
//! At most one sync of a disk runs at a time, of any of its queues. Flushes that come meanwhile
//! share the next one. The kernel reports a write-back error once per open file: with one sync at a
//! time, the sync that gets the report is the one whose flushes fail. A failed sync fails all
//! waiting flushes. Later ones fail because the disk's [health](crate::host_file::health) is lost.

use std::sync::atomic::{AtomicBool, AtomicU64, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex};

use rustix::io::Errno;

use crate::io_request::Token;
use sync::EventFd;
use sync::locked;
use virtio::worker::{Nanos, monotonic};

/// Most bytes of requests in flight.
pub(crate) const MAX_IN_FLIGHT_BYTES: u64 = 64 << 20;
/// Smallest window, in bytes. A disk of 10 MB/s drains it in 7 seconds (9 with [`READ_EXTRA`]).
pub(crate) const MIN_WINDOW: u64 = 64 << 20;
/// Largest window, in bytes.
pub(crate) const MAX_WINDOW: u64 = 1 << 30;
/// Bytes by which reads may exceed the window, so that they do not wait for what was written. A
/// disk of 10 MB/s needs 1.7 seconds for them.
pub(crate) const READ_EXTRA: u64 = 16 << 20;
/// New dirty bytes that start write-back.
pub(crate) const WRITE_BACK_STEP: u64 = 4 << 20;
/// Time that the disk may take to drain a window, in nanoseconds.
const DRAIN_TIME: Nanos = 5_000_000_000;
/// Least distinct bytes of a sync for its rate to be used.
const MIN_SAMPLE: u64 = 8 << 20;

/// Bytes of a page of the page cache, which the smallest write makes dirty.
const PAGE: u64 = 4096;

/// What all queues of one disk share; see the module.
#[derive(Debug)]
pub(crate) struct Backlog {
    in_flight: AtomicU64,
    dirty: AtomicU64,
    window: AtomicU64,
    /// Dirty bytes since write-back was last started.
    not_written_back: AtomicU64,
    /// Whether a queue waits for space in the window; spares the lock where none does.
    waiting: AtomicBool,
    /// Whether flushes wait for the next sync, and how many completed flushes are unclaimed. Both
    /// spare the lock.
    flush_waiting: AtomicBool,
    unclaimed: AtomicUsize,
    /// Number of syncs that were started, plus 1, so that a new [`DistinctPages`] matches none.
    generation: AtomicU64,
    shared: Mutex<Shared>,
    clock: fn() -> Nanos,
}

#[derive(Debug, Default)]
struct Shared {
    queues: Vec<QueueState>,
    running: Option<RunningSync>,
    /// Flushes that the next sync is for.
    waiting_flushes: Vec<(usize, Token)>,
}

/// State of one queue of the disk.
#[derive(Debug, Default)]
struct QueueState {
    /// Flushes that are complete.
    finished: Vec<(Token, Result<(), Errno>)>,
    /// Wakes the task of the queue.
    waker: Option<Arc<EventFd>>,
    is_waiting: bool,
}

/// The sync that runs.
#[derive(Debug)]
struct RunningSync {
    flushes: Vec<(usize, Token)>,
    /// Dirty bytes that it covers.
    bytes: u64,
}

impl Backlog {
    /// A backlog of a disk with this number of queues.
    pub(crate) fn new(queues: usize) -> Arc<Self> {
        Self::with_clock(queues, monotonic)
    }

    pub(crate) fn with_clock(queues: usize, clock: fn() -> Nanos) -> Arc<Self> {
        let queues = (0..queues).map(|_| QueueState::default()).collect();
        Arc::new(Backlog {
            in_flight: AtomicU64::new(0),
            dirty: AtomicU64::new(0),
            window: AtomicU64::new(MIN_WINDOW),
            not_written_back: AtomicU64::new(0),
            waiting: AtomicBool::new(false),
            flush_waiting: AtomicBool::new(false),
            unclaimed: AtomicUsize::new(0),
            generation: AtomicU64::new(1),
            shared: Mutex::new(Shared { queues, ..Shared::default() }),
            clock,
        })
    }

    /// Sets the event that wakes the task of `queue`.
    pub(crate) fn set_waker(&self, queue: usize, waker: Arc<EventFd>) {
        locked(&self.shared).queues[queue].waker = Some(waker);
    }

    /// Reserves `bytes` for a request, which may exceed the window by `extra`. If it does not fit,
    /// returns false, and `queue` is woken when it may.
    pub(crate) fn reserve(&self, queue: usize, bytes: u64, extra: u64) -> bool {
        if self.try_reserve(bytes, extra) {
            return true;
        }
        locked(&self.shared).queues[queue].is_waiting = true;
        self.waiting.store(true, Ordering::SeqCst);
        // Bytes that were released before the flag was set woke no queue.
        self.try_reserve(bytes, extra)
    }

    fn try_reserve(&self, bytes: u64, extra: u64) -> bool {
        let window = self.window.load(Ordering::Relaxed) + extra;
        let fits = |in_flight: u64| {
            // Loaded after the requests in flight: one that completes in between counts twice, not
            // never.
            let dirty = self.dirty.load(Ordering::SeqCst);
            let alone = in_flight == 0 || in_flight + bytes <= MAX_IN_FLIGHT_BYTES;
            let together = in_flight + dirty == 0 || in_flight + dirty + bytes <= window;
            (bytes == 0 || (alone && together)).then_some(in_flight + bytes)
        };
        self.in_flight.fetch_update(Ordering::SeqCst, Ordering::SeqCst, fits).is_ok()
    }

    /// Releases the bytes of a request that is complete.
    pub(crate) fn release(&self, queue: usize, bytes: u64) {
        if bytes > 0 {
            self.in_flight.fetch_sub(bytes, Ordering::SeqCst);
            self.wake_waiting(queue);
        }
    }

    /// Wakes the queues that wait, except `queue`, which checks by itself.
    fn wake_waiting(&self, queue: usize) {
        if !self.waiting.swap(false, Ordering::SeqCst) {
            return;
        }
        for (index, other) in locked(&self.shared).queues.iter_mut().enumerate() {
            if std::mem::take(&mut other.is_waiting)
                && index != queue
                && let Some(waker) = &other.waker
            {
                waker.signal();
            }
        }
    }

    /// Counts `bytes` that were written. True if the caller is to start write-back.
    pub(crate) fn add_dirty(&self, bytes: u64) -> bool {
        self.dirty.fetch_add(bytes, Ordering::SeqCst);
        let not_written_back = self.not_written_back.fetch_add(bytes, Ordering::Relaxed) + bytes;
        // Only one of several callers gets the whole step.
        not_written_back >= WRITE_BACK_STEP
            && self.not_written_back.swap(0, Ordering::Relaxed) >= WRITE_BACK_STEP
    }

    /// Whether a sync is due although no flush waits. `blocked_bytes` is the size of a request that
    /// does not fit in the window.
    fn is_sync_due(&self, blocked_bytes: u64) -> bool {
        let (dirty, window) = (self.dirty.load(Ordering::SeqCst), self.window.load(Ordering::Relaxed));
        dirty > window / 2 || (blocked_bytes > 0 && dirty > 0 && dirty + blocked_bytes > window)
    }

    /// Adds a flush of the guest. The next sync completes it; see [`finished`](Self::finished).
    pub(crate) fn flush(&self, queue: usize, token: Token) {
        locked(&self.shared).waiting_flushes.push((queue, token));
        self.flush_waiting.store(true, Ordering::SeqCst);
    }

    /// Whether the caller is to start a sync now, for all queues. If so, it reports the result to
    /// [`sync_ended`](Self::sync_ended).
    pub(crate) fn begin_sync(&self, blocked_bytes: u64) -> bool {
        if !self.flush_waiting.load(Ordering::SeqCst) && !self.is_sync_due(blocked_bytes) {
            return false;
        }
        let mut shared = locked(&self.shared);
        if shared.running.is_some() || (shared.waiting_flushes.is_empty() && !self.is_sync_due(blocked_bytes))
        {
            return false;
        }
        self.flush_waiting.store(false, Ordering::SeqCst);
        let flushes = std::mem::take(&mut shared.waiting_flushes);
        // Before the count, so that what is written from now on counts again.
        self.generation.fetch_add(1, Ordering::SeqCst);
        // These bytes were written before the sync starts, by any queue.
        shared.running = Some(RunningSync { flushes, bytes: self.dirty.load(Ordering::SeqCst) });
        true
    }

    /// Takes the result of the sync that `queue` started.
    pub(crate) fn sync_ended(&self, queue: usize, result: Result<(), Errno>) {
        let mut shared = locked(&self.shared);
        let Some(RunningSync { flushes, bytes }) = shared.running.take() else { return };
        // Bytes of a failed sync are not dirty either: the kernel does not write them again.
        self.dirty.fetch_sub(bytes, Ordering::SeqCst);
        let mut flushes = flushes;
        if result.is_err() {
            // What these flushes cover may be what failed.
            flushes.append(&mut shared.waiting_flushes);
            self.flush_waiting.store(false, Ordering::SeqCst);
        }
        self.unclaimed.fetch_add(flushes.len(), Ordering::SeqCst);
        for (whose, token) in flushes {
            let one = &mut shared.queues[whose];
            one.finished.push((token, result));
            if whose != queue
                && let Some(waker) = &one.waker
            {
                waker.signal();
            }
        }
        drop(shared);
        self.wake_waiting(queue);
    }

    /// Takes the completed flushes of `queue`.
    pub(crate) fn finished(&self, queue: usize, to: &mut impl Extend<(Token, Result<(), Errno>)>) {
        if self.unclaimed.load(Ordering::SeqCst) > 0 {
            let finished = std::mem::take(&mut locked(&self.shared).queues[queue].finished);
            self.unclaimed.fetch_sub(finished.len(), Ordering::SeqCst);
            to.extend(finished);
        }
    }

    /// Adjusts the window: the disk has moved at least `bytes` since `begin`.
    fn update_window(&self, bytes: u64, begin: Nanos) {
        let elapsed = (self.clock)().saturating_sub(begin);
        if bytes >= MIN_SAMPLE && elapsed > 0 {
            let window = u128::from(bytes) * u128::from(DRAIN_TIME) / u128::from(elapsed);
            let window = u64::try_from(window).unwrap_or(MAX_WINDOW).clamp(MIN_WINDOW, MAX_WINDOW);
            self.window.store(window, Ordering::Relaxed);
        }
    }

    #[cfg(test)]
    pub(crate) fn total(&self) -> u64 {
        self.in_flight.load(Ordering::SeqCst) + self.dirty.load(Ordering::SeqCst)
    }
}

/// Bytes that become dirty in the page cache by a write of `len` bytes at `offset` of a file.
pub(crate) fn dirtied(offset: u64, len: u64) -> u64 {
    (offset + len).next_multiple_of(PAGE) - offset / PAGE * PAGE
}

/// The pages that one queue has written since a sync of the disk last began. A page counts once,
/// however often it is written.
///
/// It is a direct-mapped table: a block of 64 pages has one place, which it shares with blocks at
/// multiples of 1 GiB from it. A block that was evicted counts again. So dirty bytes are never
/// undercounted. The bytes that the disk's rate is measured by are never overcounted.
#[derive(Debug, Default)]
pub(crate) struct DistinctPages {
    /// Empty until the first write.
    blocks: Vec<Block>,
    /// The [`Backlog::generation`] of the pages in the table.
    generation: u64,
    /// Pages in the table.
    count: u64,
    begin: Nanos,
    /// Bytes and start time of the sync that runs.
    syncing: Option<(u64, Nanos)>,
}

/// The pages of one block of 64.
#[derive(Debug, Default, Clone)]
struct Block {
    /// Number of the block, and the generation.
    tag: (u64, u64),
    bits: u64,
}

impl DistinctPages {
    const BLOCKS: u64 = MAX_WINDOW / PAGE / 64;

    /// Marks the pages of `len` bytes at `offset`. `len` is not 0. Returns how many bytes became
    /// dirty.
    pub(crate) fn mark(&mut self, offset: u64, len: u64, backlog: &Backlog) -> u64 {
        if self.blocks.is_empty() {
            self.blocks = vec![Block::default(); Self::BLOCKS as usize];
        }
        let generation = backlog.generation.load(Ordering::SeqCst);
        if self.generation != generation {
            (self.generation, self.count, self.begin) = (generation, 0, (backlog.clock)());
        }
        let (first, last) = (offset / PAGE, (offset + len - 1) / PAGE);
        let mut fresh = 0;
        for number in first / 64..=last / 64 {
            let from = first.max(number * 64) % 64;
            let to = last.min(number * 64 + 63) % 64;
            let bits = (u64::MAX >> (63 - (to - from))) << from;
            let block = &mut self.blocks[(number % Self::BLOCKS) as usize];
            if block.tag != (number, generation) {
                if block.tag.1 == generation {
                    self.count -= u64::from(block.bits.count_ones());
                }
                *block = Block { tag: (number, generation), bits: 0 };
            }
            let new = u64::from((bits & !block.bits).count_ones());
            block.bits |= bits;
            self.count += new;
            fresh += new;
        }
        fresh * PAGE
    }

    /// Starts to measure a sync of this queue: it moves the pages marked since the one before.
    pub(crate) fn sync_begins(&mut self, backlog: &Backlog) {
        // The start of the sync began a generation.
        let noted = self.generation.wrapping_add(1) == backlog.generation.load(Ordering::SeqCst);
        self.syncing = noted.then_some((self.count * PAGE, self.begin));
    }

    /// Ends the measurement of a sync that succeeded.
    pub(crate) fn sync_succeeded(&mut self, backlog: &Backlog) {
        if let Some((bytes, begin)) = self.syncing.take() {
            backlog.update_window(bytes, begin);
        }
    }
}

#[cfg(test)]
mod tests {
    use std::cell::Cell;

    use super::*;

    const MIB: u64 = 1 << 20;
    const SECOND: Nanos = 1_000_000_000;

    thread_local! {
        static NOW: Cell<Nanos> = const { Cell::new(0) };
    }

    fn window_after(pages: &mut DistinctPages, backlog: &Backlog, seconds: Nanos) -> u64 {
        backlog.generation.fetch_add(1, Ordering::SeqCst);
        pages.sync_begins(backlog);
        NOW.set(NOW.get() + seconds * SECOND);
        pages.sync_succeeded(backlog);
        backlog.window.load(Ordering::Relaxed)
    }

    #[test]
    fn window_follows_the_rate_of_the_disk() {
        let backlog = Backlog::with_clock(1, || NOW.get());
        let mut pages = DistinctPages::default();
        pages.mark(0, 32 * MIB, &backlog);
        assert_eq!(window_after(&mut pages, &backlog, 1), 160 * MIB);
        // One page, rewritten, says nothing about the rate.
        for _ in 0..10_000 {
            pages.mark(0, PAGE, &backlog);
        }
        assert_eq!(window_after(&mut pages, &backlog, 1), 160 * MIB);
        pages.mark(5, 32 * MIB, &backlog);
        assert_eq!(window_after(&mut pages, &backlog, 3), MIN_WINDOW);
        pages.mark(0, 900 * MIB, &backlog);
        assert_eq!(window_after(&mut pages, &backlog, 1), MAX_WINDOW);
    }

    #[test]
    fn page_counts_once_until_a_sync_begins() {
        let backlog = Backlog::new(1);
        let mut pages = DistinctPages::default();
        assert_eq!(pages.mark(0, 512, &backlog), PAGE);
        assert_eq!(pages.mark(4095, 2, &backlog), PAGE);
        assert_eq!(pages.mark(0, MIB, &backlog), MIB - 2 * PAGE);
        assert_eq!(pages.mark(512, MIB - 512, &backlog), 0);
        assert_eq!(pages.mark(63 * PAGE, 2 * PAGE, &backlog), 0);
        // It evicts another block, which then counts again.
        assert_eq!(pages.mark(MAX_WINDOW, PAGE, &backlog), PAGE);
        assert_eq!(pages.count, (MIB / PAGE) - 64 + 1);
        assert_eq!(pages.mark(0, PAGE, &backlog), PAGE);
        backlog.flush(0, 1);
        assert!(backlog.begin_sync(0));
        assert_eq!(pages.mark(0, MIB, &backlog), MIB);
    }

    #[test]
    fn dirty_bytes_are_whole_pages() {
        assert_eq!(dirtied(0, 512), 4096);
        assert_eq!(dirtied(4095, 2), 8192);
        assert_eq!(dirtied(4096, 4096), 4096);
    }

    #[test]
    fn waiting_queue_is_woken_when_bytes_are_released() {
        let backlog = Backlog::new(2);
        let waker = Arc::new(EventFd::new().unwrap());
        backlog.set_waker(1, Arc::clone(&waker));
        assert!(backlog.reserve(0, 60 * MIB, 0));
        assert!(!backlog.reserve(1, 5 * MIB, 0));
        assert!(backlog.reserve(1, 4 * MIB, 0));
        assert!(backlog.reserve(1, 0, 0), "a flush needs no bytes of the window");
        backlog.release(0, 60 * MIB);
        assert_eq!(waker.take(), 1);
        assert!(backlog.reserve(1, 5 * MIB, 0));
    }

    #[test]
    fn failed_sync_fails_all_waiting_flushes() {
        let backlog = Backlog::new(2);
        let finished = |queue| {
            let mut finished = Vec::new();
            backlog.finished(queue, &mut finished);
            finished
        };
        backlog.add_dirty(40 * MIB);
        assert!(backlog.begin_sync(0) && !backlog.begin_sync(0));
        backlog.flush(1, 7);
        assert!(!backlog.begin_sync(0), "one at a time");
        backlog.sync_ended(0, Err(Errno::IO));
        assert_eq!(backlog.total(), 0);
        assert_eq!(finished(1), [(7, Err(Errno::IO))]);
        backlog.flush(0, 8);
        assert!(backlog.begin_sync(0));
        backlog.sync_ended(1, Ok(()));
        assert_eq!((finished(0), finished(1)), (vec![(8, Ok(()))], vec![]));
    }
}
