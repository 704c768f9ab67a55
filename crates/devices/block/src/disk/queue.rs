//! Serves requests for a disk.
//!
//! # Contract
//!
//! - The caller has checked that a request lies within the disk, in whole sectors. Otherwise it
//!   fails with `EINVAL`; nothing panics.
//! - [`enqueue`](DiskQueue::enqueue) adds a request,
//!   [`submit_and_reap`](DiskQueue::submit_and_reap) starts and completes requests, and
//!   [`pop_completion`](DiskQueue::pop_completion) returns the results. None of them blocks, unless
//!   the queue was built with [`Blocking::Allowed`](crate::engine::Blocking). None takes long
//!   either: a request larger than [`PART`] is split, so that it cannot keep a worker to itself.
//! - [`event`](DiskQueue::event) is readable when `submit_and_reap` has something to complete.
//! - Requests in flight at the same time have no order. A flush covers the requests that were
//!   complete when it was enqueued.
//! - [`reserve`](DiskQueue::reserve) bounds what the disk still has to move
//!   ([`backlog`](crate::disk::backlog)).
//! - A discard is a hint. When the queue [drains](DiskQueue::set_draining), the rest of it is
//!   skipped.
//! - A completed request survives a kill of the monitor, on an overlay as well
//!   ([`commit`](crate::overlay::commit)).
//!
//! # Error model
//!
//! A request fails with an errno; others are not affected. `EIO` may mean that the file was
//! truncated. After a failed sync, of this queue or of anything else, flushes fail with `EIO` and
//! are not tried ([`health`](crate::host_file::health)).

use std::collections::VecDeque;
use std::os::fd::BorrowedFd;
use std::sync::Arc;

use memory::iovec::GuestIoVec;
use rustix::io::Errno;

use super::backlog::{Backlog, DistinctPages, READ_EXTRA, dirtied};
use super::buffer_pool::BufferPool;
use super::layered::LayeredDisk;
use super::split::{DISCARD_PART, PART, SplitKind, SplitRequest};
use crate::SECTOR;
use crate::creator_pid::CreatorPid;
use crate::engine::{Done, Engine, Transfer};
use crate::io_request::{Request, Tag, Token};
use crate::overlay::ActiveLayer;
use crate::overlay::commit::MapCommit;
use crate::overlay::flush::Flushes;
use crate::overlay::session::SessionStart;
use crate::slab::Slab;
use sync::EventFd;

/// Most bytes that a discard, or a write-zeroes by the file system, makes dirty: partial blocks at
/// the ends of the range, and metadata.
const RANGE_DIRTY: u64 = 64 << 10;
/// Most bytes of an overlay's two maps that a change of unallocated sectors makes dirty, for each
/// 16 MiB.
const MAP_DIRTY: u64 = 2 * 4096;
/// Token of a sync of the backlog, as a flush of the disk.
const SYNC: Token = Token::MAX;

/// Serves requests for one [`Disk`](super::Disk).
#[derive(Debug)]
pub struct DiskQueue {
    /// The first field, so that it is dropped first: its drop waits for what is in flight.
    engine: Box<dyn Engine<Tag>>,
    layers: Arc<LayeredDisk>,
    /// Whether flushes wait for the disk.
    flush: bool,
    backlog: Arc<Backlog>,
    /// Number of this queue in the backlog.
    queue_index: usize,
    write_back: WriteBack,
    /// Size of the request that does not fit in the backlog.
    blocked_bytes: u64,
    /// A sync has ended in the last `submit_and_reap`, so a request may fit now.
    backlog_freed: bool,
    /// Discards in flight are cut short.
    draining: bool,
    /// Requests in parts.
    split: Slab<SplitRequest>,
    session_start: SessionStart,
    map_commit: MapCommit,
    flushes: Flushes,
    creator: CreatorPid,
    completions: VecDeque<(Token, Result<(), Errno>)>,
    in_flight: usize,
    /// Completed transfers of one round; reused.
    done: Vec<Done<Tag>>,
    pool: BufferPool,
}

/// Early write-back of this queue.
#[derive(Debug, Default)]
struct WriteBack {
    pages: DistinctPages,
    /// Its start is in flight.
    starting: bool,
}

impl DiskQueue {
    pub(crate) fn new(layers: Arc<LayeredDisk>, engine: Box<dyn Engine<Tag>>, flush: bool) -> Self {
        DiskQueue {
            engine,
            layers,
            flush,
            backlog: Backlog::new(1),
            queue_index: 0,
            write_back: WriteBack::default(),
            blocked_bytes: 0,
            backlog_freed: false,
            draining: false,
            split: Slab::default(),
            session_start: SessionStart::default(),
            map_commit: MapCommit::default(),
            flushes: Flushes::default(),
            creator: CreatorPid::current(),
            completions: VecDeque::new(),
            in_flight: 0,
            done: Vec::new(),
            pool: BufferPool::default(),
        }
    }

    /// Makes this queue number `queue_index` of those that share `backlog`.
    pub(crate) fn with_backlog(mut self, backlog: Arc<Backlog>, queue_index: usize) -> Self {
        (self.backlog, self.queue_index) = (backlog, queue_index);
        self
    }

    /// Sets the event that is signalled when another queue of the disk has work for this one.
    pub(crate) fn set_waker(&self, waker: Arc<EventFd>) {
        self.backlog.set_waker(self.queue_index, waker);
    }

    /// Reserves `bytes`, which the disk has to move for a request, in the backlog. If they do not
    /// fit, returns false; when they may, the waker is signalled or `has_more` is true. Reads may
    /// exceed the window a little, so that they do not wait for what was written.
    pub(crate) fn reserve(&mut self, bytes: u64, is_read: bool) -> bool {
        let extra = if is_read { READ_EXTRA } else { 0 };
        let fits = self.backlog.reserve(self.queue_index, bytes, extra);
        self.blocked_bytes = if fits { 0 } else { bytes };
        fits
    }

    /// Releases the bytes of a request that is complete.
    pub(crate) fn release(&self, bytes: u64) {
        self.backlog.release(self.queue_index, bytes);
    }

    /// Bytes that the disk has to move for a write of `len` bytes at `offset`.
    pub(crate) fn cost_of_write(&self, offset: u64, len: u64) -> u64 {
        let (_, start) = self.layers.write_target();
        dirtied(start.saturating_add(offset), len) + self.cost_of_maps(len)
    }

    fn cost_of_maps(&self, len: u64) -> u64 {
        if self.layers.active().is_some() { MAP_DIRTY * (2 + len / (16 << 20)) } else { 0 }
    }

    /// Sets whether discards in flight are cut short, because a pause or a reset waits for this
    /// queue.
    pub(crate) fn set_draining(&mut self, draining: bool) {
        self.draining = draining;
        if draining {
            self.blocked_bytes = 0;
        }
    }

    /// An empty list for the buffers of a request: a recycled one, if there is any.
    pub fn buffers(&mut self) -> GuestIoVec {
        self.pool.take()
    }

    /// Takes back a list that was not used.
    pub fn recycle(&mut self, buffers: GuestIoVec) {
        self.pool.recycle(buffers);
    }

    /// Adds a request. `offset` is in bytes, and ignored for a flush.
    pub fn enqueue(&mut self, token: Token, offset: u64, request: Request) {
        self.in_flight += 1;
        let len = match &request {
            Request::Read(buffers) | Request::Write(buffers) => buffers.len(),
            Request::Discard { len } | Request::WriteZeroes { len, .. } => *len,
            Request::Flush => return self.start_flush(token),
        };
        let end = offset.checked_add(len).filter(|&end| end <= self.layers.size());
        if end.is_none() || !offset.is_multiple_of(SECTOR) || !len.is_multiple_of(SECTOR) {
            return self.finish(token, Err(Errno::INVAL));
        }
        if len == 0 {
            return self.finish(token, Ok(()));
        }
        match (request, self.layers.active()) {
            (Request::Read(buffers), _) => self.read(token, offset, buffers),
            (change, Some(active)) if !active.has_session() => {
                let file = self.layers.write_target().0;
                let change = (token, offset, change);
                if let Err((token, _, change)) =
                    self.session_start.enqueue(change, file, active, &mut *self.engine)
                {
                    self.fail_change(token, change, Errno::IO);
                }
            }
            (change, _) => self.change(token, offset, change),
        }
    }

    /// Starts a request that changes the disk.
    fn change(&mut self, token: Token, offset: u64, request: Request) {
        match request {
            Request::Write(buffers) => self.write(token, offset, buffers),
            Request::Discard { len } => self.discard(token, offset, len),
            Request::WriteZeroes { len, unmap } => self.zero(token, offset, len, !unmap),
            Request::Read(_) | Request::Flush => {}
        }
    }

    /// Starts what was enqueued, and completes what has ended. Then the caller takes the
    /// completions ([`pop_completion`](Self::pop_completion)) and, if the queue
    /// [`has_more`](Self::has_more), calls this again, at once or after other tasks have run.
    pub fn submit_and_reap(&mut self) {
        self.backlog_freed = false;
        self.start_sync();
        self.engine.submit();
        let mut done = std::mem::take(&mut self.done);
        self.engine.reap(&mut done);
        for done in done.drain(..) {
            self.transfer_done(done);
        }
        self.done = done;
        if self.flush {
            self.backlog.finished(self.queue_index, &mut self.completions);
        }
        if let Some(active) = self.layers.active() {
            let target = (self.layers.write_target().0, active);
            self.map_commit.start_run(target, &mut *self.engine, &mut self.completions);
        }
    }

    /// Whether there is work or a completion for which no event will come.
    pub fn has_more(&self) -> bool {
        self.engine.has_more() || !self.completions.is_empty() || self.backlog_freed
    }

    /// Takes the next completed request and its result.
    pub fn pop_completion(&mut self) -> Option<(Token, Result<(), Errno>)> {
        let completion = self.completions.pop_front();
        if completion.is_some() {
            self.in_flight -= 1;
        }
        completion
    }

    /// Requests that were enqueued and whose completions were not taken.
    pub fn in_flight(&self) -> usize {
        self.in_flight
    }

    /// Whether nothing is in flight, including work without a request, such as write-back.
    pub fn is_idle(&self) -> bool {
        self.in_flight == 0 && self.engine.in_flight() == 0
    }

    /// Readable while [`submit_and_reap`](Self::submit_and_reap) has something to complete. `None`
    /// for an engine that leaves nothing in flight.
    pub fn event(&self) -> Option<BorrowedFd<'_>> {
        self.engine.event()
    }

    /// Waits until nothing is in flight. The results are in
    /// [`pop_completion`](Self::pop_completion). Blocks.
    pub fn drain(&mut self) {
        loop {
            self.submit_and_reap();
            if self.engine.in_flight() == 0 {
                return;
            }
            self.engine.wait();
        }
    }

    /// Waits until there is something to complete.
    #[cfg(test)]
    pub(crate) fn wait_for_tests(&mut self) {
        self.engine.wait();
    }

    fn finish(&mut self, token: Token, result: Result<(), Errno>) {
        self.completions.push_back((token, result));
    }

    fn read(&mut self, token: Token, offset: u64, buffers: GuestIoVec) {
        let state = self.layers.active().map(ActiveLayer::state);
        let len = buffers.len();
        let extent = self.layers.locate(state.as_deref(), offset, len);
        drop(state);
        if extent.len == len && len <= PART {
            self.engine.push(Transfer::read(extent.file, extent.offset, buffers, Tag::Whole(token)));
        } else {
            self.split(token, offset, len, SplitKind::Read(buffers));
        }
    }

    fn write(&mut self, token: Token, offset: u64, buffers: GuestIoVec) {
        let len = buffers.len();
        if len > PART {
            return self.split(token, offset, len, SplitKind::Write(buffers));
        }
        let (file, start) = self.layers.write_target();
        let tag = Tag::Write { token, sector: offset / SECTOR, count: len / SECTOR };
        self.engine.push(Transfer::write(file, start + offset, buffers, tag));
    }

    fn discard(&mut self, token: Token, offset: u64, len: u64) {
        if len > DISCARD_PART && self.draining {
            return self.finish(token, Ok(()));
        }
        if len > DISCARD_PART {
            return self.split(token, offset, len, SplitKind::Discard);
        }
        let (file, start) = self.layers.write_target();
        let tag = Tag::Discard { token, offset, len };
        self.engine.push(Transfer::zero(file, start + offset, len, false, tag));
    }

    fn zero(&mut self, token: Token, offset: u64, len: u64, keep_space: bool) {
        let (file, start) = self.layers.write_target();
        let tag = Tag::Zero { token, offset, len };
        self.engine.push(Transfer::zero(file, start + offset, len, keep_space, tag));
    }

    fn start_flush(&mut self, token: Token) {
        if !self.flush {
            return self.finish(token, Ok(()));
        }
        self.backlog.flush(self.queue_index, token);
        self.start_sync();
    }

    /// Starts a sync of the disk if one is due and none runs.
    fn start_sync(&mut self) {
        if !self.flush || !self.backlog.begin_sync(self.blocked_bytes) {
            return;
        }
        self.write_back.pages.sync_begins(&self.backlog);
        self.flushes.start(SYNC, self.layers.flush_target(), &mut *self.engine);
        self.take_in_syncs();
    }

    fn take_in_syncs(&mut self) {
        while let Some((_, result)) = self.flushes.finished() {
            self.sync_ended(result);
        }
    }

    /// The sync that this queue started has ended, or was not tried because an earlier one has
    /// failed.
    fn sync_ended(&mut self, result: Result<(), Errno>) {
        if result.is_ok() {
            self.write_back.pages.sync_succeeded(&self.backlog);
        }
        self.backlog.sync_ended(self.queue_index, result);
        self.backlog_freed = true;
        // For flushes that came meanwhile.
        self.start_sync();
    }

    /// Counts a write of up to `len` bytes at `offset` of the disk.
    fn count_written(&mut self, offset: u64, len: u64) {
        if self.flush && len > 0 {
            let offset = self.layers.write_target().1 + offset;
            let fresh = self.write_back.pages.mark(offset, len, &self.backlog);
            let maps = if fresh > 0 { self.cost_of_maps(len) } else { 0 };
            self.count_dirty(fresh + maps);
        }
    }

    /// Counts a discard, or a write-zeroes by the file system.
    fn count_cleared(&mut self, len: u64) {
        if self.flush {
            self.count_dirty(len.min(RANGE_DIRTY) + self.cost_of_maps(len));
        }
    }

    fn count_dirty(&mut self, bytes: u64) {
        if bytes == 0 {
            return;
        }
        if self.backlog.add_dirty(bytes) && !self.write_back.starting {
            self.write_back.starting = true;
            self.engine.push(Transfer::write_back(self.layers.write_target().0, Tag::WriteBack));
        }
        self.start_sync();
    }

    /// A sync of this queue failed: marks the contents of an overlay as unknown in its file.
    fn mark_unknown(&mut self) {
        let Some((offset, session)) = self.layers.active().and_then(ActiveLayer::unknown_mark) else {
            return;
        };
        let file = self.layers.write_target().0;
        self.engine.push(Transfer::write_bytes(file, offset, session, Tag::MarkUnknown));
    }

    /// Fails a change that cannot be started.
    fn fail_change(&mut self, token: Token, change: Request, errno: Errno) {
        if let Request::Write(buffers) = change {
            self.recycle(buffers);
        }
        self.finish(token, Err(errno));
    }

    /// Starts a request in parts.
    fn split(&mut self, token: Token, offset: u64, len: u64, what: SplitKind) {
        let index = self.split.add(SplitRequest::new(token, offset, len, what));
        self.start_parts(index);
    }

    /// Starts as many parts of a request as may be in flight.
    fn start_parts(&mut self, index: u32) {
        let Some(split) = self.split.get_mut(index) else { return };
        let state = self.layers.active().map(ActiveLayer::state);
        let layers = (&*self.layers, state.as_deref());
        while let Some(transfer) = split.next_part(index, layers, &mut self.pool, self.draining) {
            self.engine.push(transfer);
        }
    }

    /// Handles the end of a part.
    fn part_done(&mut self, index: u32, result: Result<(), Errno>) {
        let Some(split) = self.split.get_mut(index) else { return };
        let was_last = split.part_ended(result);
        if !split.is_started(self.draining) {
            return self.start_parts(index);
        }
        if !was_last {
            return;
        }
        let Some(split) = self.split.remove(index) else { return };
        let SplitRequest { token, what, offset, len, started, error, .. } = split;
        let result = error.map_or(Ok(()), Err);
        match what {
            SplitKind::Read(buffers) => {
                self.recycle(buffers);
                self.finish(token, result);
            }
            SplitKind::Write(buffers) => {
                self.recycle(buffers);
                self.count_written(offset, len);
                self.finish_change(token, offset / SECTOR, len / SECTOR, result);
            }
            SplitKind::Zeros => {
                self.count_written(offset, len);
                self.finish_change(token, offset / SECTOR, len / SECTOR, result);
            }
            SplitKind::Discard => self.finish_discard(token, offset, started, result),
        }
    }

    /// Finishes a discard of `len` bytes from `offset`. If the disk does not support it, it
    /// succeeds.
    fn finish_discard(&mut self, token: Token, offset: u64, len: u64, result: Result<(), Errno>) {
        if is_unsupported(result) || len == 0 {
            return self.finish(token, Ok(()));
        }
        self.count_cleared(len);
        // The overlay's zeros must cover what its backing has there.
        self.finish_change(token, offset / SECTOR, len / SECTOR, result);
    }

    /// Finishes a change of `count` sectors from `sector`. On an overlay it completes once the
    /// commit map has them.
    fn finish_change(&mut self, token: Token, sector: u64, count: u64, result: Result<(), Errno>) {
        match self.layers.active() {
            Some(active) if result.is_ok() => {
                if self.map_commit.commit(token, sector, count, active) {
                    self.finish(token, Ok(()));
                }
            }
            _ => self.finish(token, result),
        }
    }

    fn transfer_done(&mut self, done: Done<Tag>) {
        let Done { tag, result, buffers } = done;
        self.recycle(buffers);
        match tag {
            Tag::Whole(token) => self.finish(token, result),
            Tag::Write { token, sector, count } => {
                self.count_written(sector * SECTOR, count * SECTOR);
                self.finish_change(token, sector, count, result);
            }
            Tag::Discard { token, offset, len } => self.finish_discard(token, offset, len, result),
            Tag::Zero { token, offset, len } => {
                if is_unsupported(result) {
                    return self.split(token, offset, len, SplitKind::Zeros);
                }
                self.count_cleared(len);
                self.finish_change(token, offset / SECTOR, len / SECTOR, result);
            }
            Tag::Part(index) => self.part_done(index, result),
            Tag::SessionStart => self.session_step_done(result),
            Tag::WriteBack => {
                self.write_back.starting = false;
                match result {
                    Err(errno) if loses_data(errno) => {
                        self.layers.health().sync_failed("early write-back", errno);
                        self.mark_unknown();
                    }
                    _ => {}
                }
            }
            Tag::Flush => {
                if self.flushes.step(result, self.layers.flush_target(), &mut *self.engine) {
                    self.mark_unknown();
                }
                self.take_in_syncs();
            }
            Tag::MarkUnknown => {
                if let (Err(_), Some(active)) = (result, self.layers.active()) {
                    let (file, (offset, len)) = (self.layers.write_target().0, active.commit_map());
                    self.engine.push(Transfer::zero(file, offset, len, false, Tag::ClearCommitMap));
                }
            }
            Tag::ClearCommitMap => {
                if let (Err(errno), Some(active)) = (result, self.layers.active()) {
                    active.log_unmarked(&errno);
                }
            }
            Tag::CommitMap { page, words } => {
                let Some(active) = self.layers.active() else { return };
                let target = (self.layers.write_target().0, active);
                self.map_commit.step((page, words), result, target, &mut *self.engine, &mut self.completions);
            }
        }
    }

    /// Handles the end of a step of the overlay's session start.
    fn session_step_done(&mut self, result: Result<(), Errno>) {
        let Some(active) = self.layers.active() else { return };
        let file = self.layers.write_target().0;
        if let (true, Err(errno)) = (self.session_start.is_syncing(), result) {
            self.layers.health().sync_failed("the sync of the overlay's first change", errno);
        }
        let Some((result, waiting)) = self.session_start.step(result, file, active, &mut *self.engine) else {
            return;
        };
        if !self.layers.health().is_known() {
            // The session was written over the mark that another failed sync may have made.
            active.require_mark_again();
            self.mark_unknown();
        }
        for (token, offset, change) in waiting {
            match result {
                Ok(()) => self.change(token, offset, change),
                Err(errno) => self.fail_change(token, change, errno),
            }
        }
    }
}

impl Drop for DiskQueue {
    /// Completes what is in flight: the failure of a sync must reach the disk's health.
    fn drop(&mut self) {
        if self.creator.is_current() && self.engine.in_flight() > 0 {
            self.drain();
        }
    }
}

/// Whether a failed start of write-back may mean lost data. If the kernel had no memory, nothing
/// was started, and the next sync writes the pages.
fn loses_data(errno: Errno) -> bool {
    !is_unsupported(Err(errno)) && !matches!(errno, Errno::NOMEM | Errno::AGAIN | Errno::INTR)
}

/// Whether the file system or device does not support the operation, at all or at this alignment.
fn is_unsupported(result: Result<(), Errno>) -> bool {
    matches!(result, Err(Errno::OPNOTSUPP | Errno::NOSYS | Errno::NODEV | Errno::INVAL))
}
