//! `cargo xtask openapi`: the description of the API in `docs/api`, which `vesta-openapi` writes.

use std::process::{Command, ExitCode};

use anyhow::{Result, bail};
use lexopt::prelude::*;

use crate::process::{cargo, output, run};

/// `cargo xtask openapi [--check]`.
pub(crate) fn command(parser: &mut lexopt::Parser) -> Result<ExitCode> {
    match parser.next()? {
        None => run(&mut generator())?,
        Some(Long("check")) => check()?,
        Some(arg) => return Err(arg.unexpected().into()),
    }
    Ok(ExitCode::SUCCESS)
}

/// Checks that the description is current, and that nothing of what writes it is in the monitor.
pub(crate) fn check() -> Result<()> {
    run(generator().arg("--check"))?;
    let tree = ["tree", "--package", "vesta-vmm", "--edges", "normal,build", "--prefix", "none"];
    let tree = output(cargo().args(tree))?;
    if let Some(line) = tree.lines().find(|line| line.starts_with("schemars")) {
        bail!("vesta-vmm is built with {line}; only xtask/openapi may enable the feature schema");
    }
    Ok(())
}

/// A package of its own, built alone: a feature that it enables would be on in all that is built
/// with it.
fn generator() -> Command {
    let mut command = cargo();
    command.args(["run", "--quiet", "--package", "vesta-openapi", "--"]);
    command
}
