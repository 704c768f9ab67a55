//! Transfers: one operation on one file, and its result.

use memory::iovec::{GuestIoVec, IoVec, MAX_ENTRIES};
use rustix::io::Errno;

/// Most consecutive retries of a system call that was interrupted or returned `EAGAIN`.
const MAX_RETRIES: u8 = 100;

/// Zeros to write where the file system cannot zero a range.
static ZEROS: [u8; 64 << 10] = [0; 64 << 10];

/// Most bytes of one [`Transfer::write_zeros`].
pub(crate) const MAX_ZEROS: u64 = 1 << 20;

/// Operation of a transfer.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Op {
    /// File to memory.
    Read,
    /// Memory to file.
    Write,
    /// `fdatasync`: data, and the metadata to find it again, become durable.
    Sync,
    /// `sync_file_range`: starts to write dirty pages to the disk, without waiting.
    WriteBack,
    /// The range reads as zeros, and its space is freed.
    PunchHole,
    /// The range reads as zeros, and its space stays allocated.
    ZeroRange,
}

/// One operation on one file.
///
/// # Invariant
///
/// While the transfer lives, each iovec is valid: it is guest RAM, or part of `_bytes` or of
/// [`ZEROS`]. The kernel writes to iovecs only for [`Op::Read`], whose iovecs are always guest RAM.
#[derive(Debug)]
pub(crate) struct Transfer<T> {
    op: Op,
    file: u8,
    offset: u64,
    remaining: u64,
    memory: Memory,
    /// The first iovec that is not done.
    next: usize,
    /// Consecutive retries.
    retries: u8,
    tag: T,
}

#[derive(Debug)]
enum Memory {
    Guest(GuestIoVec),
    /// Bytes that the transfer owns, or zeros, and the iovecs that point to them.
    Own {
        _bytes: Box<[u8]>,
        iov: Vec<IoVec>,
    },
}

/// A completed transfer.
#[derive(Debug)]
pub(crate) struct Done<T> {
    /// The tag of the transfer.
    pub(crate) tag: T,
    /// Whether all of it was done.
    pub(crate) result: Result<(), Errno>,
    /// The buffers of the transfer; their contents are spent, only the allocation is of use.
    pub(crate) buffers: GuestIoVec,
}

/// Result of one system call.
#[derive(Debug, PartialEq, Eq)]
pub(crate) enum Progress {
    /// The transfer is complete.
    Finished(Result<(), Errno>),
    /// The rest must be submitted again.
    Retry,
}

impl<T> Transfer<T> {
    /// Reads into `buffers` from `offset` on.
    pub(crate) fn read(file: u8, offset: u64, buffers: GuestIoVec, tag: T) -> Self {
        Self::new(Op::Read, file, offset, buffers.len(), Memory::Guest(buffers), tag)
    }

    /// Writes `buffers` from `offset` on.
    pub(crate) fn write(file: u8, offset: u64, buffers: GuestIoVec, tag: T) -> Self {
        Self::new(Op::Write, file, offset, buffers.len(), Memory::Guest(buffers), tag)
    }

    /// Writes `bytes` from `offset` on.
    pub(crate) fn write_bytes(file: u8, offset: u64, bytes: Box<[u8]>, tag: T) -> Self {
        let remaining = bytes.len() as u64;
        let iov = vec![IoVec::of(&bytes)];
        Self::new(Op::Write, file, offset, remaining, Memory::Own { _bytes: bytes, iov }, tag)
    }

    /// Writes `len` zeros from `offset` on; at most [`MAX_ZEROS`].
    pub(crate) fn write_zeros(file: u8, offset: u64, len: u64, tag: T) -> Self {
        debug_assert!(len <= MAX_ZEROS);
        let mut iov = Vec::new();
        let mut remaining = len as usize;
        while remaining > 0 {
            let zeros = &ZEROS[..remaining.min(ZEROS.len())];
            iov.push(IoVec::of(zeros));
            remaining -= zeros.len();
        }
        Self::new(Op::Write, file, offset, len, Memory::Own { _bytes: Box::default(), iov }, tag)
    }

    /// Makes what was written to `file` durable.
    pub(crate) fn sync(file: u8, tag: T) -> Self {
        Self::new(Op::Sync, file, 0, 0, Memory::Guest(GuestIoVec::new()), tag)
    }

    /// Starts write-back of all dirty pages of `file`.
    pub(crate) fn write_back(file: u8, tag: T) -> Self {
        Self::new(Op::WriteBack, file, 0, 0, Memory::Guest(GuestIoVec::new()), tag)
    }

    /// Makes the `len` bytes from `offset` read as zeros. `keep_space` keeps their space allocated.
    pub(crate) fn zero(file: u8, offset: u64, len: u64, keep_space: bool, tag: T) -> Self {
        let op = if keep_space { Op::ZeroRange } else { Op::PunchHole };
        Self::new(op, file, offset, len, Memory::Guest(GuestIoVec::new()), tag)
    }

    fn new(op: Op, file: u8, offset: u64, remaining: u64, memory: Memory, tag: T) -> Self {
        Transfer { op, file, offset, remaining, memory, next: 0, retries: 0, tag }
    }

    pub(crate) fn op(&self) -> Op {
        self.op
    }

    /// Index of the file among those of the engine.
    pub(crate) fn file(&self) -> u8 {
        self.file
    }

    /// Offset of the next byte to transfer.
    pub(crate) fn offset(&self) -> u64 {
        self.offset
    }

    /// Bytes that are left to transfer.
    pub(crate) fn remaining(&self) -> u64 {
        self.remaining
    }

    /// The iovecs that are left, at most [`MAX_ENTRIES`] of them.
    pub(crate) fn iov(&self) -> &[IoVec] {
        let iov = match &self.memory {
            Memory::Guest(buffers) => buffers.entries(),
            Memory::Own { iov, .. } => iov,
        };
        &iov[self.next..iov.len().min(self.next + MAX_ENTRIES)]
    }

    /// Takes the result of a system call for this transfer: a byte count or a negative errno.
    pub(crate) fn advance(&mut self, result: i32) -> Progress {
        let Ok(count) = u64::try_from(result) else {
            return match Errno::from_raw_os_error(result.saturating_neg()) {
                Errno::INTR | Errno::AGAIN if self.retries < MAX_RETRIES => {
                    self.retries += 1;
                    Progress::Retry
                }
                errno => Progress::Finished(Err(errno)),
            };
        };
        if !matches!(self.op, Op::Read | Op::Write) {
            return Progress::Finished(Ok(()));
        }
        if count >= self.remaining {
            return Progress::Finished(Ok(()));
        }
        if count == 0 {
            return Progress::Finished(Err(Errno::IO));
        }
        self.retries = 0;
        self.offset += count;
        self.remaining -= count;
        self.advance_iov(count as usize);
        Progress::Retry
    }

    /// Advances past the first `count` bytes of the iovecs that are left.
    fn advance_iov(&mut self, mut count: usize) {
        while count > 0 {
            let len = self.iov()[0].len();
            if count >= len {
                count -= len;
                self.next += 1;
                continue;
            }
            match &mut self.memory {
                Memory::Guest(buffers) => buffers.advance(self.next, count),
                Memory::Own { iov, .. } => iov[self.next].advance(count),
            }
            return;
        }
    }

    /// Completes the transfer.
    pub(crate) fn finish(self, result: Result<(), Errno>) -> Done<T> {
        let buffers = match self.memory {
            Memory::Guest(buffers) => buffers,
            Memory::Own { .. } => GuestIoVec::new(),
        };
        Done { tag: self.tag, result, buffers }
    }
}

/// Whether the worker that serves a disk may block on it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Blocking {
    /// It serves other devices too, so it must not.
    Never,
    /// It is dedicated to this disk. So a transfer that would go to a kernel thread only because it
    /// *might* block is carried out at once: most are copies to the page cache.
    Allowed,
}

#[cfg(test)]
mod tests {
    use memory::iovec::Access;
    use virtio::testing::guest_ram;

    use super::*;

    /// Lengths of the iovecs that are left after each of `results`.
    fn lens_after<T>(transfer: &mut Transfer<T>, results: &[i32]) -> Vec<Vec<usize>> {
        let advanced = results.iter().map(|&result| {
            assert_eq!(transfer.advance(result), Progress::Retry);
            let lens: Vec<usize> = transfer.iov().iter().map(IoVec::len).collect();
            assert_eq!(lens.iter().sum::<usize>() as u64, transfer.remaining());
            lens
        });
        advanced.collect()
    }

    #[test]
    fn short_read_continues_at_the_next_byte() {
        let ram = guest_ram(1);
        let mut buffers = GuestIoVec::new();
        for addr in [0, 8192, 16384] {
            buffers.push_merged(&ram, addr, 1000, Access::Write).unwrap();
        }
        let mut transfer = Transfer::read(0, 512, buffers, ());
        assert_eq!(
            lens_after(&mut transfer, &[400, 600, 1001]),
            [vec![600, 1000, 1000], vec![1000, 1000], vec![999]]
        );
        assert_eq!(transfer.offset(), 512 + 2001);
        assert_eq!(transfer.iov()[0].addr(), ram.regions()[0].host_addr as usize + 16384 + 1);
        assert_eq!(transfer.advance(999), Progress::Finished(Ok(())));
    }

    #[test]
    fn short_write_of_zeros_continues_at_the_next_byte() {
        let mut transfer = Transfer::write_zeros(0, 0, (128 << 10) + 512, ());
        assert_eq!(
            lens_after(&mut transfer, &[1, 65536, 65535]),
            [vec![65535, 65536, 512], vec![65535, 512], vec![512]]
        );
    }
}
