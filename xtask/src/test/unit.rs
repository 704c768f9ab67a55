//! The unit tests and documentation tests of every crate, natively.

use std::io::{BufRead, BufReader};
use std::process::{Command, Stdio};

use anyhow::{Context, Result};

use super::tally::Tally;
use crate::process::{cargo, output, say};

/// The nextest filter for all tests but the whole-system tests.
const SELECTION: &str = "not (package(vesta-tests) and kind(test))";

/// Runs the unit tests and documentation tests whose name contains the filter.
pub(super) fn run(filter: &str) -> Result<Tally> {
    let mut tally = if nextest_is_there() { nextest(filter)? } else { cargo_test(filter)? };
    say!("documentation tests: cargo test --doc");
    tally.add(libtest(cargo().args(["test", "--quiet", "--workspace", "--doc", "--", filter]))?);
    Ok(tally)
}

/// Whether cargo-nextest is installed; tries to install it if it is missing.
fn nextest_is_there() -> bool {
    let version = || output(cargo().args(["nextest", "--version"])).is_ok();
    if version() {
        return true;
    }
    say!("installing cargo-nextest (it runs the unit tests; some minutes, once)");
    // Outside the repository, whose settings are for its own binaries.
    let status = Command::new("cargo")
        .args(["install", "--quiet", "--locked", "cargo-nextest"])
        .current_dir("/")
        .status();
    let installed = status.is_ok_and(|status| status.success()) && version();
    if !installed {
        say!("cargo-nextest cannot be installed; the unit tests run under cargo test");
    }
    installed
}

fn nextest(filter: &str) -> Result<Tally> {
    say!("unit tests: cargo nextest run");
    let mut command = cargo();
    command.args(["nextest", "run", "--workspace", "--no-tests=pass", "--no-fail-fast", "--color=never"]);
    command.args([
        "--show-progress=none",
        "--status-level=fail",
        "--final-status-level=none",
        "--filterset",
        SELECTION,
    ]);
    if !filter.is_empty() {
        command.arg(filter);
    }
    let (lines, success) = watch(command.stderr(Stdio::piped()).stdout(Stdio::inherit()))?;
    let summary = lines.iter().rev().find(|line| line.trim_start().starts_with("Summary ["));
    let mut tally = summary.map_or_else(Tally::default, |line| nextest_summary(line));
    let failed = lines.iter().filter_map(|line| line.trim_start().strip_prefix("FAIL "));
    tally.notes.extend(failed.map(|name| format!("failed: {name}")));
    Ok(check(tally, success))
}

fn cargo_test(filter: &str) -> Result<Tally> {
    say!("unit tests: cargo test");
    let mut command = cargo();
    command.args([
        "test",
        "--quiet",
        "--workspace",
        "--exclude",
        "vesta-tests",
        "--lib",
        "--bins",
        "--no-fail-fast",
    ]);
    let mut tally = libtest(command.args(["--", filter]))?;
    tally.add(libtest(cargo().args(["test", "--quiet", "--package", "vesta-tests", "--lib", "--", filter]))?);
    Ok(tally)
}

fn libtest(command: &mut Command) -> Result<Tally> {
    let (lines, success) = watch(command.stdout(Stdio::piped()).stderr(Stdio::inherit()))?;
    let mut tally = Tally::default();
    for line in &lines {
        if let Some(counts) = line.strip_prefix("test result: ") {
            tally.add(Tally {
                passed: count(counts, "passed"),
                failed: count(counts, "failed"),
                ignored: count(counts, "ignored"),
                filtered_out: count(counts, "filtered"),
                notes: Vec::new(),
            });
        }
    }
    Ok(check(tally, success))
}

/// A run that failed without a failed test counts as one failure: the tests did not compile or run.
fn check(mut tally: Tally, success: bool) -> Tally {
    if !success && tally.failed == 0 {
        tally.add(Tally::failure("failed: unit tests did not build or did not run".to_owned()));
    }
    tally
}

/// Parses `Summary [   0.014s] 5 tests run: 3 passed (1 slow), 1 failed, 1 timed out, 2 skipped`.
fn nextest_summary(line: &str) -> Tally {
    let counts = line.split_once("run:").map_or("", |(_, counts)| counts);
    Tally {
        passed: count(counts, "passed"),
        failed: count(counts, "failed") + count(counts, "timed") + count(counts, "exec"),
        ignored: 0,
        filtered_out: count(counts, "skipped"),
        notes: Vec::new(),
    }
}

/// The number before a word.
fn count(text: &str, word: &str) -> usize {
    let words: Vec<&str> =
        text.split(|c: char| !c.is_alphanumeric()).filter(|word| !word.is_empty()).collect();
    let pair = words.windows(2).find(|pair| pair[1] == word && pair[0].parse::<usize>().is_ok());
    pair.and_then(|pair| pair[0].parse().ok()).unwrap_or(0)
}

/// Runs a command, and prints and returns the lines of its one piped stream.
fn watch(command: &mut Command) -> Result<(Vec<String>, bool)> {
    let mut child = command.stdin(Stdio::null()).spawn().context("cannot run cargo")?;
    let mut lines = Vec::new();
    let stream: Box<dyn std::io::Read> = match (child.stdout.take(), child.stderr.take()) {
        (Some(stdout), _) => Box::new(stdout),
        (None, Some(stderr)) => Box::new(stderr),
        (None, None) => Box::new(std::io::empty()),
    };
    for line in BufReader::new(stream).split(b'\n') {
        let line = String::from_utf8_lossy(&line?).into_owned();
        eprintln!("{line}");
        lines.push(line);
    }
    Ok((lines, child.wait()?.success()))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_summary_of_nextest_is_parsed() {
        let line =
            "     Summary [   0.014s] 7 tests run: 4 passed (1 slow), 2 failed, 1 timed out, 9 skipped";
        let tally = nextest_summary(line);
        assert_eq!((tally.passed, tally.failed, tally.filtered_out), (4, 3, 9));
    }

    #[test]
    fn a_failed_run_without_a_failed_test_is_a_failure() {
        assert_eq!(check(Tally::default(), false).failed, 1);
        assert_eq!(check(Tally::default(), true).failed, 0);
    }
}
