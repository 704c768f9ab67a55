//! fork(2), and what a child must do before it is a monitor of its own.
//!
//! Unsafe code is here because a fork of a process with threads has the locks of threads that it does not have.

use std::io;
use std::os::fd::RawFd;

/// Which of the two processes this is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Side {
    Parent,
    Child,
}

/// Splits this process.
///
/// The child has this thread only. What other threads were doing stays as it was in that moment, so the child must not touch what they
/// share with it: it leaves alone everything that there was but for what it is given by value, for the log (whose lock the caller holds) and for
/// the allocator (which takes its own locks around a fork).
pub(crate) fn fork() -> io::Result<Side> {
    // SAFETY: no memory is touched by the call itself. What the child may do afterwards is what the callers keep to (above);
    // it is the only thing that could be unsound, and only through locks that would never be released: a hang, not a race.
    match unsafe { libc::fork() } {
        -1 => Err(io::Error::last_os_error()),
        0 => Ok(Side::Child),
        _ => Ok(Side::Parent),
    }
}

/// Lets the kernel take away children that end: nobody waits for them.
pub(crate) fn reap_automatically() {
    // SAFETY: ignoring a signal has no precondition.
    unsafe { libc::signal(libc::SIGCHLD, libc::SIG_IGN) };
}

/// Closes all descriptors from 3 on but for `kept`.
///
/// Their owners in this process do not know. So this is for a child that never goes back to what it was: nothing that owned a descriptor is
/// used or dropped any more.
pub(crate) fn close_all_but(mut kept: Vec<RawFd>) {
    kept.retain(|fd| *fd > 2);
    kept.sort_unstable();
    let mut first = 3;
    for fd in kept {
        if fd > first {
            close_range(first, fd - 1);
        }
        first = first.max(fd + 1);
    }
    close_range(first, RawFd::MAX);
}

fn close_range(first: RawFd, last: RawFd) {
    // SAFETY: it closes descriptors, which is the point; see `close_all_but`. (It is there from Linux 5.9 on; without it
    // the child has descriptors too many, which is no reason to fail.)
    unsafe { libc::syscall(libc::SYS_close_range, first, last, 0) };
}
