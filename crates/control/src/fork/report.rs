//! How children tell their parent that they have begun: a line each through a pipe that they share.

use std::fs::File;
use std::io::{BufRead, BufReader};
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::sync::Arc;
use std::time::{Duration, Instant};

use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::pipe::{PipeFlags, pipe_with};
use serde::{Deserialize, Serialize};

use crate::task::Token;

/// Longest text of an error. A line is written whole or not at all up to 4096 bytes (`PIPE_BUF`).
const MAX_ERROR: usize = 2000;

/// A child's end. The pipe ends for the parent when no child has one any more.
#[derive(Debug)]
pub struct Reporter {
    number: usize,
    pipe: Arc<OwnedFd>,
}

/// The parent's end.
#[derive(Debug)]
pub(super) struct Reports {
    pipe: OwnedFd,
    write: Arc<OwnedFd>,
}

/// What a child said.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Report {
    pub(super) pid: u32,
    /// Why it ended instead.
    pub(super) error: Option<String>,
    /// When.
    pub(super) at: Instant,
}

#[derive(Serialize, Deserialize)]
struct Line {
    child: usize,
    pid: u32,
    error: Option<String>,
}

impl Reporter {
    /// The same, with a descriptor of its own. Of the one before, a fork has owners that never let go of it: whoever makes this one closes that by its
    /// number.
    pub fn take_over(self) -> std::io::Result<Self> {
        Ok(Reporter { number: self.number, pipe: Arc::new(self.pipe.try_clone()?) })
    }

    /// Says that this child has begun, or why it has not.
    pub fn report(self, result: Result<(), &dyn std::fmt::Display>) {
        let error = result.err().map(|error| error.to_string().chars().take(MAX_ERROR / 4).collect());
        let line = Line { child: self.number, pid: std::process::id(), error };
        let Ok(mut text) = serde_json::to_string(&line) else { return };
        text.push('\n');
        // A parent that is gone does not wait.
        let _ = rustix::io::write(&self.pipe, text.as_bytes());
    }
}

impl AsFd for Reporter {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.pipe.as_fd()
    }
}

impl Reports {
    pub(super) fn new() -> std::io::Result<Self> {
        let (read, write) = pipe_with(PipeFlags::CLOEXEC)?;
        Ok(Reports { pipe: read, write: Arc::new(write) })
    }

    /// The end of child `number`.
    pub(super) fn reporter(&self, number: usize) -> Reporter {
        Reporter { number, pipe: Arc::clone(&self.write) }
    }

    /// Waits for `count` children, or until no child is left that could report, `token` is
    /// cancelled, or `patience` is over. By number; `None` for those that did not report.
    pub(super) fn collect(self, count: usize, patience: Duration, token: &Token) -> Vec<Option<Report>> {
        // This process's own end goes, so that the pipe ends with the last child.
        drop(self.write);
        let deadline = Instant::now() + patience;
        let mut reports = vec![None; count];
        let mut lines = BufReader::new(File::from(self.pipe));
        let mut left = count;
        while left > 0 && (!lines.buffer().is_empty() || is_readable(lines.get_ref(), deadline, token)) {
            let mut text = String::new();
            // Lines arrive whole.
            if lines.read_line(&mut text).unwrap_or(0) == 0 {
                break;
            }
            let Ok(line) = serde_json::from_str::<Line>(&text) else { continue };
            if let Some(report @ None) = reports.get_mut(line.child) {
                *report = Some(Report { pid: line.pid, error: line.error, at: Instant::now() });
                left -= 1;
            }
        }
        reports
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
    fn reports_come_by_number_and_those_that_do_not_are_missed_without_waiting() {
        let reports = Reports::new().unwrap();
        reports.reporter(0).report(Ok(()));
        drop(reports.reporter(1));
        reports.reporter(2).report(Err(&"x".repeat(100_000)));
        let got = reports.collect(3, LONG, &Token::new().unwrap());
        assert_eq!(got[0].as_ref().unwrap().error, None);
        assert_eq!(got[1], None);
        assert!(got[2].as_ref().unwrap().error.as_ref().unwrap().starts_with("xxx"));
    }

    #[test]
    fn a_child_that_hangs_is_waited_for_no_longer_than_asked() {
        let reports = Reports::new().unwrap();
        let _hangs = reports.reporter(0);
        assert_eq!(reports.collect(1, Duration::ZERO, &Token::new().unwrap()), [None]);
    }

    #[test]
    fn whoever_is_asked_to_end_waits_for_nobody() {
        let reports = Reports::new().unwrap();
        let _hangs = reports.reporter(0);
        reports.reporter(1).report(Ok(()));
        let token = Token::new().unwrap();
        token.cancel();
        let got = reports.collect(2, LONG, &token);
        assert!(got[0].is_none() && got[1].is_some(), "what has been said counts");
    }
}
