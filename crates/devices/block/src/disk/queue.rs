//! Serving requests for a disk: what the tasks of the device talk to.
//!
//! # Contract
//!
//! - The caller has checked that a request lies within the disk, in whole sectors. What reaches past the end all the same is
//!   answered with `EINVAL`; nothing panics.
//! - [`enqueue`](DiskQueue::enqueue) notes requests, [`submit_and_reap`](DiskQueue::submit_and_reap) sends them off and takes in what is over, and
//!   [`finished`](DiskQueue::finished) tells one by one which are. None of them waits for a disk (but for a worker with
//!   [`Blocking`](super::engine::Blocking)), nor does any take long: a request larger than [`PART`] is worked off in parts,
//!   a few at a time, so that it cannot keep a worker to itself.
//! - Its [`event`](DiskQueue::event) is readable when `submit_and_reap` has something to take in.
//! - Requests in flight together have no order, as on any disk. A flush covers what had finished when it was started.
//! - [`reserve`](DiskQueue::reserve) bounds what the disk still has to move ([`backlog`](super::backlog)).
//! - A discard is a hint. What is left of it when its queue is to [drain](DiskQueue::set_draining) is not done.
//! - What was told to be over survives the monitor's being killed, on an overlay as on a plain disk ([`map_commit`](super::map_commit)).
//!
//! # Error model
//!
//! A request fails with an errno; others go on. `EIO` may mean that the file ended early: it shrank. After a failed sync, of this queue or of
//! anything else that syncs the disk, flushes fail with `EIO` and are not tried ([`health`](super::health)).

use std::collections::VecDeque;
use std::os::fd::BorrowedFd;
use std::sync::Arc;

use rustix::io::Errno;

use super::backlog::{Backlog, DistinctPages, READ_EXTRA, dirtied};
use super::layered::LayeredDisk;
use super::split::{DISCARD_PART, PART, SplitKind, SplitRequest, SplitTable};
use crate::SECTOR;
use crate::buffers::{BufferPool, GuestBuffers};
use crate::creator_pid::CreatorPid;
use crate::engine::{Done, Engine, Transfer};
use crate::io_request::{Request, Tag, Token};
use crate::overlay::ActiveLayer;
use crate::overlay::commit::MapCommit;
use crate::overlay::flush::Flush;
use crate::overlay::session::SessionStart;
use sync::EventFd;

/// Most dirty bytes that a discard or a zeroing by the file system leaves: the partial blocks at its ends, and metadata.
const RANGE_DIRT: u64 = 64 << 10;
/// Dirty bytes of an overlay's two maps for one change of sectors that they did not mark_allocated, at most, for each 16 MiB of it.
const MAP_DIRT: u64 = 2 * 4096;
/// The sync of the backlog, as a flush of the disk.
const SYNC: Token = Token::MAX;

/// Serves requests for one [`Disk`](super::disk::Disk).
#[derive(Debug)]
pub struct DiskQueue {
    /// First, so that it is dropped first: it waits for what is in flight.
    engine: Box<dyn Engine<Tag>>,
    layers: Arc<LayeredDisk>,
    /// Whether a flush does anything.
    flush: bool,
    backlog: Arc<Backlog>,
    /// The number of this queue among those of the backlog.
    member: usize,
    write_back: WriteBack,
    /// Size of the request that waits for room.
    held: u64,
    /// A sync ended in the last `submit_and_reap`: there may be room.
    freed: bool,
    /// Nothing is session_step_done any more that need not be.
    draining: bool,
    /// Requests in parts.
    split: SplitTable,
    session_start: SessionStart,
    map_commit: MapCommit,
    flushes: Flush,
    creator: CreatorPid,
    finished: VecDeque<(Token, Result<(), Errno>)>,
    in_flight: usize,
    /// Completions of one round, reused.
    done: Vec<Done<Tag>>,
    pool: BufferPool,
}

/// The early write-back that this queue does.
#[derive(Debug, Default)]
struct WriteBack {
    pages: DistinctPages,
    /// It is being started.
    starting: bool,
}

impl DiskQueue {
    pub(crate) fn new(layers: Arc<LayeredDisk>, engine: Box<dyn Engine<Tag>>, flush: bool) -> Self {
        DiskQueue {
            engine,
            layers,
            flush,
            backlog: Backlog::new(1),
            member: 0,
            write_back: WriteBack::default(),
            held: 0,
            freed: false,
            draining: false,
            split: SplitTable::default(),
            session_start: SessionStart::default(),
            map_commit: MapCommit::default(),
            flushes: Flush::default(),
            creator: CreatorPid::current(),
            finished: VecDeque::new(),
            in_flight: 0,
            done: Vec::new(),
            pool: BufferPool::default(),
        }
    }

    /// The same as number `member` of the queues that share `backlog`.
    pub(crate) fn with_backlog(mut self, backlog: Arc<Backlog>, member: usize) -> Self {
        (self.backlog, self.member) = (backlog, member);
        self
    }

    /// Signals `waker` when there is something to do because of another queue of the disk.
    pub(crate) fn set_waker(&self, waker: Arc<EventFd>) {
        self.backlog.set_waker(self.member, waker);
    }

    /// Takes room in the backlog for a request that makes the disk move `bytes`. False if there is none: the waker is signalled, or
    /// `submit_and_reap` has something to do, when there may be.
    /// Reads may exceed it a little, so that they do not wait for what was written.
    pub(crate) fn reserve(&mut self, bytes: u64, is_read: bool) -> bool {
        let extra = if is_read { READ_EXTRA } else { 0 };
        let fits = self.backlog.reserve(self.member, bytes, extra);
        self.held = if fits { 0 } else { bytes };
        fits
    }

    /// Gives back the room of a request that is over.
    pub(crate) fn release(&self, bytes: u64) {
        self.backlog.release(self.member, bytes);
    }

    /// Bytes that the disk has to move for a write of `len` bytes at `offset`.
    pub(crate) fn cost_of_write(&self, offset: u64, len: u64) -> u64 {
        let (_, start) = self.layers.write_target();
        dirtied(start.saturating_add(offset), len) + self.cost_of_maps(len)
    }

    fn cost_of_maps(&self, len: u64) -> u64 {
        if self.layers.active().is_some() { MAP_DIRT * (2 + len / (16 << 20)) } else { 0 }
    }

    /// Whether discards in flight are to end early, because a pause or a reset waits for this queue.
    pub(crate) fn set_draining(&mut self, draining: bool) {
        self.draining = draining;
        if draining {
            self.held = 0;
        }
    }

    /// Empty buffers, for a request to come; used ones, if there are any.
    pub fn buffers(&mut self) -> GuestBuffers {
        self.pool.take()
    }

    /// Takes back buffers that were not used after all.
    pub fn recycle(&mut self, buffers: GuestBuffers) {
        self.pool.recycle(buffers);
    }

    /// Notes a request; `offset` is in bytes, and of no matter for a flush.
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
                    self.session_start.wait(change, file, active, &mut *self.engine)
                {
                    self.refuse(token, change, Errno::IO);
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

    /// Sends off what was noted and takes in what is over. The caller tells what [`finished`](Self::finished) and, if then it
    /// [`has_more`](Self::has_more), comes back, now or after others had their turn.
    pub fn submit_and_reap(&mut self) {
        self.freed = false;
        self.start_sync();
        self.engine.submit();
        let mut done = std::mem::take(&mut self.done);
        self.engine.reap(&mut done);
        for done in done.drain(..) {
            self.take_in(done);
        }
        self.done = done;
        if self.flush {
            self.backlog.finished(self.member, &mut self.finished);
        }
        if let Some(active) = self.layers.active() {
            let extent = (self.layers.write_target().0, active);
            self.map_commit.start_run(extent, &mut *self.engine, &mut self.finished);
        }
    }

    /// Whether there is something to do or to tell at once, for which no event will come.
    pub fn has_more(&self) -> bool {
        self.engine.has_more() || !self.finished.is_empty() || self.freed
    }

    /// The next request that is over, with how it went.
    pub fn finished(&mut self) -> Option<(Token, Result<(), Errno>)> {
        let finished = self.finished.pop_front();
        if finished.is_some() {
            self.in_flight -= 1;
        }
        finished
    }

    /// Requests that were started and not yet told to be over.
    pub fn in_flight(&self) -> usize {
        self.in_flight
    }

    /// Whether nothing is in flight, not even what nobody waits for.
    pub fn is_idle(&self) -> bool {
        self.in_flight == 0 && self.engine.in_flight() == 0
    }

    /// Readable while [`submit_and_reap`](Self::submit_and_reap) has something to take in. None if nothing is ever left to wait for.
    pub fn event(&self) -> Option<BorrowedFd<'_>> {
        self.engine.event()
    }

    /// Waits until all that was started is over; [`finished`](Self::finished) tells how it went. For threads that may block.
    pub fn drain(&mut self) {
        loop {
            self.submit_and_reap();
            if self.engine.in_flight() == 0 {
                return;
            }
            self.engine.wait();
        }
    }

    /// Waits until there is something to take in.
    #[cfg(test)]
    pub(crate) fn wait_for_tests(&mut self) {
        self.engine.wait();
    }

    fn finish(&mut self, token: Token, result: Result<(), Errno>) {
        self.finished.push_back((token, result));
    }

    fn read(&mut self, token: Token, offset: u64, buffers: GuestBuffers) {
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

    fn write(&mut self, token: Token, offset: u64, buffers: GuestBuffers) {
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
        self.backlog.flush(self.member, token);
        // It may be answered already.
        self.freed = true;
        self.start_sync();
    }

    /// Starts a sync of the disk if it is due and none runs.
    fn start_sync(&mut self) {
        if !self.flush || !self.backlog.begin_sync(self.held) {
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

    /// The sync that this queue started is over, or was not tried because one has failed before.
    fn sync_ended(&mut self, result: Result<(), Errno>) {
        if result.is_ok() {
            self.write_back.pages.sync_succeeded(&self.backlog);
        }
        self.backlog.sync_ended(self.member, result);
        self.freed = true;
        // Flushes that came meanwhile.
        self.start_sync();
    }

    /// `len` bytes at `offset` of the disk were written, or some of them.
    fn wrote(&mut self, offset: u64, len: u64) {
        if self.flush && len > 0 {
            let offset = self.layers.write_target().1 + offset;
            let fresh = self.write_back.pages.mark(offset, len, &self.backlog);
            let maps = if fresh > 0 { self.cost_of_maps(len) } else { 0 };
            self.dirty(fresh + maps);
        }
    }

    /// A range was discarded or zeroed without data being written.
    fn cleared(&mut self, len: u64) {
        if self.flush {
            self.dirty(len.min(RANGE_DIRT) + self.cost_of_maps(len));
        }
    }

    fn dirty(&mut self, bytes: u64) {
        if bytes == 0 {
            return;
        }
        if self.backlog.add_dirty(bytes) && !self.write_back.starting {
            self.write_back.starting = true;
            self.engine.push(Transfer::write_back(self.layers.write_target().0, Tag::WriteBack));
        }
        self.start_sync();
    }

    /// A sync of this queue failed, which the disk's health knows: lets an overlay say that its contents are unknown.
    fn mark_unknown(&mut self) {
        let Some((offset, session)) = self.layers.active().and_then(ActiveLayer::unknown_mark) else {
            return;
        };
        let file = self.layers.write_target().0;
        self.engine.push(Transfer::write_bytes(file, offset, session, Tag::MarkUnknown));
    }

    /// Ends a change that cannot be session_step_done.
    fn refuse(&mut self, token: Token, change: Request, errno: Errno) {
        if let Request::Write(buffers) = change {
            self.recycle(buffers);
        }
        self.finish(token, Err(errno));
    }

    /// Begins a request in parts.
    fn split(&mut self, token: Token, offset: u64, len: u64, what: SplitKind) {
        let index = self.split.add(SplitRequest::new(token, offset, len, what));
        self.start_parts(index);
    }

    /// Starts parts of a request, as many as may be in flight.
    fn start_parts(&mut self, index: u32) {
        let Some(split) = self.split.get(index) else { return };
        let state = self.layers.active().map(ActiveLayer::state);
        let layers = (&*self.layers, state.as_deref());
        while let Some(transfer) = split.next_part(index, layers, &mut self.pool, self.draining) {
            self.engine.push(transfer);
        }
    }

    /// Takes in the end of a part.
    fn part_done(&mut self, index: u32, result: Result<(), Errno>) {
        let Some(split) = self.split.get(index) else { return };
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
                self.wrote(offset, len);
                self.changed(token, offset / SECTOR, len / SECTOR, result);
            }
            SplitKind::Zeros => {
                self.wrote(offset, len);
                self.changed(token, offset / SECTOR, len / SECTOR, result);
            }
            SplitKind::Discard => self.discarded(token, offset, started, result),
        }
    }

    /// A discard of `len` bytes from `offset` is over. One that the disk cannot do is done.
    fn discarded(&mut self, token: Token, offset: u64, len: u64, result: Result<(), Errno>) {
        if is_unsupported(result) || len == 0 {
            return self.finish(token, Ok(()));
        }
        self.cleared(len);
        // What lies beneath an overlay must not show through: it holds zeros there.
        self.changed(token, offset / SECTOR, len / SECTOR, result);
    }

    /// A change of `count` sectors from `sector` was made, or failed. It is over once the overlay, if there is one, says that it holds them.
    fn changed(&mut self, token: Token, sector: u64, count: u64, result: Result<(), Errno>) {
        match self.layers.active() {
            Some(active) if result.is_ok() => {
                if self.map_commit.changed(token, sector, count, active) {
                    self.finish(token, Ok(()));
                }
            }
            _ => self.finish(token, result),
        }
    }

    fn take_in(&mut self, done: Done<Tag>) {
        let Done { tag, result, buffers } = done;
        self.recycle(buffers);
        match tag {
            Tag::Whole(token) => self.finish(token, result),
            Tag::Write { token, sector, count } => {
                self.wrote(sector * SECTOR, count * SECTOR);
                self.changed(token, sector, count, result);
            }
            Tag::Discard { token, offset, len } => self.discarded(token, offset, len, result),
            Tag::Zero { token, offset, len } => {
                if is_unsupported(result) {
                    return self.split(token, offset, len, SplitKind::Zeros);
                }
                self.cleared(len);
                self.changed(token, offset / SECTOR, len / SECTOR, result);
            }
            Tag::Part(index) => self.part_done(index, result),
            Tag::Begin => self.session_step_done(result),
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
                let extent = (self.layers.write_target().0, active);
                self.map_commit.step((page, words), result, extent, &mut *self.engine, &mut self.finished);
            }
        }
    }

    /// A step of the session_start of the overlay's session is over.
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
            // What was written took the extent of a mark that another's failed sync may have made.
            active.require_mark_again();
            self.mark_unknown();
        }
        for (token, offset, change) in waiting {
            match result {
                Ok(()) => self.change(token, offset, change),
                Err(errno) => self.refuse(token, change, errno),
            }
        }
    }
}

impl Drop for DiskQueue {
    /// Takes in what is in flight: the end of a sync that failed is not to be lost.
    fn drop(&mut self) {
        if self.creator.is_current() && self.engine.in_flight() > 0 {
            self.drain();
        }
    }
}

/// Whether an error of the start of write-back may mean that data is lost. Without memory nothing was
/// started, and the next sync writes it.
fn loses_data(errno: Errno) -> bool {
    !is_unsupported(Err(errno)) && !matches!(errno, Errno::NOMEM | Errno::AGAIN | Errno::INTR)
}

/// Whether the file system or the device cannot do what was asked, at all or for this alignment.
fn is_unsupported(result: Result<(), Errno>) -> bool {
    matches!(result, Err(Errno::OPNOTSUPP | Errno::NOSYS | Errno::NODEV | Errno::INVAL))
}
