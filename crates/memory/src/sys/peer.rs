//! The process at the other end of a Unix socket, as a descriptor that becomes readable when it ends.

use std::os::fd::{AsRawFd, BorrowedFd, FromRawFd, OwnedFd};

use rustix::process::{Pid, PidfdFlags, pidfd_open};

/// For a connected client that is the process that called `listen`. None if it has ended, or cannot be seen from here (another
/// process namespace, with Linux before 6.5).
pub(crate) fn process(socket: BorrowedFd<'_>) -> Option<OwnedFd> {
    let mut fd: libc::c_int = -1;
    if option(socket, libc::SO_PEERPIDFD, &mut fd) && fd >= 0 {
        // SAFETY: the option's value is a descriptor that was just made for us.
        return Some(unsafe { OwnedFd::from_raw_fd(fd) });
    }
    let mut peer = libc::ucred { pid: 0, uid: 0, gid: 0 };
    if !option(socket, libc::SO_PEERCRED, &mut peer) {
        return None;
    }
    pidfd_open(Pid::from_raw(peer.pid)?, PidfdFlags::empty()).ok()
}

fn option<T: Copy>(socket: BorrowedFd<'_>, name: libc::c_int, value: &mut T) -> bool {
    let mut len = size_of::<T>() as libc::socklen_t;
    // SAFETY: the kernel writes at most `len` bytes to `value`, which has as many; any bytes are a value of the two types used.
    let got = unsafe {
        libc::getsockopt(socket.as_raw_fd(), libc::SOL_SOCKET, name, (&raw mut *value).cast(), &raw mut len)
    };
    got == 0 && len as usize == size_of::<T>()
}
