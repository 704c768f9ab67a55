//! One operation on one file, and its end.

use rustix::io::Errno;

use crate::buffers::{GuestBuffers, Segment};

/// Most segments that one system call takes (`IOV_MAX`).
pub(crate) const MAX_SEGMENTS: usize = 1024;

/// How often in a row a system call is repeated that was interrupted or asked to be repeated.
const MAX_RETRIES: u8 = 100;

/// Source of zeros for file systems that cannot zero a range themselves.
static ZEROS: [u8; 64 << 10] = [0; 64 << 10];

/// Most bytes that one [`Transfer::write_zeros`] carries.
pub(crate) const MAX_ZEROS: u64 = 1 << 20;

/// What a transfer does.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Op {
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
pub(crate) struct Transfer<T> {
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
pub(crate) struct Done<T> {
    /// What the transfer was tagged with.
    pub(crate) tag: T,
    /// Whether all of it was done.
    pub(crate) result: Result<(), Errno>,
    /// The buffers it was given, spent: only good for their space.
    pub(crate) buffers: GuestBuffers,
}

/// What became of one system call.
#[derive(Debug, PartialEq, Eq)]
pub(crate) enum Progress {
    /// The transfer is over.
    Over(Result<(), Errno>),
    /// The rest must be started again.
    Again,
}

impl<T> Transfer<T> {
    /// Fills `buffers` from `offset` on.
    pub(crate) fn read(file: u8, offset: u64, buffers: GuestBuffers, tag: T) -> Self {
        Self::new(Op::Read, file, offset, buffers.len(), Memory::Guest(buffers), tag)
    }

    /// Writes `buffers` from `offset` on.
    pub(crate) fn write(file: u8, offset: u64, buffers: GuestBuffers, tag: T) -> Self {
        Self::new(Op::Write, file, offset, buffers.len(), Memory::Guest(buffers), tag)
    }

    /// Writes `bytes` from `offset` on.
    pub(crate) fn write_bytes(file: u8, offset: u64, bytes: Box<[u8]>, tag: T) -> Self {
        let left = bytes.len() as u64;
        let segments = vec![Segment { addr: bytes.as_ptr().expose_provenance(), len: bytes.len() }];
        Self::new(Op::Write, file, offset, left, Memory::Own { _bytes: bytes, segments }, tag)
    }

    /// Writes `len` zeros from `offset` on; at most [`MAX_ZEROS`].
    pub(crate) fn write_zeros(file: u8, offset: u64, len: u64, tag: T) -> Self {
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
    pub(crate) fn sync(file: u8, tag: T) -> Self {
        Self::new(Op::Sync, file, 0, 0, Memory::Guest(GuestBuffers::new()), tag)
    }

    /// Starts write-back of all dirty pages of `file`.
    pub(crate) fn write_back(file: u8, tag: T) -> Self {
        Self::new(Op::WriteBack, file, 0, 0, Memory::Guest(GuestBuffers::new()), tag)
    }

    /// Lets the `len` bytes from `offset` read as zeros; `keep_space` says whether their space stays reserved.
    pub(crate) fn zero(file: u8, offset: u64, len: u64, keep_space: bool, tag: T) -> Self {
        let op = if keep_space { Op::ZeroRange } else { Op::PunchHole };
        Self::new(op, file, offset, len, Memory::Guest(GuestBuffers::new()), tag)
    }

    fn new(op: Op, file: u8, offset: u64, left: u64, memory: Memory, tag: T) -> Self {
        Transfer { op, file, offset, left, memory, next: 0, retries: 0, tag }
    }

    pub(crate) fn op(&self) -> Op {
        self.op
    }

    /// Index of the file among those that the engine was built with.
    pub(crate) fn file(&self) -> u8 {
        self.file
    }

    /// Where in the file the transfer goes on.
    pub(crate) fn offset(&self) -> u64 {
        self.offset
    }

    /// Bytes that are still to do.
    pub(crate) fn left(&self) -> u64 {
        self.left
    }

    /// The segments that are still to do; at most [`MAX_SEGMENTS`] of them.
    pub(crate) fn segments(&self) -> &[Segment] {
        let segments = match &self.memory {
            Memory::Guest(buffers) => buffers.segments(),
            Memory::Own { segments, .. } => segments,
        };
        &segments[self.next..segments.len().min(self.next + MAX_SEGMENTS)]
    }

    /// Takes in what a system call for this transfer returned: a count, or a negative errno.
    pub(crate) fn advance(&mut self, result: i32) -> Progress {
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
    pub(crate) fn finish(self, result: Result<(), Errno>) -> Done<T> {
        let buffers = match self.memory {
            Memory::Guest(buffers) => buffers,
            Memory::Own { .. } => GuestBuffers::new(),
        };
        Done { tag: self.tag, result, buffers }
    }
}

/// Whether the thread that serves a disk may wait for it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Blocking {
    /// It serves others, too: no disk may hold it up.
    Never,
    /// It serves this disk and nothing else. Then what would be handed to another thread, only because it *might* have to wait, is
    /// quicker done at once: most of it is a copy into the page cache.
    Allowed,
}
