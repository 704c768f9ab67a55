//! How bytes move between files and memory: transfers, and the engines that carry them out.
//!
//! A [`Transfer`] is one operation on one file. An [`Engine`] owns it from [`push`](Engine::push) until it comes back as
//! [`Done`], whole or with an error: short reads and writes are continued and interrupted ones repeated inside.
//!
//! # I/O model
//!
//! `push` only notes a transfer, [`submit`](Engine::submit) starts those that were noted, and [`reap`](Engine::reap) gives
//! back those that are over. [`event`](Engine::event) is readable while there is something to reap. What the page
//! cache holds is often over when `submit` returns, so whoever submits reaps before waiting, and goes on while
//! [`has_more`](Engine::has_more).
//!
//! None of them waits for a disk, unless the engine was made for a worker that may: see [`Patience`].
//!
//! # Error model
//!
//! An error is the kernel's errno for that one transfer. The end of a file before the end of a read is `EIO`: the file is
//! smaller than it was when it was opened. Engines themselves do not fail once they are built.

use std::os::fd::BorrowedFd;

use rustix::io::Errno;

use super::blocking::BlockingEngine;
use super::buffers::{GuestBuffers, Segment};
#[cfg(any(test, feature = "testing"))]
use super::settled::SettledRing;
use super::sync_engine::SyncEngine;
use super::uring::Uring;

/// Most segments that one system call takes (`IOV_MAX`).
pub(super) const MAX_SEGMENTS: usize = 1024;

/// How often in a row a system call is repeated that was interrupted or asked to be repeated.
const MAX_RETRIES: u8 = 100;

/// Source of zeros for file systems that cannot zero a range themselves.
static ZEROS: [u8; 64 << 10] = [0; 64 << 10];

/// Most bytes that one [`Transfer::write_zeros`] carries.
pub(super) const MAX_ZEROS: u64 = 1 << 20;

/// What a transfer does.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Op {
    /// File to memory.
    Read,
    /// Memory to file.
    Write,
    /// Data and what is needed to find it again become durable (`fdatasync`).
    Sync,
    /// The kernel starts to write dirty pages to the disk, and does not wait for them (`sync_file_range`).
    WriteBack,
    /// The range reads as zeros and its space is given back.
    PunchHole,
    /// The range reads as zeros and keeps its space.
    ZeroRange,
}

/// One operation on one file.
///
/// # Invariant
///
/// While the transfer lives, each segment stays valid: it is guest RAM, or a part of `bytes`, or of [`ZEROS`]; and the
/// kernel writes to segments only for [`Op::Read`], whose segments are always guest RAM.
#[derive(Debug)]
pub(super) struct Transfer<T> {
    op: Op,
    file: u8,
    offset: u64,
    left: u64,
    memory: Memory,
    /// The first segment that is not done yet.
    next: usize,
    /// System calls in a row that asked to be repeated.
    retries: u8,
    tag: T,
}

#[derive(Debug)]
enum Memory {
    Guest(GuestBuffers),
    /// Bytes that the transfer owns, or zeros, and the segments that point to them.
    Own {
        _bytes: Box<[u8]>,
        segments: Vec<Segment>,
    },
}

/// A transfer that is over.
#[derive(Debug)]
pub(super) struct Done<T> {
    /// What the transfer was tagged with.
    pub(super) tag: T,
    /// Whether all of it was done.
    pub(super) result: Result<(), Errno>,
    /// The buffers it was given, spent: only good for their space.
    pub(super) buffers: GuestBuffers,
}

/// What became of one system call.
#[derive(Debug, PartialEq, Eq)]
pub(super) enum Progress {
    /// The transfer is over.
    Over(Result<(), Errno>),
    /// The rest must be started again.
    Again,
}

impl<T> Transfer<T> {
    /// Fills `buffers` from `offset` on.
    pub(super) fn read(file: u8, offset: u64, buffers: GuestBuffers, tag: T) -> Self {
        Self::new(Op::Read, file, offset, buffers.len(), Memory::Guest(buffers), tag)
    }

    /// Writes `buffers` from `offset` on.
    pub(super) fn write(file: u8, offset: u64, buffers: GuestBuffers, tag: T) -> Self {
        Self::new(Op::Write, file, offset, buffers.len(), Memory::Guest(buffers), tag)
    }

    /// Writes `bytes` from `offset` on.
    pub(super) fn write_bytes(file: u8, offset: u64, bytes: Box<[u8]>, tag: T) -> Self {
        let left = bytes.len() as u64;
        let segments = vec![Segment { addr: bytes.as_ptr().expose_provenance(), len: bytes.len() }];
        Self::new(Op::Write, file, offset, left, Memory::Own { _bytes: bytes, segments }, tag)
    }

    /// Writes `len` zeros from `offset` on; at most [`MAX_ZEROS`].
    pub(super) fn write_zeros(file: u8, offset: u64, len: u64, tag: T) -> Self {
        debug_assert!(len <= MAX_ZEROS);
        let addr = ZEROS.as_ptr().expose_provenance();
        let mut segments = Vec::new();
        let mut left = len as usize;
        while left > 0 {
            segments.push(Segment { addr, len: left.min(ZEROS.len()) });
            left -= left.min(ZEROS.len());
        }
        Self::new(Op::Write, file, offset, len, Memory::Own { _bytes: Box::default(), segments }, tag)
    }

    /// Makes what was written to `file` durable.
    pub(super) fn sync(file: u8, tag: T) -> Self {
        Self::new(Op::Sync, file, 0, 0, Memory::Guest(GuestBuffers::new()), tag)
    }

    /// Starts write-back of all dirty pages of `file`.
    pub(super) fn write_back(file: u8, tag: T) -> Self {
        Self::new(Op::WriteBack, file, 0, 0, Memory::Guest(GuestBuffers::new()), tag)
    }

    /// Lets the `len` bytes from `offset` read as zeros; `keep_space` says whether their space stays reserved.
    pub(super) fn zero(file: u8, offset: u64, len: u64, keep_space: bool, tag: T) -> Self {
        let op = if keep_space { Op::ZeroRange } else { Op::PunchHole };
        Self::new(op, file, offset, len, Memory::Guest(GuestBuffers::new()), tag)
    }

    fn new(op: Op, file: u8, offset: u64, left: u64, memory: Memory, tag: T) -> Self {
        Transfer { op, file, offset, left, memory, next: 0, retries: 0, tag }
    }

    pub(super) fn op(&self) -> Op {
        self.op
    }

    /// Index of the file among those that the engine was built with.
    pub(super) fn file(&self) -> u8 {
        self.file
    }

    /// Where in the file the transfer goes on.
    pub(super) fn offset(&self) -> u64 {
        self.offset
    }

    /// Bytes that are still to do.
    pub(super) fn left(&self) -> u64 {
        self.left
    }

    /// The segments that are still to do; at most [`MAX_SEGMENTS`] of them.
    pub(super) fn segments(&self) -> &[Segment] {
        let segments = match &self.memory {
            Memory::Guest(buffers) => buffers.segments(),
            Memory::Own { segments, .. } => segments,
        };
        &segments[self.next..segments.len().min(self.next + MAX_SEGMENTS)]
    }

    /// Takes in what a system call for this transfer returned: a count, or a negative errno.
    pub(super) fn advance(&mut self, result: i32) -> Progress {
        let Ok(count) = u64::try_from(result) else {
            return match Errno::from_raw_os_error(result.saturating_neg()) {
                Errno::INTR | Errno::AGAIN if self.retries < MAX_RETRIES => {
                    self.retries += 1;
                    Progress::Again
                }
                errno => Progress::Over(Err(errno)),
            };
        };
        if !matches!(self.op, Op::Read | Op::Write) {
            return Progress::Over(Ok(()));
        }
        if count >= self.left {
            return Progress::Over(Ok(()));
        }
        if count == 0 {
            return Progress::Over(Err(Errno::IO));
        }
        self.retries = 0;
        self.offset += count;
        self.left -= count;
        self.skip(count as usize);
        Progress::Again
    }

    /// Steps over the first `count` bytes of the segments that are still to do.
    fn skip(&mut self, mut count: usize) {
        let segments = match &mut self.memory {
            Memory::Guest(buffers) => buffers.segments_mut(),
            Memory::Own { segments, .. } => segments,
        };
        while count > 0 {
            let segment = &mut segments[self.next];
            if count < segment.len {
                segment.addr += count;
                segment.len -= count;
                return;
            }
            count -= segment.len;
            self.next += 1;
        }
    }

    /// Ends the transfer.
    pub(super) fn finish(self, result: Result<(), Errno>) -> Done<T> {
        let buffers = match self.memory {
            Memory::Guest(buffers) => buffers,
            Memory::Own { .. } => GuestBuffers::new(),
        };
        Done { tag: self.tag, result, buffers }
    }
}

/// Whether the thread that serves a disk may wait for it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Patience {
    /// It serves others, too: no disk may hold it up.
    None,
    /// It serves this disk and nothing else. Then what would be handed to another thread, only because it *might* have to wait, is
    /// quicker done at once: most of it is a copy into the page cache.
    MayWait,
}

/// What carries transfers out.
#[derive(Debug)]
pub(super) enum Engine<T: Send + 'static> {
    /// The kernel does them, through a ring.
    Uring(Box<Uring<T>>),
    /// A thread does one after the other.
    Sync(SyncEngine<T>),
    /// The worker itself does.
    Direct(BlockingEngine<T>),
    /// As `Uring`, and all is over when `submit` returns: for fuzzing.
    #[cfg(any(test, feature = "testing"))]
    Settled(SettledRing<T>),
    /// As `Direct`, and a test sees in which order.
    #[cfg(test)]
    Recorded(super::tests::recorder::Recorder<T>),
}

impl<T: Send + 'static> Engine<T> {
    /// Notes `transfer`; nothing starts before [`submit`](Self::submit).
    pub(super) fn push(&mut self, transfer: Transfer<T>) {
        match self {
            Engine::Uring(engine) => engine.push(transfer),
            Engine::Sync(engine) => engine.push(transfer),
            Engine::Direct(engine) => engine.push(transfer),
            #[cfg(any(test, feature = "testing"))]
            Engine::Settled(engine) => engine.push(transfer),
            #[cfg(test)]
            Engine::Recorded(engine) => engine.push(transfer),
        }
    }

    /// Starts what was noted. What is carried out on this thread may be left for the next call.
    pub(super) fn submit(&mut self) {
        match self {
            Engine::Uring(engine) => engine.submit(),
            Engine::Sync(engine) => engine.submit(),
            Engine::Direct(engine) => engine.submit(),
            #[cfg(any(test, feature = "testing"))]
            Engine::Settled(engine) => engine.submit(),
            #[cfg(test)]
            Engine::Recorded(engine) => engine.submit(),
        }
    }

    /// Appends to `done` what is over.
    pub(super) fn reap(&mut self, done: &mut Vec<Done<T>>) {
        match self {
            Engine::Uring(engine) => engine.reap(done),
            Engine::Sync(engine) => engine.reap(done),
            Engine::Direct(engine) => engine.reap(done),
            #[cfg(any(test, feature = "testing"))]
            Engine::Settled(engine) => engine.reap(done),
            #[cfg(test)]
            Engine::Recorded(engine) => engine.reap(done),
        }
    }

    /// Transfers that were pushed and not yet reaped.
    pub(super) fn in_flight(&self) -> usize {
        match self {
            Engine::Uring(engine) => engine.in_flight(),
            Engine::Sync(engine) => engine.in_flight(),
            Engine::Direct(engine) => engine.in_flight(),
            #[cfg(any(test, feature = "testing"))]
            Engine::Settled(engine) => engine.in_flight(),
            #[cfg(test)]
            Engine::Recorded(engine) => engine.in_flight(),
        }
    }

    /// Whether `submit` and `reap` have something to do at once, for which no event will come.
    pub(super) fn has_more(&self) -> bool {
        match self {
            Engine::Uring(engine) => engine.has_more(),
            Engine::Sync(engine) => engine.has_more(),
            Engine::Direct(engine) => engine.in_flight() > 0,
            #[cfg(any(test, feature = "testing"))]
            Engine::Settled(engine) => engine.in_flight() > 0,
            #[cfg(test)]
            Engine::Recorded(engine) => engine.has_more(),
        }
    }

    /// Waits until something is over, unless there is something to do at once or nothing is in flight. For threads that may block.
    pub(super) fn wait(&mut self) {
        match self {
            Engine::Uring(engine) => engine.wait(),
            Engine::Sync(engine) => engine.wait(),
            Engine::Direct(_) => {}
            #[cfg(any(test, feature = "testing"))]
            Engine::Settled(_) => {}
            #[cfg(test)]
            Engine::Recorded(_) => {}
        }
    }

    /// Readable while there may be something to reap. None if all is over when `submit` returns.
    pub(super) fn event(&self) -> Option<BorrowedFd<'_>> {
        match self {
            Engine::Uring(engine) => Some(engine.fd()),
            Engine::Sync(engine) => Some(engine.fd()),
            Engine::Direct(_) => None,
            #[cfg(any(test, feature = "testing"))]
            Engine::Settled(_) => None,
            #[cfg(test)]
            Engine::Recorded(_) => None,
        }
    }
}
