//! fork(2), and what a child must do before it is a monitor of its own.
//!
//! The code is unsafe because the child of a process with threads has their locks, but not the
//! threads.

use std::io;
use std::os::fd::RawFd;

/// The process in which [`fork`] returned.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum ForkResult {
    Parent,
    Child,
}

/// Forks this process. Returns in both.
///
/// The child has this thread only. The data of other threads stays as it was at that moment,
/// perhaps in the middle of a change. So the child must not touch what it shares with them. It uses
/// only what it was given by value, the log (whose lock the caller holds) and the allocator (which
/// takes its own locks around a fork).
pub(crate) fn fork() -> io::Result<ForkResult> {
    // SAFETY: the call itself touches no memory of this process. The callers keep to the rule above
    // for what the child does afterwards. A breach of it could meet a lock that is never released,
    // which is a hang and not a data race.
    match unsafe { libc::fork() } {
        -1 => Err(io::Error::last_os_error()),
        0 => Ok(ForkResult::Child),
        _ => Ok(ForkResult::Parent),
    }
}

/// Makes the kernel reap children that end. This process does not wait for them.
pub(crate) fn reap_automatically() {
    // SAFETY: ignoring a signal has no precondition.
    unsafe { libc::signal(libc::SIGCHLD, libc::SIG_IGN) };
}

/// Starts a session and process group of its own, so that signals to the parent's, or the end of
/// its terminal, do not reach this process.
pub(crate) fn new_session() -> io::Result<()> {
    rustix::process::setsid()?;
    Ok(())
}

/// Replaces standard input by `/dev/null`, and standard output and error too unless `keep_output`.
/// So a reader of these sees them end with the parent.
pub(crate) fn detach_standard_io(keep_output: bool) -> io::Result<()> {
    let null = std::fs::OpenOptions::new().read(true).write(true).open("/dev/null")?;
    rustix::stdio::dup2_stdin(&null)?;
    if !keep_output {
        rustix::stdio::dup2_stdout(&null)?;
        rustix::stdio::dup2_stderr(&null)?;
    }
    Ok(())
}

/// Closes all descriptors from 3 on, except `kept`.
///
/// Their owners in this process do not learn of it. So this is for a forked child that never
/// returns to its parent's code: nothing that owned a descriptor is used or dropped any more.
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

/// Closes the descriptors from `first` to `last`, both included.
fn close_range(first: RawFd, last: RawFd) -> io::Result<()> {
    // SAFETY: the call closes descriptors and touches no memory. Their owners never use them again,
    // as `close_all_but` requires.
    if unsafe { libc::syscall(libc::SYS_close_range, first, last, 0) } == 0 {
        return Ok(());
    }
    // Linux before 5.9, or a seccomp filter. The parent's KVM, taps and locks must not stay open.
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
