//! What all benchmarks share: their files, running on a host, and the description of the host.

use std::ffi::OsString;
use std::path::PathBuf;
use std::process::Command;

use anyhow::{Context, Result, bail};
use serde::{Deserialize, Serialize};

use crate::host::emulated::Emulated;
use crate::host::{self, Job, Kind, Outcome};
use crate::process::{output, root};

/// The directory for the benchmarks' files: beside the binaries, which an emulated host shares.
pub(super) fn files() -> Result<PathBuf> {
    let program = crate::process::this_program()?;
    let dir = program.parent().context("this program is in no directory")?.join("bench");
    std::fs::create_dir_all(&dir).with_context(|| dir.display().to_string())?;
    Ok(dir)
}

/// Runs this program's command `inner` on the host, with a file that holds the specification.
pub(super) fn on_host(
    kind: Kind,
    inner: &str,
    spec: &impl Serialize,
    emulated: &Emulated,
) -> Result<Outcome> {
    let file = files()?.join(format!("{inner}-spec"));
    std::fs::write(&file, serde_json::to_vec(spec)?)?;
    let argv: [OsString; 3] = [crate::process::this_program()?.into(), inner.into(), file.into()];
    let mut job = Job::here(argv.to_vec())?;
    root().clone_into(&mut job.cwd);
    let outcome = host::run(kind, &job, emulated)?;
    outcome.report();
    Ok(outcome)
}

/// Reads the specification that [`on_host`] wrote.
pub(super) fn spec<T: for<'de> Deserialize<'de>>(parser: &mut lexopt::Parser) -> Result<T> {
    let file = std::fs::read(PathBuf::from(parser.value()?))?;
    serde_json::from_slice(&file).context("the spec")
}

/// Keeps the contestants whose name contains one of `only`; all if that is empty.
pub(super) fn only_named<C>(
    contestants: Vec<C>,
    only: &[String],
    name: impl Fn(&C) -> &String,
) -> Result<Vec<C>> {
    let named = |contestant: &C| only.iter().any(|part| name(contestant).contains(part));
    let kept: Vec<C> =
        contestants.into_iter().filter(|contestant| only.is_empty() || named(contestant)).collect();
    if kept.is_empty() {
        bail!("--only {}: no contestant has this name", only.join(", "));
    }
    Ok(kept)
}

/// Refuses fewer runs than a median needs.
pub(super) fn check_runs(runs: usize, fewest: usize) -> Result<()> {
    if runs < fewest {
        bail!("--runs is {runs}; at least {fewest}");
    }
    Ok(())
}

/// Refuses measurements that are too short to mean anything, or too long to wait for.
pub(super) fn check_seconds(seconds: f64) -> Result<()> {
    if !(0.05..=60.0).contains(&seconds) {
        bail!("--seconds is {seconds}; between 0.05 and 60");
    }
    Ok(())
}

/// The host for guests of a few instructions: this machine wherever `/dev/kvm` opens, because even
/// a software KVM runs them at native speed.
pub(super) fn kind_for_null_guests(kind: Kind) -> Kind {
    let kvm_opens = std::fs::File::options().read(true).write(true).open("/dev/kvm").is_ok();
    if kvm_opens { Kind::Native } else { kind }
}

pub(super) fn today() -> Result<String> {
    Ok(output(Command::new("date").arg("--iso-8601"))?.trim().to_owned())
}

pub(super) fn describe(kind: Kind, why: &str) -> String {
    let system = rustix::system::uname();
    match kind {
        Kind::Native => format!("{kind} (Linux {}; {why})", system.release().to_string_lossy()),
        Kind::Emulated => kind.to_string(),
    }
}
