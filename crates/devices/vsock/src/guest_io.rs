//! Sockets that read from and write to guest memory without a copy in between.
//!
//! # Where unsafe is
//!
//! This is a leaf module that hands guest memory to the kernel: `recvmsg` and `sendmsg` take addresses.
//!
//! # Invariant
//!
//! Every segment lies in guest RAM: it came out of `vm-memory`'s checked lookup. Guest RAM is never unmapped while a clone of the
//! [`GuestRam`] lives, which [`Segments`] holds. Nothing here follows the addresses; the guest may change the memory meanwhile.
#![expect(unsafe_code, reason = "recvmsg and sendmsg take the addresses of guest memory")]

use std::os::fd::{AsFd, AsRawFd};

use memory::GuestRam;
use rustix::io::Errno;
use vm_memory::bitmap::Bitmap;

use virtio::queue::{Buffers, GuestBuffer, QueueError};

/// The most segments that the kernel takes at once (`UIO_MAXIOV`).
pub(super) const MAX_SEGMENTS: usize = 1024;

/// A list of stretches of guest memory. Made once, filled over and over.
pub(super) struct Segments {
    ram: GuestRam,
    iovecs: Vec<libc::iovec>,
    buffers: Vec<GuestBuffer>,
    len: u32,
}

// SAFETY: the pointers are addresses that only the kernel follows, in calls that this value makes while it holds the memory that they
// are in (`ram`); which thread makes them does not matter.
unsafe impl Send for Segments {}

impl Segments {
    /// No segments.
    pub(super) fn new(ram: GuestRam) -> Self {
        Segments { ram, iovecs: Vec::new(), buffers: Vec::new(), len: 0 }
    }

    /// Forgets the segments, and keeps the space for new ones.
    pub(super) fn clear(&mut self) {
        self.iovecs.clear();
        self.buffers.clear();
        self.len = 0;
    }

    /// Length of all segments together, in bytes.
    pub(super) fn len(&self) -> u32 {
        self.len
    }

    /// Adds the first bytes of `buffers`: at most `limit`, and no more segments than the kernel takes. Returns how many bytes.
    pub(super) fn push(&mut self, buffers: &Buffers<'_>, limit: u32) -> Result<u32, QueueError> {
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

    /// Reads from a socket into the segments, without waiting. Returns how many bytes (0 is the end), and whether there may be more although
    /// there was room: the kernel stops where descriptors were sent along, which nobody takes here.
    pub(super) fn receive(&mut self, socket: impl AsFd) -> Result<(u32, bool), Errno> {
        let mut message = self.message();
        // SAFETY: the message has no name and no control data; its segments are in guest RAM, which `self.ram` keeps mapped. The kernel
        // writes into no other memory.
        let got = unsafe { libc::recvmsg(socket.as_fd().as_raw_fd(), &raw mut message, libc::MSG_DONTWAIT) };
        let got = checked(got)?;
        self.mark_dirty(got);
        Ok((got, message.msg_flags & libc::MSG_CTRUNC != 0))
    }

    /// Writes the segments to a socket, without waiting and without a signal. Returns how many bytes it took.
    pub(super) fn send(&self, socket: impl AsFd) -> Result<u32, Errno> {
        let message = self.message();
        let flags = libc::MSG_DONTWAIT | libc::MSG_NOSIGNAL;
        // SAFETY: the message has no name and no control data; its segments are in guest RAM, which `self.ram` keeps mapped. The kernel
        // only reads them.
        let sent = unsafe { libc::sendmsg(socket.as_fd().as_raw_fd(), &raw const message, flags) };
        checked(sent)
    }

    fn message(&self) -> libc::msghdr {
        // SAFETY: a message of zeros is one without name, segments and control data.
        let mut message: libc::msghdr = unsafe { std::mem::zeroed() };
        // `sendmsg` and `recvmsg` do not write to the list itself.
        message.msg_iov = self.iovecs.as_ptr().cast_mut();
        message.msg_iovlen = self.iovecs.len() as _;
        message
    }

    /// The kernel wrote the first `len` bytes: where the monitor's writes are tracked, it goes unseen otherwise.
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

/// What a call that moves bytes returned.
fn checked(result: isize) -> Result<u32, Errno> {
    match u32::try_from(result) {
        Ok(len) => Ok(len),
        Err(_) => Err(Errno::from_io_error(&std::io::Error::last_os_error()).unwrap_or(Errno::IO)),
    }
}
