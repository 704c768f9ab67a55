//! What the load generator (`vesta-load`) is asked for and what it answers, for both sides.
//!
//! It runs in guests and on the host alike, so that what differs is the way to the disk and nothing else. It says on standard
//! output when a workload begins and when it ends, with a pause after each: whoever listens can look at counters in between.

use std::fmt;
use std::str::FromStr;
use std::time::Duration;

use anyhow::{Context, Result, bail};
use serde::{Deserialize, Serialize};

/// What every line of the generator begins with.
pub const MARK: &str = "vesta-load:";

/// How long the generator does nothing after each of its lines.
pub const PAUSE: Duration = Duration::from_millis(30);

/// Which way the data goes.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub enum Direction {
    /// From the disk.
    Read,
    /// To the disk.
    Write,
}

/// One kind of load: `read` or `write`, `rand` before it where the places are random, the bytes of each, how many are in flight.
/// As text: `randread:4096:32`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct Workload {
    /// Which way the data goes.
    pub direction: Direction,
    /// At random places; else one after the other, from the beginning.
    pub random: bool,
    /// Bytes of each: a multiple of 512.
    pub block: u32,
    /// How many are in flight.
    pub depth: u32,
}

/// What one workload did.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct Report {
    /// Transfers that were done.
    pub ops: u64,
    /// How long it took.
    pub nanos: u64,
    /// Half of the transfers took no longer than this; only where one is in flight at a time.
    pub median_ns: Option<u64>,
    /// 99 of 100 took no longer than this; only where one is in flight at a time.
    pub p99_ns: Option<u64>,
}

impl fmt::Display for Workload {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let random = if self.random { "rand" } else { "" };
        let direction = match self.direction {
            Direction::Read => "read",
            Direction::Write => "write",
        };
        write!(f, "{random}{direction}:{}:{}", self.block, self.depth)
    }
}

impl FromStr for Workload {
    type Err = anyhow::Error;

    fn from_str(text: &str) -> Result<Workload> {
        let wrong = || format!("the workload is {text}: it must be like randread:4096:32");
        let mut parts = text.split(':');
        let (kind, block, depth) = (parts.next(), parts.next(), parts.next());
        let (random, direction) = match kind {
            Some("read") => (false, Direction::Read),
            Some("write") => (false, Direction::Write),
            Some("randread") => (true, Direction::Read),
            Some("randwrite") => (true, Direction::Write),
            _ => bail!(wrong()),
        };
        let number = |part: Option<&str>| part.and_then(|part| part.parse::<u32>().ok()).with_context(wrong);
        let (block, depth) = (number(block)?, number(depth)?);
        if block == 0 || !block.is_multiple_of(512) || !(1..=1024).contains(&depth) || parts.next().is_some()
        {
            bail!(wrong());
        }
        Ok(Workload { direction, random, block, depth })
    }
}

/// The line that says that a workload begins.
pub fn begin_line(label: &str, workload: Workload) -> String {
    format!("{MARK} begin {label} {workload}.")
}

/// What the line that says how a workload ended begins with; a [`Report`] as JSON follows.
pub fn end_line(label: &str, workload: Workload) -> String {
    format!("{MARK} end {label} {workload}.")
}

/// The report in a line that begins with [`end_line`].
pub fn report(line: &str) -> Result<Report> {
    let json = line.find('{').and_then(|at| line.get(at..)).with_context(|| line.to_owned())?;
    serde_json::from_str(json.trim_end()).with_context(|| line.to_owned())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_workload_is_read_as_it_is_written() {
        for text in ["randread:4096:1", "randwrite:4096:32", "read:131072:4", "write:512:1024"] {
            assert_eq!(text.parse::<Workload>().unwrap().to_string(), text);
        }
    }

    #[test]
    fn what_is_no_workload_is_refused() {
        for text in
            ["", "read", "read:4096", "read:100:1", "read:0:1", "read:512:0", "read:512:1:1", "trim:512:1"]
        {
            assert!(text.parse::<Workload>().is_err(), "{text}");
        }
    }

    #[test]
    fn a_report_comes_through_a_line() {
        let workload = "randread:4096:1".parse().unwrap();
        let sent = Report { ops: 7, nanos: 9, median_ns: Some(3), p99_ns: None };
        let line = format!("{} {}\r", end_line("vda", workload), serde_json::to_string(&sent).unwrap());
        assert_eq!(report(&line).unwrap(), sent);
    }
}
