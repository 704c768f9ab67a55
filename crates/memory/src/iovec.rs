//! Guest buffers as lists of `struct iovec`, for system calls that read or write guest memory in
//! place.
//!
//! This is the one module that turns guest buffers into addresses for the kernel. (KVM and vhost
//! get the addresses of regions and rings.) A device adds the buffers of a request to a
//! [`GuestIoVec`] and has the kernel read or write them: with the system calls below, or with its
//! own on [`GuestIoVec::entries`] (`preadv`, io_uring).
//!
//! # Invariant
//!
//! Each entry of a [`GuestIoVec`] lies in guest RAM. `push` and `push_merged` take it from
//! `vm-memory`'s checked lookup; all other methods only shorten, copy or remove entries. Guest RAM
//! is never unmapped while the process lives (see [`GuestRam`]), so an entry stays valid even if
//! the guest's RAM is dropped. The guest may change the memory at any time; no Rust reference into
//! it exists.
//!
//! # Dirty pages
//!
//! The bitmap of the monitor's writes does not see what the kernel writes. So `push` and
//! `push_merged` mark a buffer that is written ([`Access::Write`]), or the device marks what was
//! written afterwards ([`GuestIoVec::mark_dirty`]).
//!
//! # Speed
//!
//! This crate is compiled for size. What runs for each buffer is `#[inline]`, and so compiled for
//! speed with the device that calls it.
//!
//! # Unsafe code
//!
//! This is a leaf module: its unsafe blocks are the system calls and the volatile copies.
#![expect(unsafe_code, reason = "the system calls take the addresses of guest memory")]

use std::os::fd::{AsRawFd, BorrowedFd};

use rustix::io::Errno;
use vm_memory::bitmap::Bitmap;
use vm_memory::{GuestAddress, GuestMemoryBackend, VolatileSlice};

use crate::ram::GuestRam;

/// The most entries that one system call takes (`UIO_MAXIOV`), own headers included.
pub const MAX_ENTRIES: usize = 1024;

/// One contiguous range of this process's memory, in the layout of `struct iovec`.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[repr(C)]
pub struct IoVec {
    addr: usize,
    len: usize,
}

const _: () = assert!(size_of::<IoVec>() == size_of::<libc::iovec>());
const _: () = assert!(align_of::<IoVec>() == align_of::<libc::iovec>());

impl IoVec {
    /// An entry for memory that is not the guest's, such as a header. It keeps no borrow: the
    /// memory must outlive every system call that takes the entry.
    #[inline]
    pub fn of(bytes: &[u8]) -> Self {
        IoVec { addr: bytes.as_ptr().expose_provenance(), len: bytes.len() }
    }

    /// First host address. Its provenance is exposed.
    #[inline]
    pub fn addr(&self) -> usize {
        self.addr
    }

    /// Length in bytes.
    #[inline]
    pub fn len(&self) -> usize {
        self.len
    }

    /// Whether it has no bytes.
    #[inline]
    pub fn is_empty(&self) -> bool {
        self.len == 0
    }

    /// Drops the first `count` bytes. Panics if there are fewer.
    #[inline]
    pub fn advance(&mut self, count: usize) {
        assert!(count <= self.len, "{count} of {} bytes", self.len);
        self.addr += count;
        self.len -= count;
    }
}

/// What the device does with a guest buffer.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Access {
    /// The device reads it.
    Read,
    /// The device writes it. All of its pages are marked as dirty when it is pushed.
    Write,
    /// The device writes a part of it and then calls [`GuestIoVec::mark_dirty`].
    WriteUnmarked,
}

/// A guest buffer that is not in one region of guest RAM.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error("guest buffer {addr:#x}: not in guest RAM: {len} bytes")]
pub struct OutsideRam {
    /// First guest-physical address.
    pub addr: u64,
    /// Length in bytes.
    pub len: u64,
}

/// What [`GuestIoVec::receive`] received.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Received {
    /// Bytes written to the entries; 0 at the end of a stream.
    pub len: usize,
    /// The peer sent descriptors, which were dropped (`MSG_CTRUNC`). The kernel stops before the
    /// data that follows them, so there may be more data although the entries were not full.
    pub dropped_descriptors: bool,
}

/// Guest buffers in order, as a list of `struct iovec`. Reusable: [`clear`](Self::clear) keeps the
/// allocation.
#[derive(Debug, Default)]
pub struct GuestIoVec {
    /// Empty, or a slot for a header followed by the entries. The slot is used within a call only.
    list: Vec<IoVec>,
    /// Bytes in all entries.
    len: u64,
}

impl GuestIoVec {
    /// An empty list. It allocates nothing.
    pub const fn new() -> Self {
        GuestIoVec { list: Vec::new(), len: 0 }
    }

    /// Appends the guest buffer of `len` bytes at `addr` as an entry of its own.
    #[inline]
    pub fn push(&mut self, ram: &GuestRam, addr: u64, len: usize, access: Access) -> Result<(), OutsideRam> {
        let entry = Self::entry(ram, addr, len, access)?;
        self.append(entry);
        Ok(())
    }

    /// [`Self::push`], but extends the last entry if the buffer follows it directly.
    #[inline]
    pub fn push_merged(
        &mut self,
        ram: &GuestRam,
        addr: u64,
        len: usize,
        access: Access,
    ) -> Result<(), OutsideRam> {
        let entry = Self::entry(ram, addr, len, access)?;
        match self.list.get_mut(1..).and_then(<[_]>::last_mut) {
            Some(last) if last.addr + last.len == entry.addr => {
                last.len += entry.len;
                self.len += entry.len as u64;
            }
            _ => self.append(entry),
        }
        Ok(())
    }

    /// Appends the `len` bytes at `offset` of `from`. Panics if `from` has fewer.
    #[inline]
    pub fn push_part(&mut self, from: &GuestIoVec, offset: u64, len: u64) {
        assert!(offset.checked_add(len).is_some_and(|end| end <= from.len), "{len} bytes at {offset}");
        let (mut skip, mut left) = (offset as usize, len as usize);
        for entry in from.entries() {
            if left == 0 {
                break;
            }
            if skip >= entry.len {
                skip -= entry.len;
                continue;
            }
            let take = left.min(entry.len - skip);
            self.append(IoVec { addr: entry.addr + skip, len: take });
            left -= take;
            skip = 0;
        }
    }

    #[inline]
    fn entry(ram: &GuestRam, addr: u64, len: usize, access: Access) -> Result<IoVec, OutsideRam> {
        let slice = ram.memory().get_slice(GuestAddress(addr), len);
        let slice = slice.map_err(|_| OutsideRam { addr, len: len as u64 })?;
        if access == Access::Write {
            slice.bitmap().mark_dirty(0, slice.len());
        }
        Ok(IoVec { addr: slice.ptr_guard_mut().as_ptr().expose_provenance(), len: slice.len() })
    }

    #[inline]
    fn append(&mut self, entry: IoVec) {
        if self.list.is_empty() {
            self.list.push(IoVec { addr: 0, len: 0 });
        }
        self.list.push(entry);
        self.len += entry.len as u64;
    }

    /// The entries in order.
    #[inline]
    pub fn entries(&self) -> &[IoVec] {
        self.list.get(1..).unwrap_or_default()
    }

    /// Bytes in all entries.
    #[inline]
    pub fn len(&self) -> u64 {
        self.len
    }

    /// Whether there are no bytes.
    #[inline]
    pub fn is_empty(&self) -> bool {
        self.len == 0
    }

    /// Removes all entries. Keeps the allocation, unless it is of a very long list.
    #[inline]
    pub fn clear(&mut self) {
        self.list.truncate(1);
        self.len = 0;
        self.shrink();
    }

    /// Removes the first `count` entries. Panics if there are fewer.
    #[inline]
    pub fn drop_front(&mut self, count: usize) {
        assert!(count <= self.entries().len(), "{count} of {} entries", self.entries().len());
        if count > 0 {
            self.len -= self.list.drain(1..=count).map(|entry| entry.len as u64).sum::<u64>();
            self.shrink();
        }
    }

    /// Drops the first `count` bytes of the entry `index`. Panics if it has fewer.
    #[inline]
    pub fn advance(&mut self, index: usize, count: usize) {
        self.list[1 + index].advance(count);
        self.len -= count as u64;
    }

    /// Frees the memory of a list that was long and is short now.
    #[inline]
    fn shrink(&mut self) {
        const KEPT: usize = MAX_ENTRIES + 1;
        if self.list.capacity() > 2 * KEPT && self.list.len() <= KEPT {
            self.list.shrink_to(KEPT);
        }
    }

    /// Marks the pages of the first `len` bytes as written by the monitor. `ram` is what the
    /// buffers were pushed from.
    #[inline]
    pub fn mark_dirty(&self, ram: &GuestRam, len: u64) {
        let mut left = len;
        for entry in self.entries() {
            if left == 0 {
                break;
            }
            let start = entry.addr as u64;
            let end = start + left.min(entry.len as u64);
            left -= end - start;
            // A merged entry may reach from one region into the next.
            for (index, region) in ram.regions().iter().enumerate() {
                let first = start.max(region.host_addr);
                let last = end.min(region.host_addr + region.size);
                if first < last {
                    ram.mark_written(index, first - region.host_addr, last - first);
                }
            }
        }
    }

    /// Writes `head` and then all entries to `fd` (`writev`). Returns the number of bytes written.
    pub fn write_to(&mut self, fd: BorrowedFd<'_>, head: &[u8]) -> Result<usize, Errno> {
        let head = IoVec::of(head);
        let list = match self.list.first_mut() {
            None => std::slice::from_ref(&head),
            Some(_) if head.is_empty() => self.entries(),
            Some(slot) => {
                *slot = head;
                &self.list
            }
        };
        // SAFETY: `head` is borrowed for the call, the others are guest RAM (invariant of the
        // module), and the kernel only reads them. `list` has `list.len()` entries in the layout of
        // `struct iovec`.
        let written = unsafe { libc::writev(fd.as_raw_fd(), list.as_ptr().cast(), count_of(list)) };
        checked(written)
    }

    /// Reads from `fd` into the first `count` entries and, once they are full, into `tail`
    /// (`readv`). Returns the number of bytes read. Panics if there are fewer entries.
    pub fn read_from(&mut self, fd: BorrowedFd<'_>, count: usize, tail: &mut [u8]) -> Result<usize, Errno> {
        assert!(count <= self.entries().len(), "{count} of {} entries", self.entries().len());
        let own = IoVec { addr: tail.as_mut_ptr().expose_provenance(), len: tail.len() };
        if self.list.is_empty() {
            self.list.push(own);
        }
        let after = 1 + count;
        let displaced = self.list.get(after).copied();
        match displaced {
            Some(_) => self.list[after] = own,
            None => self.list.push(own),
        }
        let list = &self.list[1..=after];
        // SAFETY: `tail` is exclusively borrowed for the call and takes any bytes. The others are
        // guest RAM (invariant of the module). `list` has `list.len()` entries in the layout of
        // `struct iovec`.
        let read = unsafe { libc::readv(fd.as_raw_fd(), list.as_ptr().cast(), count_of(list)) };
        let read = checked(read);
        match displaced {
            Some(entry) => self.list[after] = entry,
            None => self.list.truncate(after),
        }
        read
    }

    /// Receives from the socket `fd` into the entries, without waiting (`recvmsg`). Marks no page
    /// as dirty: see [`Self::mark_dirty`].
    pub fn receive(&self, fd: BorrowedFd<'_>) -> Result<Received, Errno> {
        let mut message = self.message();
        // SAFETY: the message has no name and no control data. Its entries are guest RAM (invariant
        // of the module), and the kernel writes to no other memory.
        let got = unsafe { libc::recvmsg(fd.as_raw_fd(), &raw mut message, libc::MSG_DONTWAIT) };
        Ok(Received { len: checked(got)?, dropped_descriptors: message.msg_flags & libc::MSG_CTRUNC != 0 })
    }

    /// Sends the entries to the socket `fd`, without waiting and without `SIGPIPE` (`sendmsg`).
    /// Returns the number of bytes sent.
    pub fn send(&self, fd: BorrowedFd<'_>) -> Result<usize, Errno> {
        let message = self.message();
        let flags = libc::MSG_DONTWAIT | libc::MSG_NOSIGNAL;
        // SAFETY: the message has no name and no control data. Its entries are guest RAM (invariant
        // of the module), and the kernel only reads them.
        let sent = unsafe { libc::sendmsg(fd.as_raw_fd(), &raw const message, flags) };
        checked(sent)
    }

    fn message(&self) -> libc::msghdr {
        // SAFETY: all zeros is a message without name, entries and control data.
        let mut message: libc::msghdr = unsafe { std::mem::zeroed() };
        // The kernel does not write to the list itself.
        message.msg_iov = self.entries().as_ptr().cast_mut().cast();
        message.msg_iovlen = self.entries().len() as _;
        message
    }

    /// Copies `data` to the entries from byte `offset` on. What does not fit is not copied. Marks
    /// no page as dirty.
    #[inline]
    pub fn copy_in(&self, offset: usize, data: &[u8]) {
        let mut rest = data;
        self.for_each_slice(offset, |slice| {
            let (now, later) = rest.split_at(rest.len().min(slice.len()));
            slice.copy_from(now);
            rest = later;
            !rest.is_empty()
        });
    }

    /// Appends the bytes of the entries from byte `offset` on to `data`.
    #[inline]
    pub fn copy_out(&self, offset: usize, data: &mut Vec<u8>) {
        self.for_each_slice(offset, |slice| {
            let at = data.len();
            data.resize(at + slice.len(), 0);
            slice.copy_to(&mut data[at..]);
            true
        });
    }

    /// Calls `f` for each entry from byte `offset` on, until it returns false.
    #[inline]
    fn for_each_slice(&self, offset: usize, mut f: impl FnMut(VolatileSlice<'_>) -> bool) {
        let mut skip = offset;
        for entry in self.entries() {
            if skip >= entry.len {
                skip -= entry.len;
                continue;
            }
            let start = std::ptr::with_exposed_provenance_mut::<u8>(entry.addr + skip);
            // SAFETY: the entry is guest RAM (invariant of the module), `skip` is less than its
            // length, and no reference into guest memory exists: all accesses are volatile.
            let slice = unsafe { VolatileSlice::new(start, entry.len - skip) };
            if !f(slice) {
                return;
            }
            skip = 0;
        }
    }
}

impl PartialEq for GuestIoVec {
    fn eq(&self, other: &Self) -> bool {
        self.entries() == other.entries()
    }
}

impl Eq for GuestIoVec {}

/// The number of entries, for a system call. More than [`MAX_ENTRIES`] are `EINVAL`.
fn count_of(list: &[IoVec]) -> libc::c_int {
    libc::c_int::try_from(list.len()).unwrap_or(libc::c_int::MAX)
}

fn checked(returned: libc::ssize_t) -> Result<usize, Errno> {
    usize::try_from(returned).map_err(|_| {
        let error = std::io::Error::last_os_error();
        Errno::from_io_error(&error).unwrap_or(Errno::IO)
    })
}

#[cfg(test)]
mod tests {
    use std::io::Read;
    use std::os::fd::AsFd;
    use std::os::unix::net::{UnixDatagram, UnixStream};

    use config::HugePages;
    use proptest::prelude::*;
    use vm_memory::Bytes;

    use super::*;
    use crate::layout::MIB;
    use crate::pages::PAGE;

    fn ram() -> GuestRam {
        GuestRam::map(1, HugePages::None, true).unwrap()
    }

    fn list(ram: &GuestRam, buffers: &[(u64, usize)]) -> GuestIoVec {
        let mut list = GuestIoVec::new();
        for (addr, len) in buffers {
            list.push(ram, *addr, *len, Access::WriteUnmarked).unwrap();
        }
        list
    }

    /// Offset in the guest's memory and length of each entry.
    fn layout(ram: &GuestRam, list: &GuestIoVec) -> Vec<(usize, usize)> {
        let host = ram.regions()[0].host_addr as usize;
        list.entries().iter().map(|entry| (entry.addr - host, entry.len)).collect()
    }

    fn bytes(list: &GuestIoVec) -> Vec<u8> {
        let mut bytes = Vec::new();
        list.copy_out(0, &mut bytes);
        bytes
    }

    fn dirty(ram: &GuestRam) -> Vec<u64> {
        ram.take_monitor_dirty_pages().unwrap().runs(0).flatten().collect()
    }

    fn datagrams() -> (UnixDatagram, UnixDatagram) {
        let (a, b) = UnixDatagram::pair().unwrap();
        b.set_nonblocking(true).unwrap();
        (a, b)
    }

    #[test]
    fn adjacent_buffers_merge_only_on_request() {
        let ram = ram();
        let buffers = [(4096, 4096), (8192, 512), (4096, 512)];
        let mut merged = GuestIoVec::new();
        for (addr, len) in buffers {
            merged.push_merged(&ram, addr, len, Access::Read).unwrap();
        }
        assert_eq!(layout(&ram, &merged), [(4096, 4608), (4096, 512)]);
        assert_eq!(merged.len(), 5120);
        assert_eq!(layout(&ram, &list(&ram, &buffers)).len(), 3);
    }

    #[test]
    fn buffer_outside_ram_is_refused() {
        let ram = ram();
        let mut list = GuestIoVec::new();
        for (addr, len) in
            [(MIB, 1), (MIB - 1, 2), (u64::MAX, 1), (u64::MAX - 1, usize::MAX), (0, usize::MAX)]
        {
            let refused = Err(OutsideRam { addr, len: len as u64 });
            assert_eq!(list.push(&ram, addr, len, Access::Write), refused);
            assert_eq!(list.push_merged(&ram, addr, len, Access::Write), refused);
        }
        assert!(list.is_empty() && list.entries().is_empty());
        assert_eq!(dirty(&ram), [] as [u64; 0]);
    }

    #[test]
    fn push_marks_only_written_buffers_dirty() {
        let ram = ram();
        let mut list = GuestIoVec::new();
        list.push(&ram, 0, 4096, Access::Read).unwrap();
        list.push(&ram, 3 * 4096, 4096, Access::WriteUnmarked).unwrap();
        list.push(&ram, 8192 - 1, 2, Access::Write).unwrap();
        assert_eq!(dirty(&ram), [1, 2]);
    }

    #[test]
    fn mark_dirty_stops_at_the_written_length() {
        let ram = ram();
        let list = list(&ram, &[(PAGE, 2 * PAGE as usize), (5 * PAGE, 100), (7 * PAGE, 100)]);
        for (len, pages) in [
            (0, vec![]),
            (1, vec![1]),
            (PAGE + 1, vec![1, 2]),
            (2 * PAGE + 1, vec![1, 2, 5]),
            (u64::MAX, vec![1, 2, 5, 7]),
        ] {
            list.mark_dirty(&ram, len);
            assert_eq!(dirty(&ram), pages, "{len}");
        }
    }

    #[test]
    fn mark_dirty_finds_the_region_of_each_entry() {
        let ram = GuestRam::map(3 * 1024 + 1, HugePages::None, true).unwrap();
        let high = ram.regions()[1].guest_addr;
        let list = list(&ram, &[(high + 2 * PAGE, 1), (4 * PAGE, 1)]);
        list.mark_dirty(&ram, 2);
        let taken = ram.take_monitor_dirty_pages().unwrap();
        let pages = |region| taken.runs(region).flatten().collect::<Vec<_>>();
        assert_eq!([pages(0), pages(1)], [[4], [2]]);
    }

    #[test]
    fn push_part_cuts_entries_at_its_ends() {
        let ram = ram();
        let all = list(&ram, &[(0, 1000), (8192, 1000), (16384, 1000)]);
        let mut part = GuestIoVec::new();
        part.push_part(&all, 500, 2000);
        assert_eq!(layout(&ram, &part), [(500, 500), (8192, 1000), (16384, 500)]);
        assert_eq!(part.len(), 2000);
    }

    #[test]
    fn entries_are_dropped_and_shortened_from_the_front() {
        let ram = ram();
        let mut list = list(&ram, &[(0x8000, 1), (0x9000, 2), (0xa000, 4)]);
        list.drop_front(0);
        list.drop_front(1);
        list.advance(1, 3);
        assert_eq!((layout(&ram, &list), list.len()), (vec![(0x9000, 2), (0xa003, 1)], 3));
        list.clear();
        assert!(list.is_empty() && list.entries().is_empty());
    }

    #[test]
    fn long_list_frees_its_memory() {
        let ram = ram();
        let mut list = list(&ram, &vec![(0, 1); 3 * MAX_ENTRIES]);
        list.drop_front(2 * MAX_ENTRIES);
        assert!(list.list.capacity() < 2 * MAX_ENTRIES && list.entries().len() == MAX_ENTRIES);
        let capacity = list.list.capacity();
        list.clear();
        assert_eq!(list.list.capacity(), capacity, "a list of usual length keeps its memory");
    }

    #[test]
    fn copies_cross_entries_and_stop_at_the_end() {
        let ram = ram();
        let list = list(&ram, &[(0x8000, 3), (0x9000, 4)]);
        list.copy_in(1, b"abcdefghij");
        assert_eq!(bytes(&list), b"\0abcdef");
        let mut end = Vec::new();
        list.copy_out(4, &mut end);
        assert_eq!(end, b"def");
        list.copy_in(7, b"x");
        assert_eq!((list.len(), list.entries().len()), (7, 2));
    }

    #[test]
    fn read_from_puts_the_excess_into_the_tail() {
        let ram = ram();
        let mut list = list(&ram, &[(0x8000, 3), (0x9000, 4), (0xa000, 4)]);
        let (a, b) = datagrams();
        a.send(b"0123456789").unwrap();
        let mut tail = [0; 2];
        assert_eq!(list.read_from(b.as_fd(), 2, &mut tail), Ok(9));
        assert_eq!(&tail, b"78");
        assert_eq!(bytes(&list), b"0123456\0\0\0\0", "an entry that was not read into has changed");
        assert_eq!(list.read_from(b.as_fd(), 3, &mut tail), Err(Errno::AGAIN));
        assert_eq!(list.entries().len(), 3);
    }

    #[test]
    fn write_to_sends_the_head_before_the_entries() {
        let ram = ram();
        let mut list = list(&ram, &[(0x8000, 2), (0x9000, 2)]);
        list.copy_in(0, b"cdef");
        let (a, b) = datagrams();
        assert_eq!(list.write_to(a.as_fd(), b"ab"), Ok(6));
        assert_eq!(list.write_to(a.as_fd(), b""), Ok(4));
        let mut got = [0; 16];
        assert_eq!(b.recv(&mut got).unwrap(), 6);
        assert_eq!(&got[..6], b"abcdef");
        assert_eq!(b.recv(&mut got).unwrap(), 4);
    }

    #[test]
    fn empty_list_reads_and_writes_only_own_memory() {
        let mut list = GuestIoVec::new();
        let (a, b) = datagrams();
        assert_eq!(list.write_to(a.as_fd(), b"ab"), Ok(2));
        let mut tail = [0; 4];
        assert_eq!(list.read_from(b.as_fd(), 0, &mut tail), Ok(2));
        assert_eq!((&tail[..2], list.entries().len(), list.len()), (&b"ab"[..], 0, 0));
    }

    #[test]
    fn send_and_receive_report_lengths_and_errors() {
        let ram = ram();
        let out = list(&ram, &[(0, 2), (0x1000, 2)]);
        out.copy_in(0, b"abcd");
        let into = list(&ram, &[(0x3000, 3), (0x4000, 3)]);
        let (mut a, b) = UnixStream::pair().unwrap();
        assert_eq!(into.receive(b.as_fd()), Err(Errno::AGAIN));
        assert_eq!(out.send(a.as_fd()), Ok(4));
        assert_eq!(into.receive(b.as_fd()), Ok(Received { len: 4, dropped_descriptors: false }));
        assert_eq!(bytes(&into), b"abcd\0\0");
        assert_eq!(out.send(b.as_fd()), Ok(4));
        let mut got = [0; 4];
        a.read_exact(&mut got).unwrap();
        assert_eq!(&got, b"abcd");
        drop(a);
        assert_eq!(into.receive(b.as_fd()).map(|received| received.len), Ok(0));
        assert_eq!(out.send(b.as_fd()), Err(Errno::PIPE));
    }

    #[test]
    fn receive_reports_dropped_descriptors() {
        use rustix::net::{SendAncillaryBuffer, SendAncillaryMessage, SendFlags, sendmsg};
        let ram = ram();
        let into = list(&ram, &[(0, 16)]);
        let (a, b) = UnixStream::pair().unwrap();
        let mut space = [std::mem::MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(1))];
        let mut ancillary = SendAncillaryBuffer::new(&mut space);
        let fds = [a.as_fd()];
        assert!(ancillary.push(SendAncillaryMessage::ScmRights(&fds)));
        sendmsg(&a, &[std::io::IoSlice::new(b"fd")], &mut ancillary, SendFlags::empty()).unwrap();
        assert_eq!(into.receive(b.as_fd()), Ok(Received { len: 2, dropped_descriptors: true }));
    }

    #[test]
    fn entries_stay_valid_after_the_ram_is_dropped() {
        let ram = ram();
        ram.memory().write_obj(7u8, GuestAddress(0)).unwrap();
        let list = list(&ram, &[(0, 1)]);
        drop(ram);
        assert_eq!(bytes(&list), [0]);
    }

    proptest! {
        /// Any part of any list has the bytes of that part.
        #[test]
        fn parts_and_copies_match_flat_bytes(
            lens in proptest::collection::vec(1usize..50, 1..8),
            offset in any::<proptest::sample::Index>(),
            len in any::<proptest::sample::Index>(),
        ) {
            let ram = ram();
            let buffers: Vec<_> = lens.iter().enumerate().map(|(n, len)| (n as u64 * PAGE, *len)).collect();
            let all = list(&ram, &buffers);
            let flat: Vec<u8> = (0..all.len()).map(|n| n as u8).collect();
            all.copy_in(0, &flat);
            let offset = offset.index(flat.len());
            let len = len.index(flat.len() - offset + 1);
            let mut part = GuestIoVec::new();
            part.push_part(&all, offset as u64, len as u64);
            prop_assert_eq!(bytes(&part), &flat[offset..offset + len]);
            prop_assert_eq!(part.len(), len as u64);
            let mut rest = Vec::new();
            all.copy_out(offset, &mut rest);
            prop_assert_eq!(rest, &flat[offset..]);
        }
    }
}
