//! Serving requests for a disk: what the tasks of the device talk to.
//!
//! # Contract
//!
//! - The caller has checked that a request lies within the disk, in whole sectors. What reaches past the end all the same is
//!   answered with `EINVAL`; nothing panics.
//! - [`start`](DiskQueue::start) notes requests, [`kick`](DiskQueue::kick) sends them off and takes in what is over, and
//!   [`finished`](DiskQueue::finished) tells one by one which are. None of them waits for a disk (but for a worker with
//!   [`Patience`](super::engine::Patience)), nor does any take long: a request larger than [`PART`] is worked off in parts,
//!   a few at a time, so that it cannot keep a worker to itself.
//! - Its [`event`](DiskQueue::event) is readable when `kick` has something to take in.
//! - Requests in flight together have no order, as on any disk. A flush covers what had finished when it was started.
//! - What was told to be over survives the monitor's being killed, on an overlay as on a plain disk ([`holding`](super::holding)).
//!
//! # Error model
//!
//! A request fails with an errno; others go on. `EIO` may mean that the file ended early: it shrank. After a failed sync, of this queue or of
//! anything else that syncs the disk, flushes fail with `EIO` and are not tried ([`health`](super::health)).

use std::collections::VecDeque;
use std::ops::RangeInclusive;
use std::os::fd::BorrowedFd;
use std::sync::Arc;

use rustix::io::Errno;

use super::SECTOR;
use super::beginning::Beginning;
use super::buffers::GuestBuffers;
use super::engine::{Done, Engine, MAX_ZEROS, Transfer};
use super::flush::Flush;
use super::holding::Holding;
use super::overlay::Top;
use super::owner::Owner;
use super::stack::Stack;

/// Largest part of a request that is worked off at once, in bytes.
const PART: u64 = 1 << 20;
/// Most parts of one request in flight at a time.
const MAX_PARTS: u32 = 4;

/// What is to be done.
#[derive(Debug)]
pub enum Request {
    /// Fill the buffers from `offset` on.
    Read(GuestBuffers),
    /// Write the buffers from `offset` on.
    Write(GuestBuffers),
    /// The `len` bytes are not needed any more; they read as zeros where the disk can give their space back.
    Discard {
        /// Length in bytes.
        len: u64,
    },
    /// The `len` bytes read as zeros.
    WriteZeroes {
        /// Length in bytes.
        len: u64,
        /// Whether their space may be given back.
        unmap: bool,
    },
    /// What was written becomes durable. Nothing is done where flushes do not wait for the disk.
    Flush,
}

/// How the caller tells its requests apart.
pub type Token = u32;

/// Serves requests for one [`Disk`](super::disk::Disk).
#[derive(Debug)]
pub struct DiskQueue {
    /// First, so that it is dropped first: it waits for what is in flight.
    engine: Engine<Tag>,
    stack: Arc<Stack>,
    /// Whether a flush does anything.
    flush: bool,
    /// Requests in parts.
    split: Vec<Option<Split>>,
    free_split: Vec<u32>,
    beginning: Beginning,
    holding: Holding,
    flushes: Flush,
    owner: Owner,
    finished: VecDeque<(Token, Result<(), Errno>)>,
    in_flight: usize,
    /// Reused: completions of one round, and spent buffers.
    done: Vec<Done<Tag>>,
    spare: Vec<GuestBuffers>,
}

/// What a transfer is for.
#[derive(Debug)]
pub(super) enum Tag {
    /// A whole request.
    Whole(Token),
    /// A whole write to an overlay; it holds these sectors afterwards.
    Hold { token: Token, sector: u64, count: u64 },
    /// A discard: one that the disk cannot do is done.
    Discard { token: Token, offset: u64, len: u64 },
    /// Zeroing of a range, by the file system; where it cannot, zeros are written.
    Zero { token: Token, offset: u64, len: u64 },
    /// A part of a request.
    Part(u32),
    /// A step of the beginning of an overlay's session.
    Begin,
    /// A step of a flush.
    Flush,
    /// An overlay's file is to say that its contents are unknown; where it cannot, its map B is cleared.
    GiveUp,
    /// The clearing of map B.
    ClearMapB,
    /// A stretch of an overlay's map B.
    MapB { page: u64, words: RangeInclusive<u16> },
}

/// A request that is worked off in parts.
#[derive(Debug)]
struct Split {
    token: Token,
    what: SplitWhat,
    /// Where on the disk it begins.
    offset: u64,
    len: u64,
    /// How much of it was started.
    started: u64,
    parts: u32,
    error: Option<Errno>,
}

#[derive(Debug)]
enum SplitWhat {
    Read(GuestBuffers),
    Write(GuestBuffers),
    Zeros,
}

impl DiskQueue {
    pub(super) fn new(stack: Arc<Stack>, engine: Engine<Tag>, flush: bool) -> Self {
        DiskQueue {
            engine,
            stack,
            flush,
            split: Vec::new(),
            free_split: Vec::new(),
            beginning: Beginning::default(),
            holding: Holding::default(),
            flushes: Flush::default(),
            owner: Owner::here(),
            finished: VecDeque::new(),
            in_flight: 0,
            done: Vec::new(),
            spare: Vec::new(),
        }
    }

    /// Empty buffers, for a request to come; used ones, if there are any.
    pub fn buffers(&mut self) -> GuestBuffers {
        self.spare.pop().unwrap_or_default()
    }

    /// Takes back buffers that were not used after all.
    pub fn recycle(&mut self, mut buffers: GuestBuffers) {
        if self.spare.len() < 64 {
            buffers.clear();
            self.spare.push(buffers);
        }
    }

    /// Notes a request; `offset` is in bytes, and of no matter for a flush.
    pub fn start(&mut self, token: Token, offset: u64, request: Request) {
        self.in_flight += 1;
        let len = match &request {
            Request::Read(buffers) | Request::Write(buffers) => buffers.len(),
            Request::Discard { len } | Request::WriteZeroes { len, .. } => *len,
            Request::Flush => return self.start_flush(token),
        };
        let end = offset.checked_add(len).filter(|&end| end <= self.stack.size());
        if end.is_none() || !offset.is_multiple_of(SECTOR) || !len.is_multiple_of(SECTOR) {
            return self.finish(token, Err(Errno::INVAL));
        }
        if len == 0 {
            return self.finish(token, Ok(()));
        }
        match (request, self.stack.top()) {
            (Request::Read(buffers), _) => self.read(token, offset, buffers),
            (change, Some(top)) if !top.is_begun() => {
                let file = self.stack.write_target().0;
                let change = (token, offset, change);
                if let Err((token, _, change)) = self.beginning.wait(change, file, top, &mut self.engine) {
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
    pub fn kick(&mut self) {
        self.engine.submit();
        let mut done = std::mem::take(&mut self.done);
        self.engine.reap(&mut done);
        for done in done.drain(..) {
            self.take_in(done);
        }
        self.done = done;
        if let Some(top) = self.stack.top() {
            let place = (self.stack.write_target().0, top);
            self.holding.go_on(place, &mut self.engine, &mut self.finished);
        }
    }

    /// Whether there is something to do or to tell at once, for which no event will come.
    pub fn has_more(&self) -> bool {
        self.engine.has_more() || !self.finished.is_empty()
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

    /// Readable while [`kick`](Self::kick) has something to take in. None if nothing is ever left to wait for.
    pub fn event(&self) -> Option<BorrowedFd<'_>> {
        self.engine.event()
    }

    /// Waits until all that was started is over; [`finished`](Self::finished) tells how it went. For threads that may block.
    pub fn drain(&mut self) {
        loop {
            self.kick();
            if self.engine.in_flight() == 0 {
                return;
            }
            self.engine.wait();
        }
    }

    /// Waits until there is something to take in.
    #[cfg(test)]
    pub(super) fn wait_for_tests(&mut self) {
        self.engine.wait();
    }

    fn finish(&mut self, token: Token, result: Result<(), Errno>) {
        self.finished.push_back((token, result));
    }

    fn read(&mut self, token: Token, offset: u64, buffers: GuestBuffers) {
        let state = self.stack.top().map(Top::state);
        let len = buffers.len();
        let place = self.stack.locate(state.as_deref(), offset, len);
        drop(state);
        if place.len == len && len <= PART {
            self.engine.push(Transfer::read(place.file, place.offset, buffers, Tag::Whole(token)));
        } else {
            self.split(token, offset, len, SplitWhat::Read(buffers));
        }
    }

    fn write(&mut self, token: Token, offset: u64, buffers: GuestBuffers) {
        let len = buffers.len();
        if len > PART {
            return self.split(token, offset, len, SplitWhat::Write(buffers));
        }
        let (file, start) = self.stack.write_target();
        let tag = self.tag_of_change(token, offset, len);
        self.engine.push(Transfer::write(file, start + offset, buffers, tag));
    }

    /// The tag of a change to the whole range of a request.
    fn tag_of_change(&self, token: Token, offset: u64, len: u64) -> Tag {
        if self.stack.top().is_some() {
            Tag::Hold { token, sector: offset / SECTOR, count: len / SECTOR }
        } else {
            Tag::Whole(token)
        }
    }

    fn discard(&mut self, token: Token, offset: u64, len: u64) {
        let (file, start) = self.stack.write_target();
        let tag = Tag::Discard { token, offset, len };
        self.engine.push(Transfer::zero(file, start + offset, len, false, tag));
    }

    fn zero(&mut self, token: Token, offset: u64, len: u64, keep_space: bool) {
        let (file, start) = self.stack.write_target();
        let tag = Tag::Zero { token, offset, len };
        self.engine.push(Transfer::zero(file, start + offset, len, keep_space, tag));
    }

    fn start_flush(&mut self, token: Token) {
        if !self.flush {
            return self.finish(token, Ok(()));
        }
        self.flushes.start(token, &self.stack, &mut self.engine);
        self.take_in_flushes();
    }

    fn take_in_flushes(&mut self) {
        while let Some(finished) = self.flushes.finished() {
            self.finished.push_back(finished);
        }
    }

    /// A sync of this queue failed, which the disk's health knows: lets an overlay say that its contents are unknown.
    fn give_up(&mut self) {
        let Some((offset, session)) = self.stack.top().and_then(Top::given_up) else { return };
        let file = self.stack.write_target().0;
        self.engine.push(Transfer::write_bytes(file, offset, session, Tag::GiveUp));
    }

    /// Ends a change that cannot be begun.
    fn refuse(&mut self, token: Token, change: Request, errno: Errno) {
        if let Request::Write(buffers) = change {
            self.recycle(buffers);
        }
        self.finish(token, Err(errno));
    }

    /// Begins a request in parts.
    fn split(&mut self, token: Token, offset: u64, len: u64, what: SplitWhat) {
        let split = Split { token, what, offset, len, started: 0, parts: 0, error: None };
        let index = if let Some(index) = self.free_split.pop() {
            self.split[index as usize] = Some(split);
            index
        } else {
            self.split.push(Some(split));
            (self.split.len() - 1) as u32
        };
        self.start_parts(index);
    }

    /// Starts parts of a request, as many as may be in flight.
    fn start_parts(&mut self, index: u32) {
        let Some(split) = &mut self.split[index as usize] else { return };
        let (target, target_start) = self.stack.write_target();
        let state = self.stack.top().map(Top::state);
        while split.parts < MAX_PARTS && split.started < split.len && split.error.is_none() {
            let offset = split.offset + split.started;
            let left = (split.len - split.started).min(PART);
            let (transfer, len) = match &split.what {
                SplitWhat::Read(all) => {
                    let place = self.stack.locate(state.as_deref(), offset, left);
                    let mut buffers = self.spare.pop().unwrap_or_default();
                    buffers.push_part(all, split.started, place.len);
                    (Transfer::read(place.file, place.offset, buffers, Tag::Part(index)), place.len)
                }
                SplitWhat::Write(all) => {
                    let mut buffers = self.spare.pop().unwrap_or_default();
                    buffers.push_part(all, split.started, left);
                    (Transfer::write(target, target_start + offset, buffers, Tag::Part(index)), left)
                }
                SplitWhat::Zeros => {
                    let left = left.min(MAX_ZEROS);
                    (Transfer::write_zeros(target, target_start + offset, left, Tag::Part(index)), left)
                }
            };
            self.engine.push(transfer);
            split.started += len;
            split.parts += 1;
        }
    }

    /// Takes in the end of a part.
    fn part_done(&mut self, index: u32, result: Result<(), Errno>) {
        let Some(split) = &mut self.split[index as usize] else { return };
        split.parts -= 1;
        if let Err(errno) = result {
            split.error.get_or_insert(errno);
        }
        let all_started = split.started == split.len || split.error.is_some();
        if !all_started {
            return self.start_parts(index);
        }
        if split.parts > 0 {
            return;
        }
        let Some(split) = self.split[index as usize].take() else { return };
        self.free_split.push(index);
        let result = split.error.map_or(Ok(()), Err);
        let changed = !matches!(split.what, SplitWhat::Read(_));
        if let SplitWhat::Read(buffers) | SplitWhat::Write(buffers) = split.what {
            self.recycle(buffers);
        }
        if changed {
            self.changed(split.token, split.offset / SECTOR, split.len / SECTOR, result);
        } else {
            self.finish(split.token, result);
        }
    }

    /// A change of `count` sectors from `sector` was made, or failed. It is over once the overlay, if there is one, says that it holds them.
    fn changed(&mut self, token: Token, sector: u64, count: u64, result: Result<(), Errno>) {
        match self.stack.top() {
            Some(top) if result.is_ok() => {
                if self.holding.changed(token, sector, count, top) {
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
            Tag::Hold { token, sector, count } => self.changed(token, sector, count, result),
            Tag::Discard { token, .. } if is_unsupported(result) => self.finish(token, Ok(())),
            // What lies beneath an overlay must not show through: it holds zeros there.
            Tag::Discard { token, offset, len } => {
                self.changed(token, offset / SECTOR, len / SECTOR, result);
            }
            Tag::Zero { token, offset, len } => {
                if is_unsupported(result) {
                    return self.split(token, offset, len, SplitWhat::Zeros);
                }
                self.changed(token, offset / SECTOR, len / SECTOR, result);
            }
            Tag::Part(index) => self.part_done(index, result),
            Tag::Begin => self.begun(result),
            Tag::Flush => {
                if self.flushes.step(result, &self.stack, &mut self.engine) {
                    self.give_up();
                }
                self.take_in_flushes();
            }
            Tag::GiveUp => {
                if let (Err(_), Some(top)) = (result, self.stack.top()) {
                    let (file, (offset, len)) = (self.stack.write_target().0, top.map_b());
                    self.engine.push(Transfer::zero(file, offset, len, false, Tag::ClearMapB));
                }
            }
            Tag::ClearMapB => {
                if let (Err(errno), Some(top)) = (result, self.stack.top()) {
                    top.cannot_give_up(&errno);
                }
            }
            Tag::MapB { page, words } => {
                let Some(top) = self.stack.top() else { return };
                let place = (self.stack.write_target().0, top);
                self.holding.step((page, words), result, place, &mut self.engine, &mut self.finished);
            }
        }
    }

    /// A step of the beginning of the overlay's session is over.
    fn begun(&mut self, result: Result<(), Errno>) {
        let Some(top) = self.stack.top() else { return };
        let file = self.stack.write_target().0;
        if let (true, Err(errno)) = (self.beginning.is_syncing(), result) {
            self.stack.health().sync_failed("the sync of the overlay's first change", errno);
        }
        let Some((result, waiting)) = self.beginning.step(result, file, top, &mut self.engine) else {
            return;
        };
        if !self.stack.health().is_known() {
            // What was written took the place of a mark that another's failed sync may have made.
            top.mark_again();
            self.give_up();
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
        if self.owner.is_here() && self.engine.in_flight() > 0 {
            self.drain();
        }
    }
}

/// Whether the file system or the device cannot do what was asked, at all or for this alignment.
fn is_unsupported(result: Result<(), Errno>) -> bool {
    matches!(result, Err(Errno::OPNOTSUPP | Errno::NOSYS | Errno::NODEV | Errno::INVAL))
}
