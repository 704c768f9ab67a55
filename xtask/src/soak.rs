//! `cargo xtask soak`: repeats randomized tests many times, to find rare failures. It is not part
//! of `cargo xtask test`.
//!
//! - Each fuzz target, with inputs from seeds, without the fuzzer's runtime.
//! - The tests of models, whose random cases differ in each run.
//! - Whole-system tests that repeat something, with N times as many rounds ([`vesta_tests::soak`]).

use std::process::{Command, ExitCode};
use std::time::{SystemTime, UNIX_EPOCH};

use anyhow::{Context, Result, bail};
use lexopt::prelude::*;
use vesta_tests::soak::SOAK;

use crate::process::{cargo, root, run, say};
use crate::test::fuzz_command;

/// N where the command line does not give it.
const FACTOR: u32 = 10;
/// Inputs for each fuzz target, times N.
const INPUTS: u64 = 2000;
/// A filter for the whole-system tests that have rounds.
const SYSTEM_TESTS: &str = "null_snapshot_";
/// A filter for the unit tests with random cases.
const UNIT_TESTS: &str = "model";

/// `cargo xtask soak [N] [--seed S]`.
pub(crate) fn command(parser: &mut lexopt::Parser) -> Result<ExitCode> {
    let (mut factor, mut seed) = (FACTOR, None);
    while let Some(arg) = parser.next()? {
        match arg {
            Long("seed") => seed = Some(parser.value()?.parse()?),
            Value(text) => factor = text.parse().context("soak N: not a number")?,
            _ => return Err(arg.unexpected().into()),
        }
    }
    if factor == 0 {
        bail!("soak N is 0; at least 1");
    }
    let seed = match seed {
        Some(seed) => seed,
        None => SystemTime::now().duration_since(UNIX_EPOCH)?.as_secs() << 20,
    };
    let mut failed = Vec::new();
    let mut note = |what: String, done: Result<()>| {
        if let Err(error) = done {
            say!("{what}: {error:#}");
            failed.push(what);
        }
    };
    for target in fuzz_targets()? {
        note(format!("fuzz target {target}"), fuzz(&target, seed, INPUTS * u64::from(factor)));
    }
    for round in 1..=factor {
        say!("unit tests with random cases, round {round} of {factor}");
        let mut test = cargo();
        test.args(["test", "--quiet", "--workspace", "--exclude", "vesta-tests", "--lib", UNIT_TESTS]);
        note(format!("unit tests, round {round}"), run(&mut test));
    }
    let mut system = Command::new(crate::process::this_program()?);
    system.args(["test", "--system", SYSTEM_TESTS]).env(SOAK, factor.to_string());
    note("whole-system tests".to_owned(), run(&mut system));
    for what in &failed {
        println!("failed: {what}");
    }
    println!("soak {factor} --seed {seed}: {}", if failed.is_empty() { "ok" } else { "FAILED" });
    Ok(if failed.is_empty() { ExitCode::SUCCESS } else { ExitCode::FAILURE })
}

/// The names of the fuzz targets.
fn fuzz_targets() -> Result<Vec<String>> {
    let dir = root().join("fuzz/fuzz_targets");
    let mut names = Vec::new();
    for entry in std::fs::read_dir(&dir).with_context(|| dir.display().to_string())? {
        let path = entry?.path();
        let name = path.file_stem().and_then(|name| name.to_str()).context("a target's name")?;
        names.push(name.to_owned());
    }
    names.sort();
    Ok(names)
}

fn fuzz(target: &str, seed: u64, count: u64) -> Result<()> {
    say!("fuzz target {target}: {count} inputs from seed {seed} on");
    let mut target_run = fuzz_command("run")?;
    // The development profile keeps overflow checks; optimization makes the inputs fast.
    target_run.args(["--config", "profile.dev.opt-level=1", "--bin", target, "--"]);
    run(target_run.arg(seed.to_string()).arg(count.to_string()))
}
