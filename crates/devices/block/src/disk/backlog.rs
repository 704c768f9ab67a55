//! Bounds what a disk still has to move before its device can be paused or reset.
//!
//! A pause waits for every request in flight, and a flush in flight waits for all dirty pages of the disk's file. So both are counted
//! together, for all queues (I/O threads) of one disk:
//!
//! - *in flight*: bytes of requests that the device has taken and not answered;
//! - *dirty*: pages that were written and that no completed sync covers, each once however often it was written. Only disks whose
//!   flushes wait for the disk have any.
//!
//! # Bounds
//!
//! - A request is taken if the sum stays within the window, or if there is nothing else. Reads may exceed the window by [`READ_EXTRA`]. Requests in flight alone have at most
//!   [`IN_FLIGHT`] bytes.
//! - Each [`STEP`] of new dirty bytes starts write-back, so that little is left for a flush where the disk keeps up with the guest.
//! - Where it does not, dirty bytes above half of the window start a sync of the backlog's own.
//! - The window is [`FLOOR`], or what the disk has lately moved in [`DRAIN`], up to [`CEILING`]. The rate is a lower bound: it counts only
//!   distinct pages that the disk did write. So rewriting one page does not make a slow disk look fast.
//!
//! # Syncs
//!
//! At most one sync of a disk runs at a time, of whichever queue. Flushes that come meanwhile share the next one. The kernel reports
//! a write-back error once per open file: with one sync at a time, the sync that gets the report is the one whose flushes get it.
//! A failed sync fails all flushes that wait, and the next flush where none does.

use std::sync::atomic::{AtomicBool, AtomicU64, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex};

use rustix::io::Errno;

use crate::io_request::Token;
use sync::EventFd;
use sync::locked;
use virtio::worker::{Nanos, monotonic};

/// Most bytes of requests in flight.
pub(crate) const IN_FLIGHT: u64 = 64 << 20;
/// Smallest window, in bytes: a disk that moves 10 MB/s drains it in 7 seconds (9 with [`READ_EXTRA`]).
pub(crate) const FLOOR: u64 = 64 << 20;
/// Largest window, in bytes.
pub(crate) const CEILING: u64 = 1 << 30;
/// What reads may exceed the window by, in bytes: they do not wait for what was written. A disk that
/// moves 10 MB/s needs 1.7 seconds for it.
pub(crate) const READ_EXTRA: u64 = 16 << 20;
/// New dirty bytes that start write-back.
pub(crate) const STEP: u64 = 4 << 20;
/// How long the disk may take for a window, in nanoseconds.
const DRAIN: Nanos = 5_000_000_000;
/// Least distinct bytes of one sync that tell how fast the disk is.
const SAMPLE: u64 = 8 << 20;

/// Bytes of a page of the page cache: what the smallest write makes dirty.
const PAGE: u64 = 4096;

/// What all queues of one disk share. See the module.
#[derive(Debug)]
pub(crate) struct Backlog {
    in_flight: AtomicU64,
    dirty: AtomicU64,
    window: AtomicU64,
    /// Dirty bytes since write-back was last started.
    unstarted: AtomicU64,
    /// Whether a member waits for room: spares the lock where none does.
    waiting: AtomicBool,
    /// Whether flushes wait for the next sync, and how many answers of flushes are to be taken: they spare the lock, too.
    asked: AtomicBool,
    answers: AtomicUsize,
    /// Counts the syncs that began; from 1, so that no page of a new table seems to be noted.
    generation: AtomicU64,
    shared: Mutex<Shared>,
    clock: fn() -> Nanos,
}

#[derive(Debug, Default)]
struct Shared {
    members: Vec<Member>,
    running: Option<Running>,
    /// Flushes that the next sync is for.
    next: Vec<(usize, Token)>,
    /// Error of a sync that no flush has reported.
    unreported: Option<Errno>,
}

/// One queue of the disk.
#[derive(Debug, Default)]
struct Member {
    /// Flushes that are over.
    finished: Vec<(Token, Result<(), Errno>)>,
    /// Wakes the task of the queue.
    waker: Option<Arc<EventFd>>,
    waits_for_room: bool,
}

/// The sync that runs.
#[derive(Debug)]
struct Running {
    flushes: Vec<(usize, Token)>,
    /// Dirty bytes that it covers.
    bytes: u64,
}

impl Backlog {
    /// A backlog of a disk with so many queues.
    pub(crate) fn new(members: usize) -> Arc<Self> {
        Self::with_clock(members, monotonic)
    }

    pub(crate) fn with_clock(members: usize, clock: fn() -> Nanos) -> Arc<Self> {
        let members = (0..members).map(|_| Member::default()).collect();
        Arc::new(Backlog {
            in_flight: AtomicU64::new(0),
            dirty: AtomicU64::new(0),
            window: AtomicU64::new(FLOOR),
            unstarted: AtomicU64::new(0),
            waiting: AtomicBool::new(false),
            asked: AtomicBool::new(false),
            answers: AtomicUsize::new(0),
            generation: AtomicU64::new(1),
            shared: Mutex::new(Shared { members, ..Shared::default() }),
            clock,
        })
    }

    /// Wakes `member` with this event from now on.
    pub(crate) fn set_waker(&self, member: usize, waker: Arc<EventFd>) {
        locked(&self.shared).members[member].waker = Some(waker);
    }

    /// Takes room for a request of `bytes`, which may exceed the window by `extra`. False if there is none: `member` is woken when there
    /// may be.
    pub(crate) fn reserve(&self, member: usize, bytes: u64, extra: u64) -> bool {
        if self.try_reserve(bytes, extra) {
            return true;
        }
        locked(&self.shared).members[member].waits_for_room = true;
        self.waiting.store(true, Ordering::SeqCst);
        // Room that came before the flag was seen woke no one.
        self.try_reserve(bytes, extra)
    }

    fn try_reserve(&self, bytes: u64, extra: u64) -> bool {
        let window = self.window.load(Ordering::Relaxed) + extra;
        let fits = |in_flight: u64| {
            // After the requests in flight: one that ends in between counts twice, and not never.
            let dirty = self.dirty.load(Ordering::SeqCst);
            let alone = in_flight == 0 || in_flight + bytes <= IN_FLIGHT;
            let together = in_flight + dirty == 0 || in_flight + dirty + bytes <= window;
            (bytes == 0 || (alone && together)).then_some(in_flight + bytes)
        };
        self.in_flight.fetch_update(Ordering::SeqCst, Ordering::SeqCst, fits).is_ok()
    }

    /// Gives back the room of a request that is over.
    pub(crate) fn release(&self, member: usize, bytes: u64) {
        if bytes > 0 {
            self.in_flight.fetch_sub(bytes, Ordering::SeqCst);
            self.wake_waiting(member);
        }
    }

    /// Wakes the members that wait for room, but for `member`, which looks by itself.
    fn wake_waiting(&self, member: usize) {
        if !self.waiting.swap(false, Ordering::SeqCst) {
            return;
        }
        for (index, other) in locked(&self.shared).members.iter_mut().enumerate() {
            if std::mem::take(&mut other.waits_for_room)
                && index != member
                && let Some(waker) = &other.waker
            {
                waker.signal();
            }
        }
    }

    /// Counts `bytes` that were written. True if write-back is to be started.
    pub(crate) fn add_dirty(&self, bytes: u64) -> bool {
        self.dirty.fetch_add(bytes, Ordering::SeqCst);
        let unstarted = self.unstarted.fetch_add(bytes, Ordering::Relaxed) + bytes;
        // One of those who see it gets the whole step.
        unstarted >= STEP && self.unstarted.swap(0, Ordering::Relaxed) >= STEP
    }

    /// Whether a sync is due although no flush asks for it. `held` is the size of a request that waits for room.
    fn is_sync_due(&self, held: u64) -> bool {
        let (dirty, window) = (self.dirty.load(Ordering::SeqCst), self.window.load(Ordering::Relaxed));
        dirty > window / 2 || (held > 0 && dirty > 0 && dirty + held > window)
    }

    /// A flush of the driver: the next sync answers it. Its answer comes with [`finished`](Self::finished).
    pub(crate) fn flush(&self, member: usize, token: Token) {
        let mut shared = locked(&self.shared);
        match shared.unreported.take() {
            Some(errno) => {
                shared.members[member].finished.push((token, Err(errno)));
                self.answers.fetch_add(1, Ordering::SeqCst);
            }
            None => {
                shared.next.push((member, token));
                self.asked.store(true, Ordering::SeqCst);
            }
        }
    }

    /// Whether the caller is to start a sync now, on behalf of all; then it says with [`sync_ended`](Self::sync_ended) how that went.
    pub(crate) fn begin_sync(&self, held: u64) -> bool {
        if !self.asked.load(Ordering::SeqCst) && !self.is_sync_due(held) {
            return false;
        }
        let mut shared = locked(&self.shared);
        if shared.running.is_some() || (shared.next.is_empty() && !self.is_sync_due(held)) {
            return false;
        }
        self.asked.store(false, Ordering::SeqCst);
        let flushes = std::mem::take(&mut shared.next);
        // Before the count: what is written from now on counts anew.
        self.generation.fetch_add(1, Ordering::SeqCst);
        // Written by now, whoever did: the sync begins later.
        shared.running = Some(Running { flushes, bytes: self.dirty.load(Ordering::SeqCst) });
        true
    }

    /// The sync that `member` started is over.
    pub(crate) fn sync_ended(&self, member: usize, result: Result<(), Errno>) {
        let mut shared = locked(&self.shared);
        let Some(Running { flushes, bytes }) = shared.running.take() else { return };
        // What failed is not dirty any more either: the kernel does not try again.
        self.dirty.fetch_sub(bytes, Ordering::SeqCst);
        let mut flushes = flushes;
        if let Err(errno) = result {
            // What they were to make durable may be what failed.
            flushes.append(&mut shared.next);
            self.asked.store(false, Ordering::SeqCst);
            if flushes.is_empty() {
                shared.unreported = Some(errno);
            }
        }
        self.answers.fetch_add(flushes.len(), Ordering::SeqCst);
        for (whose, token) in flushes {
            let one = &mut shared.members[whose];
            one.finished.push((token, result));
            if whose != member
                && let Some(waker) = &one.waker
            {
                waker.signal();
            }
        }
        drop(shared);
        self.wake_waiting(member);
    }

    /// Takes the flushes of `member` that are over.
    pub(crate) fn finished(&self, member: usize, to: &mut impl Extend<(Token, Result<(), Errno>)>) {
        if self.answers.load(Ordering::SeqCst) > 0 {
            let finished = std::mem::take(&mut locked(&self.shared).members[member].finished);
            self.answers.fetch_sub(finished.len(), Ordering::SeqCst);
            to.extend(finished);
        }
    }

    /// The disk has moved at least `bytes` since `begin`: the window follows.
    fn measured(&self, bytes: u64, begin: Nanos) {
        let elapsed = (self.clock)().saturating_sub(begin);
        if bytes >= SAMPLE && elapsed > 0 {
            let window = u128::from(bytes) * u128::from(DRAIN) / u128::from(elapsed);
            let window = u64::try_from(window).unwrap_or(CEILING).clamp(FLOOR, CEILING);
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

/// Knows which pages one queue has written since a sync of the disk last began, so that a page counts once however often it is written.
///
/// It is a table without chains: a block of 64 pages has one place, which it shares with blocks 1 GiB away. A block whose place was taken
/// counts anew. So the bytes that are counted as dirty are never too few, and those by which the disk's speed is measured never too many.
#[derive(Debug, Default)]
pub(crate) struct DistinctPages {
    /// Empty until the first write.
    blocks: Vec<Block>,
    /// [`Backlog::generation`] of what is noted here.
    generation: u64,
    /// Pages that are noted.
    count: u64,
    begin: Nanos,
    /// What the sync that runs covers.
    syncing: Option<(u64, Nanos)>,
}

/// 64 pages.
#[derive(Debug, Default, Clone)]
struct Block {
    /// Of what is noted: a number of the block and a generation.
    tag: (u64, u64),
    bits: u64,
}

impl DistinctPages {
    const BLOCKS: u64 = CEILING / PAGE / 64;

    /// Notes the pages of `len` bytes at `offset`; `len` is not 0. Returns how many bytes became dirty that were not.
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

    /// A sync that this queue starts has begun: what was noted since the one before is what it has to
    /// move.
    pub(crate) fn sync_begins(&mut self, backlog: &Backlog) {
        // The backlog began a generation with the sync.
        let noted = self.generation.wrapping_add(1) == backlog.generation.load(Ordering::SeqCst);
        self.syncing = noted.then_some((self.count * PAGE, self.begin));
    }

    /// It has succeeded.
    pub(crate) fn sync_succeeded(&mut self, backlog: &Backlog) {
        if let Some((bytes, begin)) = self.syncing.take() {
            backlog.measured(bytes, begin);
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
        // One page, rewritten: it tells nothing.
        for _ in 0..10_000 {
            pages.mark(0, PAGE, &backlog);
        }
        assert_eq!(window_after(&mut pages, &backlog, 1), 160 * MIB);
        pages.mark(5, 32 * MIB, &backlog);
        assert_eq!(window_after(&mut pages, &backlog, 3), FLOOR);
        pages.mark(0, 900 * MIB, &backlog);
        assert_eq!(window_after(&mut pages, &backlog, 1), CEILING);
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
        // It takes the place of another block, which then counts anew.
        assert_eq!(pages.mark(CEILING, PAGE, &backlog), PAGE);
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
    fn member_without_room_is_woken_when_there_is_some() {
        let backlog = Backlog::new(2);
        let waker = Arc::new(EventFd::new().unwrap());
        backlog.set_waker(1, Arc::clone(&waker));
        assert!(backlog.reserve(0, 60 * MIB, 0));
        assert!(!backlog.reserve(1, 5 * MIB, 0));
        assert!(backlog.reserve(1, 4 * MIB, 0));
        assert!(backlog.reserve(1, 0, 0), "a flush needs no room");
        backlog.release(0, 60 * MIB);
        assert_eq!(waker.take(), 1);
        assert!(backlog.reserve(1, 5 * MIB, 0));
    }

    #[test]
    fn error_of_a_sync_without_flushes_fails_the_next_flush() {
        let backlog = Backlog::new(2);
        let finished = |member| {
            let mut finished = Vec::new();
            backlog.finished(member, &mut finished);
            finished
        };
        backlog.add_dirty(40 * MIB);
        assert!(backlog.begin_sync(0) && !backlog.begin_sync(0));
        backlog.flush(1, 7);
        assert!(!backlog.begin_sync(0), "one at a time");
        backlog.sync_ended(0, Err(Errno::IO));
        assert_eq!(backlog.total(), 0);
        assert_eq!(finished(1), [(7, Err(Errno::IO))]);
        backlog.add_dirty(40 * MIB);
        assert!(backlog.begin_sync(0));
        backlog.sync_ended(0, Err(Errno::NOSPC));
        backlog.flush(1, 7);
        assert_eq!(finished(1), [(7, Err(Errno::NOSPC))]);
        backlog.flush(0, 8);
        assert!(backlog.begin_sync(0));
        backlog.sync_ended(1, Ok(()));
        assert_eq!((finished(0), finished(1)), (vec![(8, Ok(()))], vec![]));
    }
}
