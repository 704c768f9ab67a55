//! The process at the other end of a Unix socket, as a pidfd: readable when the process has ended.

use std::os::fd::{AsRawFd, BorrowedFd, FromRawFd, OwnedFd};

use rustix::process::{Pid, PidfdFlags, pidfd_open};

/// A pidfd of the process that called `listen` on the socket that `socket` is connected to. None if
/// that process has ended or is not visible from here (another PID namespace, with Linux before
/// 6.5).
pub(crate) fn listener_pidfd(socket: BorrowedFd<'_>) -> Option<OwnedFd> {
    let mut fd: libc::c_int = -1;
    if socket_option(socket, libc::SO_PEERPIDFD, &mut fd) && fd >= 0 {
        // SAFETY: the kernel has just created the descriptor for this process; nothing else owns
        // it.
        return Some(unsafe { OwnedFd::from_raw_fd(fd) });
    }
    let mut peer = libc::ucred { pid: 0, uid: 0, gid: 0 };
    if !socket_option(socket, libc::SO_PEERCRED, &mut peer) {
        return None;
    }
    pidfd_open(Pid::from_raw(peer.pid)?, PidfdFlags::empty()).ok()
}

fn socket_option<T: Copy>(socket: BorrowedFd<'_>, name: libc::c_int, value: &mut T) -> bool {
    let mut len = size_of::<T>() as libc::socklen_t;
    // SAFETY: the kernel writes at most `len` bytes to `value`, which has as many. Any bytes are a
    // valid value of the two types used.
    let got = unsafe {
        libc::getsockopt(socket.as_raw_fd(), libc::SOL_SOCKET, name, (&raw mut *value).cast(), &raw mut len)
    };
    got == 0 && len as usize == size_of::<T>()
}
