//! The descriptors that connect this process to a page server.
//!
//! [`page_server`](crate::page_server) says how they are used, and what they tell about the server.

use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::path::PathBuf;
use std::time::Duration;

use rustix::event::{PollFd, PollFlags, Timespec, poll};

use crate::sys::span::Span;
use crate::sys::userfault::Userfault;

/// The connection to a page server. All users of the server's pages share it.
#[derive(Debug)]
pub(crate) struct ServerLink {
    /// The server's socket, for error messages.
    pub(crate) path: PathBuf,
    /// This process's own descriptor of the userfaultfd.
    pub(crate) userfault: Userfault,
    /// This process's end of the connection.
    pub(crate) socket: OwnedFd,
    /// A pidfd of the process that called `listen`, if it is visible from here.
    pub(crate) listener: Option<OwnedFd>,
}

impl ServerLink {
    /// Unregisters `span` from the userfaultfd: threads that wait for its pages continue, and its
    /// missing pages are zero from now on.
    pub(crate) fn release(&self, span: Span) {
        // Fails only for a span that is not registered, which needs no release.
        let _ = self.userfault.unregister(span);
    }

    /// Makes threads that wait for a page of `span` fault again.
    pub(crate) fn fault_again(&self, span: Span) {
        // Fails only for a span that was released, where no thread waits.
        let _ = self.userfault.fault_again(span);
    }

    /// Whether a page fault is unread.
    pub(crate) fn has_unread_fault(&self) -> rustix::io::Result<bool> {
        is_ready(self.userfault.as_fd(), PollFlags::IN)
    }

    /// See [`PageServer::is_orphaned`](crate::page_server::PageServer::is_orphaned).
    pub(crate) fn is_orphaned(&self) -> bool {
        is_ready(self.socket.as_fd(), PollFlags::RDHUP).unwrap_or(false)
            && self
                .listener
                .as_ref()
                .is_none_or(|process| is_ready(process.as_fd(), PollFlags::IN).unwrap_or(false))
    }
}

fn is_ready(fd: BorrowedFd<'_>, flags: PollFlags) -> rustix::io::Result<bool> {
    Ok(!poll_fds(&[(fd, flags)], Duration::ZERO)?[0].is_empty())
}

/// Polls `fds` once, for at most `timeout`. Returns what is ready on each. A signal counts as
/// nothing ready.
pub(crate) fn poll_fds(
    fds: &[(BorrowedFd<'_>, PollFlags)],
    timeout: Duration,
) -> rustix::io::Result<Vec<PollFlags>> {
    let mut polled: Vec<_> = fds.iter().map(|(fd, flags)| PollFd::from_borrowed_fd(*fd, *flags)).collect();
    let timeout =
        Timespec { tv_sec: timeout.as_secs().cast_signed(), tv_nsec: i64::from(timeout.subsec_nanos()) };
    match poll(&mut polled, Some(&timeout)) {
        Ok(_) | Err(rustix::io::Errno::INTR) => Ok(polled.iter().map(PollFd::revents).collect()),
        Err(e) => Err(e),
    }
}
