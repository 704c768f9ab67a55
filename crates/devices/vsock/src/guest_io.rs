//! Socket I/O on guest memory, without copies.
//!
//! # Unsafe code
//!
//! This is a leaf module: `recvmsg` and `sendmsg` take addresses of guest memory.
//!
//! # Invariant
//!
//! Every segment lies in guest RAM, as it is from `vm-memory`'s checked lookup. Guest RAM is not
//! unmapped while a clone of the [`GuestRam`] exists, and [`Segments`] has one. Only the kernel
//! dereferences the addresses. The guest may change the memory meanwhile.
#![expect(unsafe_code, reason = "recvmsg and sendmsg take the addresses of guest memory")]

use std::os::fd::{AsFd, AsRawFd};

use memory::GuestRam;
use rustix::io::Errno;
use vm_memory::bitmap::Bitmap;

use virtio::queue::{Buffers, GuestBuffer, QueueError};

/// Maximum number of segments that the kernel takes at once (`UIO_MAXIOV`).
pub(crate) const MAX_SEGMENTS: usize = 1024;

/// A list of ranges of guest memory. Reusable.
pub(crate) struct Segments {
    ram: GuestRam,
    iovecs: Vec<libc::iovec>,
    buffers: Vec<GuestBuffer>,
    len: u32,
}

// SAFETY: only the kernel dereferences the pointers, in calls that this value makes while `ram`
// keeps their memory mapped. It does not matter which thread makes the calls.
unsafe impl Send for Segments {}

impl Segments {
    /// An empty list.
    pub(crate) fn new(ram: GuestRam) -> Self {
        Segments { ram, iovecs: Vec::new(), buffers: Vec::new(), len: 0 }
    }

    /// Removes all segments. Keeps the allocation.
    pub(crate) fn clear(&mut self) {
        self.iovecs.clear();
        self.buffers.clear();
        self.len = 0;
    }

    /// Bytes in all segments.
    pub(crate) fn len(&self) -> u32 {
        self.len
    }

    /// Appends the first bytes of `buffers`, at most `limit`, and no more segments than the kernel
    /// takes. Returns the number of bytes.
    pub(crate) fn push(&mut self, buffers: &Buffers<'_>, limit: u32) -> Result<u32, QueueError> {
        let before = self.len;
        for buffer in buffers.iter() {
            let left = limit - (self.len - before);
            if left == 0 || self.iovecs.len() == MAX_SEGMENTS {
                break;
            }
            let buffer = GuestBuffer { len: buffer.len.min(left), ..buffer };
            let slice = buffer.slice(&self.ram)?;
            let iov_base = slice.ptr_guard_mut().as_ptr().cast();
            self.iovecs.push(libc::iovec { iov_base, iov_len: slice.len() });
            self.buffers.push(buffer);
            self.len += buffer.len;
        }
        Ok(self.len - before)
    }

    /// Reads from a socket into the segments, without waiting. Returns the number of bytes (0 is
    /// the end), and whether there may be more data although the segments are not full: the kernel
    /// stops before data that follows passed descriptors, which are dropped.
    pub(crate) fn receive(&mut self, socket: impl AsFd) -> Result<(u32, bool), Errno> {
        let mut message = self.message();
        // SAFETY: the message has no name and no control data. Its segments are in guest RAM, which
        // `self.ram` keeps mapped. The kernel writes to no other memory.
        let got = unsafe { libc::recvmsg(socket.as_fd().as_raw_fd(), &raw mut message, libc::MSG_DONTWAIT) };
        let got = checked(got)?;
        self.mark_dirty(got);
        Ok((got, message.msg_flags & libc::MSG_CTRUNC != 0))
    }

    /// Writes the segments to a socket, without waiting and without `SIGPIPE`. Returns the number
    /// of bytes written.
    pub(crate) fn send(&self, socket: impl AsFd) -> Result<u32, Errno> {
        let message = self.message();
        let flags = libc::MSG_DONTWAIT | libc::MSG_NOSIGNAL;
        // SAFETY: the message has no name and no control data. Its segments are in guest RAM, which
        // `self.ram` keeps mapped. The kernel only reads them.
        let sent = unsafe { libc::sendmsg(socket.as_fd().as_raw_fd(), &raw const message, flags) };
        checked(sent)
    }

    fn message(&self) -> libc::msghdr {
        // SAFETY: all zeros is a message without name, segments and control data.
        let mut message: libc::msghdr = unsafe { std::mem::zeroed() };
        // `sendmsg` and `recvmsg` do not write to the list itself.
        message.msg_iov = self.iovecs.as_ptr().cast_mut();
        message.msg_iovlen = self.iovecs.len() as _;
        message
    }

    /// Marks the first `len` bytes as written by the monitor. The bitmap does not see what the
    /// kernel writes.
    fn mark_dirty(&self, len: u32) {
        let mut left = len;
        for buffer in &self.buffers {
            if left == 0 {
                break;
            }
            let written = buffer.len.min(left);
            if let Ok(slice) = buffer.slice(&self.ram) {
                slice.bitmap().mark_dirty(0, written as usize);
            }
            left -= written;
        }
    }
}

/// The result of a system call that returns a number of bytes.
fn checked(result: isize) -> Result<u32, Errno> {
    match u32::try_from(result) {
        Ok(len) => Ok(len),
        Err(_) => Err(Errno::from_io_error(&std::io::Error::last_os_error()).unwrap_or(Errno::IO)),
    }
}
