//! Monitoring a page server while the guest uses its pages.

use std::os::fd::{AsFd, BorrowedFd};
use std::sync::Arc;
use std::time::Duration;

use rustix::event::PollFlags;

use super::error::{FetchError, PageServerError};
use super::fetch;
use super::stall::StallDetector;
use crate::observer::Observer;
use crate::pages::PAGE;
use crate::ram::GuestRam;
use crate::server_link::{ServerLink, poll_fds};

/// What happened to a page server.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum ServerEvent {
    /// It closed the connection. It may still answer faults: keep waiting.
    Closed,
    /// It is an orphan (see [the module](super)), and no process reads page faults. No more pages
    /// will arrive.
    Gone,
    /// Faults stayed unread for the whole time limit. The server may recover: keep waiting, or give
    /// up.
    Stalled,
    /// The caller's own descriptor became readable.
    Stopped,
}

/// The monitor's side of a page server: waits for its pages and reports its end.
#[derive(Debug)]
pub struct PageServer {
    ram: GuestRam,
    link: Arc<ServerLink>,
    /// [`ServerEvent::Closed`] was reported.
    closed: bool,
}

impl PageServer {
    pub(super) fn new(ram: GuestRam, link: Arc<ServerLink>) -> Self {
        PageServer { ram, link, closed: false }
    }

    /// Fetches the pages at these guest addresses and the guest's first page, so that the server
    /// must answer faults. Waits until no page has arrived for `timeout`, or until `observer`
    /// cancels. After an error the memory is released and must not be used.
    pub fn probe(
        &self,
        addresses: &[u64],
        timeout: Duration,
        observer: &dyn Observer,
    ) -> Result<(), PageServerError> {
        let mut pages = self.ram.empty_page_set();
        pages.insert(0, 0..1);
        for (index, region) in self.ram.regions().iter().enumerate() {
            for address in addresses.iter().filter_map(|address| address.checked_sub(region.guest_addr)) {
                pages.insert(index, address / PAGE..address / PAGE + 1);
            }
        }
        let fetched = fetch::fetch(&self.link, &self.ram, &pages, timeout, observer);
        if fetched.is_err() {
            self.release();
        }
        Ok(fetched?)
    }

    /// Waits for other threads that need pages: calls `is_done` until it returns true. `is_done`
    /// may block for the time that it is given. Fails if `is_done` fails, if the server is gone, or
    /// if no page has arrived for `timeout`.
    pub fn wait_while_serving<E: From<FetchError>>(
        &self,
        timeout: Duration,
        is_done: impl FnMut(Duration) -> Result<bool, E>,
    ) -> Result<(), E> {
        fetch::wait_while_serving(&self.link, &self.ram, timeout, || self.ram.page_progress(), is_done)
    }

    /// Waits for an event of the server, or until `stop` is readable. Faults that are unread for
    /// `stall` are an event. Call it again after [`ServerEvent::Closed`] and
    /// [`ServerEvent::Stalled`].
    pub fn wait(&mut self, stop: BorrowedFd<'_>, stall: Duration) -> Result<ServerEvent, PageServerError> {
        let failed =
            |e: rustix::io::Errno| PageServerError::Watch { path: self.link.path.clone(), source: e.into() };
        let interval = (stall / 10).max(Duration::from_millis(1));
        let mut detector = StallDetector::new(stall);
        loop {
            let orphaned = self.link.is_orphaned();
            if detector.poll(&self.link, &self.ram, orphaned).map_err(failed)? {
                return Ok(if orphaned { ServerEvent::Gone } else { ServerEvent::Stalled });
            }
            let mut fds = vec![(stop, PollFlags::IN)];
            if !self.closed {
                fds.push((self.link.socket.as_fd(), PollFlags::RDHUP));
            }
            let ready = poll_fds(&fds, interval).map_err(failed)?;
            if !ready[0].is_empty() {
                return Ok(ServerEvent::Stopped);
            }
            if ready.get(1).is_some_and(|ready| !ready.is_empty()) {
                self.closed = true;
                return Ok(ServerEvent::Closed);
            }
        }
    }

    /// Whether the server is an orphan: it has closed the connection, and the process that listened
    /// has ended or is not visible. Another process may still serve the userfaultfd.
    pub fn is_orphaned(&self) -> bool {
        self.link.is_orphaned()
    }

    /// Releases all threads that wait for a page. Missing pages are zero from now on, so the guest
    /// must not run again.
    pub fn release(&self) {
        for span in self.ram.spans() {
            self.link.release(*span);
        }
    }
}
