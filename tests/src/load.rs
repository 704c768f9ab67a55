//! Workloads and reports of the load generator (`vesta-load`), for the generator and for
//! benchmarks.
//!
//! The generator runs in guests and on the host, so that only the path to the disk differs. It
//! prints a line when a workload begins and when it ends, and pauses after each line, so that the
//! reader can read counters in between.

use std::fmt;
use std::str::FromStr;
use std::time::Duration;

use anyhow::{Context, Result, bail};
use serde::{Deserialize, Serialize};

/// The beginning of every line of the generator.
pub const MARK: &str = "vesta-load:";

/// The generator's pause after each of its lines.
pub const PAUSE: Duration = Duration::from_millis(30);

/// The direction of a transfer.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub enum Direction {
    /// From the disk.
    Read,
    /// To the disk.
    Write,
}

/// One kind of load. As text: `read`, `write`, `randread` or `randwrite`, then the block size in
/// bytes and the number of transfers in flight, as in `randread:4096:32`. A fourth number, as in
/// `randwrite:4096:1:64`, is the number of writes between two flushes.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct Workload {
    /// Whether it reads or writes.
    pub direction: Direction,
    /// Whether offsets are random; else they are sequential from the beginning.
    pub random: bool,
    /// Bytes of each transfer: a multiple of 512.
    pub block: u32,
    /// The number of transfers in flight.
    pub depth: u32,
    /// Flushes the disk after every so many writes; only with one transfer in flight.
    pub flush: Option<u32>,
}

/// The result of one workload.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct Report {
    /// The number of transfers; flushes are not counted.
    pub ops: u64,
    /// The time of all of them, including flushes.
    pub nanos: u64,
    /// Median latency; only with one transfer in flight.
    pub median_ns: Option<u64>,
    /// 99th percentile of latency; only with one transfer in flight.
    pub p99_ns: Option<u64>,
}

impl fmt::Display for Workload {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let random = if self.random { "rand" } else { "" };
        let direction = match self.direction {
            Direction::Read => "read",
            Direction::Write => "write",
        };
        write!(f, "{random}{direction}:{}:{}", self.block, self.depth)?;
        self.flush.map_or(Ok(()), |writes| write!(f, ":{writes}"))
    }
}

impl FromStr for Workload {
    type Err = anyhow::Error;

    fn from_str(text: &str) -> Result<Workload> {
        let wrong = || format!("workload {text}: invalid; for example randread:4096:32");
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
        let flush = parts.next().map(|part| number(Some(part))).transpose()?;
        let flush_fits = flush.is_none_or(|writes| writes > 0 && depth == 1 && direction == Direction::Write);
        let block_fits = block > 0 && block.is_multiple_of(512);
        if !block_fits || !flush_fits || !(1..=1024).contains(&depth) || parts.next().is_some() {
            bail!(wrong());
        }
        Ok(Workload { direction, random, block, depth, flush })
    }
}

/// The line before a workload.
pub fn begin_line(label: &str, workload: Workload) -> String {
    format!("{MARK} begin {label} {workload}.")
}

/// The beginning of the line after a workload; its [`Report`] follows as JSON.
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
    fn a_workload_parses_to_what_it_prints() {
        for text in
            ["randread:4096:1", "randwrite:4096:32", "read:131072:4", "write:512:1024", "write:512:1:64"]
        {
            assert_eq!(text.parse::<Workload>().unwrap().to_string(), text);
        }
    }

    #[test]
    fn an_invalid_workload_is_refused() {
        for text in [
            "",
            "read",
            "read:4096",
            "read:100:1",
            "read:0:1",
            "read:512:0",
            "trim:512:1",
            "read:512:1:1",
            "write:512:2:1",
            "write:512:1:0",
            "write:512:1:1:1",
        ] {
            assert!(text.parse::<Workload>().is_err(), "{text}");
        }
    }

    #[test]
    fn a_report_is_read_from_its_line() {
        let workload = "randread:4096:1".parse().unwrap();
        let sent = Report { ops: 7, nanos: 9, median_ns: Some(3), p99_ns: None };
        let line = format!("{} {}\r", end_line("vda", workload), serde_json::to_string(&sent).unwrap());
        assert_eq!(report(&line).unwrap(), sent);
    }
}
