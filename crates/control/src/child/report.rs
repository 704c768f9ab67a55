//! How children report to their parent that they have started: one line each, through a pipe that
//! they share.

use std::fs::File;
use std::io::{BufRead, BufReader};
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::sync::Arc;
use std::time::{Duration, Instant};

use memory::image::Observer;
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::pipe::{PipeFlags, pipe_with};
use serde::{Deserialize, Serialize};

use crate::token::Token;

/// Longest text of an error, in characters of at most four bytes. The kernel writes a line of up to
/// 4096 bytes (`PIPE_BUF`) whole or not at all.
const MAX_ERROR: usize = 500;

/// A child's end of the pipe. The parent reads the end of the file once no child has one.
#[derive(Debug)]
pub struct Reporter {
    number: usize,
    pipe: Arc<OwnedFd>,
}

/// The parent's end of the pipe.
#[derive(Debug)]
pub(crate) struct Reports {
    pipe: OwnedFd,
    write: Arc<OwnedFd>,
}

/// A child's report.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Report {
    pub(crate) pid: u32,
    /// Why it could not start.
    pub(crate) error: Option<String>,
    /// When the report arrived.
    pub(crate) at: Instant,
}

#[derive(Serialize, Deserialize)]
struct Line {
    child: usize,
    pid: u32,
    error: Option<String>,
}

impl Reporter {
    /// This reporter with another descriptor. The caller closes the old one by its number: after a
    /// fork it has owners that never drop it.
    pub fn take_over(self) -> std::io::Result<Self> {
        Ok(Reporter { number: self.number, pipe: Arc::new(self.pipe.try_clone()?) })
    }

    /// Reports that this child has started, or why it cannot.
    pub fn report(self, result: Result<(), &dyn std::fmt::Display>) {
        let error = result.err().map(|error| error.to_string().chars().take(MAX_ERROR).collect());
        let line = Line { child: self.number, pid: std::process::id(), error };
        let Ok(mut text) = serde_json::to_string(&line) else { return };
        text.push('\n');
        // The parent may have ended; ignore the error.
        let _ = rustix::io::write(&self.pipe, text.as_bytes());
    }
}

impl AsFd for Reporter {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.pipe.as_fd()
    }
}

impl Reports {
    pub(crate) fn new() -> std::io::Result<Self> {
        let (read, write) = pipe_with(PipeFlags::CLOEXEC)?;
        Ok(Reports { pipe: read, write: Arc::new(write) })
    }

    /// The pipe's end for child `number`.
    pub(crate) fn reporter(&self, number: usize) -> Reporter {
        Reporter { number, pipe: Arc::clone(&self.write) }
    }

    /// Waits for the reports of `count` children. Stops once no child is left that could report,
    /// `token` is cancelled, or `timeout` is over. Returns the reports by number, `None` for
    /// children that did not report, and whether it gave up because `token` was cancelled.
    pub(crate) fn collect(
        self,
        count: usize,
        timeout: Duration,
        token: &Token,
    ) -> (Vec<Option<Report>>, bool) {
        // This process's write end is closed, so that the pipe ends with the last child.
        drop(self.write);
        let deadline = Instant::now() + timeout;
        let mut reports = vec![None; count];
        let mut lines = BufReader::new(File::from(self.pipe));
        let (mut left, mut ended) = (count, false);
        while left > 0 && (!lines.buffer().is_empty() || is_readable(lines.get_ref(), deadline, token)) {
            let mut text = String::new();
            // Lines arrive whole.
            if lines.read_line(&mut text).unwrap_or(0) == 0 {
                ended = true;
                break;
            }
            let Ok(line) = serde_json::from_str::<Line>(&text) else { continue };
            if let Some(report @ None) = reports.get_mut(line.child) {
                *report = Some(Report { pid: line.pid, error: line.error, at: Instant::now() });
                left -= 1;
            }
        }
        (reports, left > 0 && !ended && token.cancelled())
    }
}

fn is_readable(pipe: &File, deadline: Instant, token: &Token) -> bool {
    loop {
        let left = deadline.saturating_duration_since(Instant::now());
        let limit = Timespec::try_from(left).expect("a minute fits");
        let mut fds = [PollFd::new(pipe, PollFlags::IN), PollFd::new(token, PollFlags::IN)];
        match poll(&mut fds, Some(&limit)) {
            Err(rustix::io::Errno::INTR) => {}
            Ok(_) => return !fds[0].revents().is_empty(),
            Err(_) => return false,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const LONG: Duration = Duration::from_secs(1000);

    #[test]
    fn reports_are_ordered_and_missing_ones_are_not_waited_for() {
        let reports = Reports::new().unwrap();
        reports.reporter(0).report(Ok(()));
        drop(reports.reporter(1));
        reports.reporter(2).report(Err(&"x".repeat(100_000)));
        let (got, cancelled) = reports.collect(3, LONG, &Token::new().unwrap());
        assert!(!cancelled);
        assert_eq!(got[0].as_ref().unwrap().error, None);
        assert_eq!(got[1], None);
        assert!(got[2].as_ref().unwrap().error.as_ref().unwrap().starts_with("xxx"));
    }

    #[test]
    fn child_that_hangs_is_waited_for_until_the_timeout() {
        let reports = Reports::new().unwrap();
        let _hangs = reports.reporter(0);
        assert_eq!(reports.collect(1, Duration::ZERO, &Token::new().unwrap()), (vec![None], false));
    }

    #[test]
    fn cancelled_wait_returns_the_reports_so_far() {
        let reports = Reports::new().unwrap();
        let _hangs = reports.reporter(0);
        reports.reporter(1).report(Ok(()));
        let token = Token::new().unwrap();
        token.cancel();
        let (got, cancelled) = reports.collect(2, LONG, &token);
        assert!(got[0].is_none() && got[1].is_some(), "a report that has arrived counts");
        assert!(cancelled);
    }
}
