//! The synchronous engine: system calls on the thread that submits.
//!
//! # Where unsafe is
//!
//! This leaf module passes guest memory to the kernel: `preadv` and `pwritev` take addresses.
#![expect(unsafe_code, reason = "preadv and pwritev take the addresses of guest memory")]

use std::collections::VecDeque;
use std::fmt;
use std::fs::File;
use std::io;
use std::os::fd::AsRawFd;
use std::sync::Arc;

use rustix::fs::FallocateFlags;
use rustix::io::Errno;

use super::Engine;
use super::transfer::{Done, Op, Progress, Transfer};
use crate::host_file::health::sync_data;

/// Bytes that one `submit` moves, so that completions are published in between.
pub(crate) const BYTES_PER_SUBMIT: u64 = 128 << 10;

/// Carries transfers out on the worker's thread. For dedicated workers: it blocks on the disk.
#[derive(Debug)]
pub(crate) struct BlockingEngine<T> {
    files: Vec<Arc<File>>,
    queued: VecDeque<Transfer<T>>,
    done: Vec<Done<T>>,
}

impl<T> BlockingEngine<T> {
    /// An engine for `files`; the file of a transfer is an index into them.
    pub(crate) fn new(files: Vec<Arc<File>>) -> Self {
        BlockingEngine { files, queued: VecDeque::new(), done: Vec::new() }
    }
}

impl<T: fmt::Debug + Send> Engine<T> for BlockingEngine<T> {
    fn push(&mut self, transfer: Transfer<T>) {
        self.queued.push_back(transfer);
    }

    /// Carries out queued transfers, up to [`BYTES_PER_SUBMIT`].
    fn submit(&mut self) {
        let mut moved = 0;
        while moved < BYTES_PER_SUBMIT
            && let Some(mut transfer) = self.queued.pop_front()
        {
            moved += transfer.remaining().max(4096);
            let result = carry_out(&mut transfer, &self.files);
            self.done.push(transfer.finish(result));
        }
    }

    fn reap(&mut self, done: &mut Vec<Done<T>>) {
        done.append(&mut self.done);
    }

    fn in_flight(&self) -> usize {
        self.queued.len() + self.done.len()
    }
}

/// Carries out one transfer. Blocks.
pub(crate) fn carry_out<T>(transfer: &mut Transfer<T>, files: &[Arc<File>]) -> Result<(), Errno> {
    let file = &*files[usize::from(transfer.file())];
    loop {
        let result = match transfer.op() {
            Op::Read | Op::Write => read_or_write(transfer, file),
            Op::Sync => errno_of(sync_data(file)),
            Op::WriteBack => start_write_back(file),
            Op::PunchHole => {
                let mode = FallocateFlags::PUNCH_HOLE | FallocateFlags::KEEP_SIZE;
                errno_of(rustix::fs::fallocate(file, mode, transfer.offset(), transfer.remaining()))
            }
            Op::ZeroRange => {
                let mode = FallocateFlags::ZERO_RANGE | FallocateFlags::KEEP_SIZE;
                errno_of(rustix::fs::fallocate(file, mode, transfer.offset(), transfer.remaining()))
            }
        };
        if let Progress::Finished(result) = transfer.advance(result) {
            return result;
        }
    }
}

/// Starts write-back of all dirty pages of `file`. Returns 0 or a negative errno.
fn start_write_back(file: &File) -> i32 {
    // SAFETY: the call takes no address.
    match unsafe { libc::sync_file_range(file.as_raw_fd(), 0, 0, libc::SYNC_FILE_RANGE_WRITE) } {
        0 => 0,
        _ => -io::Error::last_os_error().raw_os_error().unwrap_or(libc::EIO),
    }
}

fn errno_of(result: Result<(), Errno>) -> i32 {
    result.map_or_else(|errno| -errno.raw_os_error(), |()| 0)
}

/// Does one read or write. Returns the byte count or a negative errno.
fn read_or_write<T>(transfer: &Transfer<T>, file: &File) -> i32 {
    let iov = transfer.iov();
    let list = iov.as_ptr().cast::<libc::iovec>();
    // At most `MAX_ENTRIES`, which fits.
    let count = libc::c_int::try_from(iov.len()).unwrap_or(libc::c_int::MAX);
    let offset = transfer.offset().cast_signed();
    let fd = file.as_raw_fd();
    let moved = match (transfer.op(), iov) {
        (Op::Read, [one]) => {
            let to = std::ptr::with_exposed_provenance_mut(one.addr());
            // SAFETY: the iovecs of a transfer are valid while it lives, and those of a read are
            // guest RAM, to which no Rust reference exists (invariant of `Transfer`).
            unsafe { libc::pread(fd, to, one.len(), offset) }
        }
        (Op::Read, _) => {
            // SAFETY: `IoVec` has the layout of `iovec`; the memory it points to is as above.
            unsafe { libc::preadv(fd, list, count, offset) }
        }
        (_, [one]) => {
            let from = std::ptr::with_exposed_provenance(one.addr());
            // SAFETY: the iovecs of a transfer are valid while it lives (invariant of
            // `Transfer`), and only read.
            unsafe { libc::pwrite(fd, from, one.len(), offset) }
        }
        (_, _) => {
            // SAFETY: `IoVec` has the layout of `iovec`; the memory it points to is as above.
            unsafe { libc::pwritev(fd, list, count, offset) }
        }
    };
    match i32::try_from(moved) {
        Ok(-1) => -io::Error::last_os_error().raw_os_error().unwrap_or(libc::EIO),
        Ok(moved) => moved,
        // More than the kernel moves in one call (2^31 - 4096).
        Err(_) => -libc::EIO,
    }
}
