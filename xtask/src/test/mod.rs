//! `cargo xtask test`: runs lints, unit tests and whole-system tests, and prints one summary line.
//!
//! - Lints and unit tests run natively.
//! - Whole-system tests run on the [host](crate::host). Tests in `null_*` binaries use guests of a
//!   few instructions, which run natively wherever `/dev/kvm` opens, also on a software KVM.
//! - A filter is a part of a test's name, in all layers. Lints are called `lint::NAME`.

mod build;
mod deny;
pub(crate) mod inner;
mod lints;
mod record;
mod system;
mod tally;
mod unit;

use std::process::ExitCode;
use std::time::Instant;

use anyhow::Result;
use lexopt::prelude::*;

pub(crate) use build::{
    guest_program as build_guest_program, load as build_load, net_tool as build_net_tool, vmm as build_vmm,
};

use self::tally::Tally;

pub(crate) use lints::fuzz_command;

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
    // A layer that cannot run counts as one failure, and the other layers still run.
    let mut layer = |wanted: bool, name: &str, run: &dyn Fn(&str) -> Result<Tally>| {
        if wanted {
            tally.add(run(&filter).unwrap_or_else(|error| Tally::failure(format!("{name}: {error:#}"))));
        }
    };
    layer(layers.lint, "lints", &|filter| Ok(lints::run(filter)));
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
