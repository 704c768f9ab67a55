//! Lists of guest memory segments, for `readv`, `writev` and copies.
//!
//! # Invariant
//!
//! Every [`Segment`] lies in guest RAM, because it comes from `vm-memory`'s checked lookup. Guest
//! RAM is never unmapped while the process lives (see [`memory::GuestRam`]). So a segment can be
//! read and written at any time, whatever the guest does.
//!
//! # Where unsafe is
//!
//! This is a leaf module: it passes addresses of guest memory to the kernel, and copies from and to
//! guest memory.
#![expect(unsafe_code, reason = "readv and writev take the addresses of guest memory")]

use std::os::fd::{AsRawFd, BorrowedFd};

use memory::GuestRam;
use rustix::io::Errno;
use vm_memory::VolatileSlice;
use vm_memory::bitmap::Bitmap;

use virtio::queue::{Buffers, QueueError};

/// Most segments in one system call, besides a head and a tail in the monitor's memory (`IOV_MAX`
/// is 1024).
pub(crate) const MAX_SEGMENTS: usize = 1022;

/// Capacity that an emptied list keeps, in entries: the most that one system call takes.
const KEPT_CAPACITY: usize = MAX_SEGMENTS + 2;

/// A range of guest memory, in the layout of `struct iovec`.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[repr(C)]
pub(crate) struct Segment {
    addr: usize,
    len: usize,
}

const _: () = assert!(size_of::<Segment>() == size_of::<libc::iovec>());
const _: () = assert!(align_of::<Segment>() == align_of::<libc::iovec>());

/// Whether segments are read or written.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Access {
    /// The segments are read.
    Read,
    /// The segments are written. Their pages are marked dirty when they are added, because writes
    /// of the kernel are not tracked.
    Write,
}

/// Guest memory segments in order.
#[derive(Debug)]
pub(crate) struct Segments {
    /// One entry for the head of [`Segments::write_to`], then the segments.
    list: Vec<Segment>,
    len: usize,
}

impl Segments {
    pub(crate) fn new() -> Self {
        Segments { list: vec![Segment { addr: 0, len: 0 }], len: 0 }
    }

    /// Bytes in all segments.
    pub(crate) fn len(&self) -> usize {
        self.len
    }

    /// Number of segments.
    pub(crate) fn count(&self) -> usize {
        self.list.len() - 1
    }

    pub(crate) fn clear(&mut self) {
        self.list.truncate(1);
        self.len = 0;
        self.shrink();
    }

    /// Frees the memory of a list that was long once.
    fn shrink(&mut self) {
        if self.list.capacity() > 2 * KEPT_CAPACITY && self.list.len() <= KEPT_CAPACITY {
            self.list.shrink_to(KEPT_CAPACITY);
        }
    }

    /// Appends each of `buffers` as one segment.
    pub(crate) fn push(
        &mut self,
        ram: &GuestRam,
        buffers: &Buffers<'_>,
        access: Access,
    ) -> Result<(), QueueError> {
        for buffer in buffers.iter() {
            let slice = buffer.slice(ram)?;
            if access == Access::Write {
                slice.bitmap().mark_dirty(0, slice.len());
            }
            let addr = slice.ptr_guard_mut().as_ptr().expose_provenance();
            self.list.push(Segment { addr, len: slice.len() });
            self.len += slice.len();
        }
        Ok(())
    }

    /// Drops the first `count` segments.
    pub(crate) fn drop_front(&mut self, count: usize) {
        for dropped in self.list.drain(1..=count) {
            self.len -= dropped.len;
        }
        self.shrink();
    }

    /// Writes `head` and then all segments to `fd`, in one system call.
    pub(crate) fn write_to(&mut self, fd: BorrowedFd<'_>, head: &[u8]) -> Result<usize, Errno> {
        self.list[0] = Segment { addr: head.as_ptr().expose_provenance(), len: head.len() };
        let list = if head.is_empty() { &self.list[1..] } else { &self.list[..] };
        // SAFETY: `head` is borrowed for the call and only read. The segments are guest RAM (see
        // the invariant of the module). The kernel reads `list.len()` entries, each laid out as a
        // `struct iovec`.
        let written = unsafe { libc::writev(fd.as_raw_fd(), list.as_ptr().cast(), count_of(list)) };
        result(written)
    }

    /// Reads from `fd` into the first `count` segments and then into `tail`, in one system call.
    pub(crate) fn read_from(
        &mut self,
        fd: BorrowedFd<'_>,
        count: usize,
        tail: &mut [u8],
    ) -> Result<usize, Errno> {
        let after = 1 + count;
        let displaced = self.list.get(after).copied();
        let entry = Segment { addr: tail.as_mut_ptr().expose_provenance(), len: tail.len() };
        match displaced {
            Some(_) => self.list[after] = entry,
            None => self.list.push(entry),
        }
        let list = &self.list[1..=after];
        // SAFETY: `tail` is exclusively borrowed for the call, and any bytes may be written to it.
        // The segments are guest RAM (see the invariant of the module). The kernel reads
        // `list.len()` entries, each laid out as a `struct iovec`.
        let read = unsafe { libc::readv(fd.as_raw_fd(), list.as_ptr().cast(), count_of(list)) };
        match displaced {
            Some(segment) => self.list[after] = segment,
            None => {
                self.list.pop();
            }
        }
        result(read)
    }

    /// Length of the segment `index`.
    pub(crate) fn len_of(&self, index: usize) -> usize {
        self.list[1 + index].len
    }

    /// Copies `data` into the segments, beginning at the byte `offset`. Excess data is ignored.
    pub(crate) fn copy_in(&self, offset: usize, data: &[u8]) {
        let mut rest = data;
        self.each(offset, |slice| {
            let (now, later) = rest.split_at(rest.len().min(slice.len()));
            slice.copy_from(now);
            rest = later;
            !rest.is_empty()
        });
    }

    /// Appends the bytes of all segments to `data`, beginning at the byte `offset`.
    pub(crate) fn copy_out(&self, offset: usize, data: &mut Vec<u8>) {
        self.each(offset, |slice| {
            let at = data.len();
            data.resize(at + slice.len(), 0);
            slice.copy_to(&mut data[at..]);
            true
        });
    }

    /// Calls `f` for each segment, beginning at the byte `offset`, until it returns false.
    fn each(&self, offset: usize, mut f: impl FnMut(VolatileSlice<'_>) -> bool) {
        let mut skip = offset;
        for segment in &self.list[1..] {
            if skip >= segment.len {
                skip -= segment.len;
                continue;
            }
            let start = std::ptr::with_exposed_provenance_mut::<u8>(segment.addr + skip);
            // SAFETY: the segment is guest RAM (see the invariant of the module), and `skip` is
            // less than its length. No reference into guest memory exists: all accesses are
            // volatile.
            let slice = unsafe { VolatileSlice::new(start, segment.len - skip) };
            if !f(slice) {
                return;
            }
            skip = 0;
        }
    }
}

/// Number of entries for the kernel to read: at most [`MAX_SEGMENTS`] + 2.
fn count_of(list: &[Segment]) -> libc::c_int {
    libc::c_int::try_from(list.len()).unwrap_or(libc::c_int::MAX)
}

fn result(returned: libc::ssize_t) -> Result<usize, Errno> {
    usize::try_from(returned).map_err(|_| {
        let error = std::io::Error::last_os_error();
        Errno::from_io_error(&error).unwrap_or(Errno::IO)
    })
}

#[cfg(test)]
mod tests {
    use std::os::fd::AsFd;

    use super::*;
    use virtio::queue::Chain;
    use virtio::testing::{DriverQueue, guest_ram};

    /// The writable buffers of a chain, as segments.
    fn segments(ram: &GuestRam, buffers: &[(u64, u32)]) -> Segments {
        let mut driver = DriverQueue::new(ram, 0x1000, 16, 0);
        let mut queue =
            virtio::queue::Queue::new(0, 16, &driver.state(), 0, ram, std::sync::Arc::default()).unwrap();
        driver.add(&[], buffers).unwrap();
        driver.publish();
        let mut chain = Chain::new();
        assert!(queue.pop(&mut chain).unwrap());
        let mut segments = Segments::new();
        segments.push(ram, &chain.writable(), Access::Write).unwrap();
        segments
    }

    fn pair() -> (std::os::unix::net::UnixDatagram, std::os::unix::net::UnixDatagram) {
        let (a, b) = std::os::unix::net::UnixDatagram::pair().unwrap();
        b.set_nonblocking(true).unwrap();
        (a, b)
    }

    #[test]
    fn copies_cross_segments_and_stop_at_the_end() {
        let ram = guest_ram(1);
        let segments = segments(&ram, &[(0x8000, 3), (0x9000, 4)]);
        segments.copy_in(1, b"abcdefghij");
        let mut out = Vec::new();
        segments.copy_out(0, &mut out);
        assert_eq!(out, b"\0abcdef");
        out.clear();
        segments.copy_out(4, &mut out);
        assert_eq!(out, b"def");
        segments.copy_in(7, b"x");
        assert_eq!((segments.len(), segments.count()), (7, 2));
    }

    #[test]
    fn read_beyond_the_segments_goes_to_the_tail() {
        let ram = guest_ram(1);
        let mut segments = segments(&ram, &[(0x8000, 3), (0x9000, 4), (0xa000, 4)]);
        let (a, b) = pair();
        a.send(b"0123456789").unwrap();
        let mut tail = [0; 2];
        assert_eq!(segments.read_from(b.as_fd(), 2, &mut tail), Ok(9));
        assert_eq!(&tail, b"78");
        let mut out = Vec::new();
        segments.copy_out(0, &mut out);
        assert_eq!(out, b"0123456\0\0\0\0", "the segment after those of the read is unchanged");
        assert_eq!(segments.read_from(b.as_fd(), 3, &mut tail), Err(Errno::AGAIN));
        assert_eq!(segments.count(), 3);
    }

    #[test]
    fn head_is_written_before_the_segments() {
        let ram = guest_ram(1);
        let mut segments = segments(&ram, &[(0x8000, 2), (0x9000, 2)]);
        segments.copy_in(0, b"cdef");
        let (a, b) = pair();
        assert_eq!(segments.write_to(a.as_fd(), b"ab"), Ok(6));
        assert_eq!(segments.write_to(a.as_fd(), b""), Ok(4));
        let mut got = [0; 16];
        assert_eq!(b.recv(&mut got).unwrap(), 6);
        assert_eq!(&got[..6], b"abcdef");
        assert_eq!(b.recv(&mut got).unwrap(), 4);
    }

    #[test]
    fn segments_are_dropped_from_the_front() {
        let ram = guest_ram(1);
        let mut segments = segments(&ram, &[(0x8000, 1), (0x9000, 2), (0xa000, 4)]);
        segments.drop_front(1);
        assert_eq!((segments.len(), segments.len_of(0)), (6, 2));
        segments.clear();
        assert_eq!((segments.len(), segments.count()), (0, 0));
    }
}
