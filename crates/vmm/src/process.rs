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

/// Leaves the session and the process group of the parent: a signal to them, or the end of their terminal, is none of this process's business.
pub(crate) fn leave_session() -> io::Result<()> {
    rustix::process::setsid()?;
    Ok(())
}

/// Lets go of standard input and, unless they are `kept`, of standard output and error: who reads these sees them end with the parent.
pub(crate) fn leave_standard_io(kept: bool) -> io::Result<()> {
    let null = std::fs::OpenOptions::new().read(true).write(true).open("/dev/null")?;
    rustix::stdio::dup2_stdin(&null)?;
    if !kept {
        rustix::stdio::dup2_stdout(&null)?;
        rustix::stdio::dup2_stderr(&null)?;
    }
    Ok(())
}

/// Closes all descriptors from 3 on but for `kept`.
///
/// Their owners in this process do not know. So this is for a child that never goes back to what it was: nothing that owned a descriptor is
/// used or dropped any more.
pub(crate) fn close_all_but(mut kept: Vec<RawFd>) -> io::Result<()> {
    kept.retain(|fd| *fd > 2);
    kept.sort_unstable();
    kept.dedup();
    let mut first = 3;
    for fd in &kept {
        if *fd > first {
            close_range(first, fd - 1)?;
        }
        first = fd + 1;
    }
    close_range(first, RawFd::MAX)
}

/// Closes these and those between.
fn close_range(first: RawFd, last: RawFd) -> io::Result<()> {
    // SAFETY: it closes descriptors, which is the point; see `close_all_but`.
    if unsafe { libc::syscall(libc::SYS_close_range, first, last, 0) } == 0 {
        return Ok(());
    }
    // Linux before 5.9, or a filter. What would stay is the parent's KVM, taps and locks.
    let open = open_descriptors()
        .map_err(|e| io::Error::new(e.kind(), format!("cannot find the parent's descriptors: {e}")))?;
    for fd in open.into_iter().filter(|fd| (first..=last).contains(fd)) {
        // SAFETY: as above.
        unsafe { libc::close(fd) };
    }
    Ok(())
}

/// All descriptors of this process (and one that is closed when this returns).
fn open_descriptors() -> io::Result<Vec<RawFd>> {
    let names = std::fs::read_dir("/proc/self/fd")?.map(|entry| Ok(entry?.file_name()));
    let names = names.collect::<io::Result<Vec<_>>>()?;
    Ok(names.iter().filter_map(|name| name.to_str()?.parse().ok()).collect())
}
