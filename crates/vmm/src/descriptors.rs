//! Descriptors of this process: their limit, the standard ones, and inherited ones.

use std::io;
use std::os::fd::{BorrowedFd, FromRawFd, OwnedFd, RawFd};

use rustix::process::{Resource, Rlimit, getrlimit, setrlimit};

/// Enough for all connections of a vsock device and everything else.
const ENOUGH: u64 = 8192;

/// Raises the soft limit to [`ENOUGH`], or to the hard limit if that is lower. The usual 1024
/// exists for programs that use `select(2)`.
pub(crate) fn raise_limit() {
    let limit = getrlimit(Resource::Nofile);
    let most = limit.maximum.unwrap_or(u64::MAX).min(ENOUGH);
    if limit.current.is_some_and(|current| current < most) {
        let raised = Rlimit { current: Some(most), ..limit };
        if let Err(error) = setrlimit(Resource::Nofile, raised) {
            log::warn!("the limit of open descriptors stays at {:?}: {error}", limit.current);
        }
    }
}

/// Takes the descriptor `fd`, which this process inherited and a flag names. Programs that this
/// process may run do not inherit it. Fails if it is not open.
///
/// Nothing else in this process may own it: called for each flag once, and before this process
/// opens anything.
pub(crate) fn take(fd: RawFd) -> io::Result<OwnedFd> {
    if fd < 0 {
        return Err(rustix::io::Errno::BADF.into());
    }
    // SAFETY: the number is not -1, and the borrow ends before anything is closed. If it is not
    // open, the call fails.
    let borrowed = unsafe { BorrowedFd::borrow_raw(fd) };
    rustix::io::fcntl_setfd(borrowed, rustix::io::FdFlags::CLOEXEC)?;
    // SAFETY: it is open, and by the contract above nothing else owns it.
    Ok(unsafe { OwnedFd::from_raw_fd(fd) })
}

/// Opens `/dev/null` for standard descriptors that are closed. Otherwise the next file that is
/// opened, such as a disk, would get the number, and messages would be written to it. Without a
/// `/dev/null` the process ends.
pub(crate) fn open_standard() {
    use rustix::stdio::{stderr, stdin, stdout};
    for fd in [stdin(), stdout(), stderr()] {
        if rustix::io::fcntl_getfd(fd) == Err(rustix::io::Errno::BADF) {
            match std::fs::OpenOptions::new().read(true).write(true).open("/dev/null") {
                // It got the lowest free number, which is this one's.
                Ok(null) => _ = std::os::fd::IntoRawFd::into_raw_fd(null),
                Err(_) => std::process::abort(),
            }
        }
    }
}
