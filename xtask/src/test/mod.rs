//! `cargo xtask test`: lints, unit tests and whole-system tests, and one line that sums them up.
//!
//! - Lints and unit tests run natively.
//! - Whole-system tests run on the [host](crate::host). Those of binaries called `null_*` use guests of a few
//!   instructions, which run natively wherever `/dev/kvm` opens, a software KVM included.
//! - A filter is a part of a test's name, on all layers; the lints are called `lint::fmt`, `lint::clippy` and `lint::fuzz`.

mod build;
pub(crate) mod inner;
mod record;
mod system;
mod unit;

use std::process::{Command, ExitCode, Stdio};
use std::time::Instant;

use anyhow::Result;
use lexopt::prelude::*;

pub(crate) use build::{
    guest_program as build_guest_program, load as build_load, net_tool as build_net_tool, vmm as build_vmm,
};

use crate::process::{cargo, root, say};

/// What came of some tests.
#[derive(Debug, Default, PartialEq, Eq)]
struct Tally {
    passed: usize,
    failed: usize,
    ignored: usize,
    filtered_out: usize,
    /// What failed, by name, and what to know about those that did not count.
    notes: Vec<String>,
}

impl Tally {
    fn add(&mut self, other: Tally) {
        self.passed += other.passed;
        self.failed += other.failed;
        self.ignored += other.ignored;
        self.filtered_out += other.filtered_out;
        self.notes.extend(other.notes);
    }

    fn failure(note: String) -> Tally {
        Tally { failed: 1, notes: vec![note], ..Tally::default() }
    }
}

/// Which layers to run.
struct Layers {
    lint: bool,
    unit: bool,
    system: bool,
}

/// `cargo xtask test [--lint] [--unit] [--system] [FILTER]`.
pub(crate) fn command(parser: &mut lexopt::Parser) -> Result<ExitCode> {
    let mut layers = Layers { lint: false, unit: false, system: false };
    let mut filter = String::new();
    while let Some(arg) = parser.next()? {
        match arg {
            Long("lint") => layers.lint = true,
            Long("unit") => layers.unit = true,
            Long("system") => layers.system = true,
            Value(text) if filter.is_empty() => filter = text.string()?,
            _ => return Err(arg.unexpected().into()),
        }
    }
    if !(layers.lint || layers.unit || layers.system) {
        layers = Layers { lint: true, unit: true, system: true };
    }
    let started = Instant::now();
    let mut tally = Tally::default();
    // A layer that cannot run at all is a failure of its own, and the others still run.
    let mut layer = |wanted: bool, name: &str, run: &dyn Fn(&str) -> Result<Tally>| {
        if wanted {
            tally.add(run(&filter).unwrap_or_else(|error| Tally::failure(format!("{name}: {error:#}"))));
        }
    };
    layer(layers.lint, "lints", &lint);
    layer(layers.unit, "unit tests", &unit::run);
    layer(layers.system, "whole-system tests", &system::run);
    Ok(sum_up(&tally, started))
}

fn sum_up(tally: &Tally, started: Instant) -> ExitCode {
    println!();
    for note in &tally.notes {
        println!("{note}");
    }
    let good = tally.failed == 0;
    println!(
        "test result: {}. {} passed; {} failed; {} ignored; 0 measured; {} filtered out; finished in {:.2}s",
        if good { "ok" } else { "FAILED" },
        tally.passed,
        tally.failed,
        tally.ignored,
        tally.filtered_out,
        started.elapsed().as_secs_f64()
    );
    if good { ExitCode::SUCCESS } else { ExitCode::FAILURE }
}

/// Formatting, clippy and whether the fuzz targets compile, each as a test.
fn lint(filter: &str) -> Result<Tally> {
    let clippy = ["clippy", "--quiet", "--workspace", "--all-targets", "--", "--deny", "warnings"];
    let lints: [(&str, &dyn Fn() -> Result<bool>); 3] = [
        ("lint::fmt", &|| succeeds(&["fmt", "--all", "--check"])),
        ("lint::clippy", &|| succeeds(&clippy)),
        ("lint::fuzz", &fuzz_targets_compile),
    ];
    let mut tally = Tally::default();
    for (name, run) in lints {
        if !name.contains(filter) {
            tally.filtered_out += 1;
            continue;
        }
        say!("{name}");
        if run()? {
            tally.passed += 1;
        } else {
            tally.add(Tally::failure(format!("failed: {name}")));
        }
    }
    Ok(tally)
}

fn succeeds(args: &[&str]) -> Result<bool> {
    say!("cargo {}", args.join(" "));
    Ok(cargo().args(args).status()?.success())
}

/// Checks that the targets in `fuzz/` compile.
fn fuzz_targets_compile() -> Result<bool> {
    // It needs nothing that the workspace does not have. Where that is not there yet, cargo gets
    // it.
    let mut offline = fuzz_command("check")?;
    if offline.arg("--offline").stderr(Stdio::null()).status()?.success() {
        return Ok(true);
    }
    Ok(fuzz_command("check")?.status()?.success())
}

/// `cargo COMMAND` for `fuzz/`, a workspace of its own, without the fuzzer's runtime: a stand-in
/// takes its place.
pub(crate) fn fuzz_command(command: &str) -> Result<Command> {
    let (fuzz, lock) = (root().join("fuzz"), root().join("fuzz/Cargo.lock"));
    if !lock.exists() {
        // The versions that are here already.
        std::fs::copy(root().join("Cargo.lock"), &lock)?;
    }
    let stand_in = format!("patch.crates-io.libfuzzer-sys.path='{}'", fuzz.join("stand-in").display());
    let mut cargo = cargo();
    cargo.args([command, "--quiet", "--config", &stand_in, "--config", "profile.dev.debug=false"]);
    cargo.arg("--manifest-path").arg(fuzz.join("Cargo.toml"));
    cargo.arg("--target-dir").arg(root().join("target/fuzz"));
    Ok(cargo)
}
