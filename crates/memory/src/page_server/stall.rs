//! Telling whether any process reads the page faults of a userfaultfd.

use std::time::{Duration, Instant};

use crate::ram::GuestRam;
use crate::server_link::ServerLink;

/// Detects that page faults stay unread while no page arrives.
#[derive(Debug)]
pub(super) struct StallDetector {
    /// How long faults may stay unread while no page arrives.
    limit: Duration,
    /// The time since which every poll found an unread fault, and [`GuestRam::page_progress`] then.
    /// It need not be the same fault each time.
    unread: Option<(Instant, u64)>,
    /// The time since which no poll found an unread fault, and [`GuestRam::page_progress`] then.
    /// Restarts after each fifth of the limit.
    none_unread: Option<(Instant, u64)>,
}

impl StallDetector {
    pub(super) fn new(limit: Duration) -> Self {
        StallDetector { limit, unread: None, none_unread: None }
    }

    /// Polls once; to be called several times within the limit. Returns whether faults have been
    /// unread for the limit and no page has arrived in that time. If the server is `orphaned`,
    /// faults that were read but not answered count as unread.
    pub(super) fn poll(
        &mut self,
        link: &ServerLink,
        ram: &GuestRam,
        orphaned: bool,
    ) -> rustix::io::Result<bool> {
        let pages = || ram.page_progress();
        if link.has_unread_fault()? {
            self.none_unread = None;
            match self.unread {
                None => self.unread = Some((Instant::now(), pages())),
                Some((since, before)) if since.elapsed() >= self.limit => {
                    let now = pages();
                    if now == before {
                        return Ok(true);
                    }
                    // Pages arrive: the server is busy, not stalled.
                    self.unread = Some((Instant::now(), now));
                }
                Some(_) => {}
            }
            return Ok(false);
        }
        self.unread = None;
        match self.none_unread {
            _ if !orphaned => {}
            None => self.none_unread = Some((Instant::now(), pages())),
            Some((since, before)) if since.elapsed() >= self.limit / 5 => {
                let now = pages();
                if now == before {
                    // A server that is only slow then reads the same fault twice. It must handle
                    // that anyway, as two vCPUs may fault on one page.
                    ram.spans().iter().for_each(|span| link.fault_again(*span));
                }
                self.none_unread = Some((Instant::now(), now));
            }
            Some(_) => {}
        }
        Ok(false)
    }
}
