//! The test plan for the runner on the host, and the records that it writes.
//!
//! Records are lines of JSON, appended to a file on the shared root file system as tests start and
//! end. They show which test ran when the machine died.

use std::fs::File;
use std::io::Write;
use std::path::{Path, PathBuf};
use std::time::Duration;

use anyhow::{Context, Result};
use serde::{Deserialize, Serialize};

/// One test of one test binary.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
pub(crate) struct Test {
    /// The binary's name.
    pub(crate) suite: String,
    /// The test's path within it.
    pub(crate) name: String,
    /// The binary.
    pub(crate) binary: PathBuf,
}

impl Test {
    /// The name that is shown and filtered.
    pub(crate) fn title(&self) -> String {
        format!("{}::{}", self.suite, self.name)
    }
}

/// What to run, in order, each test in a process of its own.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub(crate) struct Plan {
    pub(crate) tests: Vec<Test>,
    /// The time limit of one test.
    pub(crate) limit: Duration,
    /// Whether the tests have the machine to themselves, so that anything left on it is the test's.
    pub(crate) machine_is_ours: bool,
}

/// How a test ended.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) enum Verdict {
    Passed,
    /// With the reason.
    Failed(String),
    /// With the reason.
    Ignored(String),
}

/// One line of the file of records.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) enum Record {
    Started { title: String },
    Ended { title: String, verdict: Verdict, took: Duration, output: String },
}

/// Appends a record. It is in the file when this returns.
pub(crate) fn append(file: &mut File, record: &Record) -> Result<()> {
    let mut line = serde_json::to_vec(record)?;
    line.push(b'\n');
    file.write_all(&line).context("cannot write a test's record")
}

/// All complete records of a file, in order. A last line that a dying machine cut off is skipped.
pub(crate) fn read(path: &Path) -> Result<Vec<Record>> {
    let text = std::fs::read(path).with_context(|| format!("cannot read {}", path.display()))?;
    let lines = text.split_inclusive(|&byte| byte == b'\n').filter(|line| line.ends_with(b"\n"));
    lines.map(|line| serde_json::from_slice(line).context("a test's record")).collect()
}

/// The test that was running at the end of the records.
pub(crate) fn unfinished(records: &[Record]) -> Option<&str> {
    match records.last() {
        Some(Record::Started { title }) => Some(title),
        _ => None,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_truncated_last_record_is_skipped() {
        let dir = std::env::temp_dir().join(format!("vesta-record-{}", std::process::id()));
        std::fs::create_dir(&dir).unwrap();
        let path = dir.join("records");
        let mut file = File::create(&path).unwrap();
        let started = Record::Started { title: "a::b".to_owned() };
        append(&mut file, &started).unwrap();
        file.write_all(b"{\"Ended\":{").unwrap();
        let records = read(&path).unwrap();
        std::fs::remove_dir_all(&dir).unwrap();
        assert_eq!(records, [started]);
        assert_eq!(unfinished(&records), Some("a::b"));
    }
}
