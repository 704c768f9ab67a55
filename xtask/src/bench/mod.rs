//! `cargo xtask bench`: how long things take, beside what others take for them on the same host in the same run.
//!
//! Runs are interleaved (every monitor once, then every monitor again), so that what the host does meanwhile hits all
//! alike. What is printed are medians. A number means something beside the others of its table only: each table names
//! its host. Who takes part beside vesta is in [`peers`].

mod boot;
mod io;
mod measure;
mod net;
mod peers;
mod qemu;
mod rounds;
mod serving_guest;
mod snapshot;
mod table;
mod vsock;

use std::ffi::OsString;
use std::path::PathBuf;
use std::process::{Command, ExitCode};

use anyhow::{Context, Result, bail};
use lexopt::prelude::*;
use serde::{Deserialize, Serialize};
use vesta_tests::guest::env;

use crate::host::emulated::Emulated;
use crate::host::{self, Job, Kind, Outcome};
use crate::process::{output, root};
use crate::test::build_vmm;

pub(crate) use boot::inner;
pub(crate) use io::inner as io_inner;
pub(crate) use net::inner as net_inner;
pub(crate) use snapshot::inner as snapshot_inner;
pub(crate) use vsock::inner as vsock_inner;

/// A monitor to measure.
#[derive(Debug, Clone, Serialize, Deserialize)]
struct Monitor {
    /// What tables call it.
    name: String,
    path: PathBuf,
    kind: MonitorKind,
    /// It is what vesta is compared with. One that cannot do what is asked is left out, with its
    /// reason.
    peer: bool,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
enum MonitorKind {
    /// This one, or an older build of it.
    Vesta,
    /// It has Firecracker's API and flags, and nothing more.
    Firecracker,
    /// QEMU with its `microvm` machine.
    Qemu,
}

impl Monitor {
    /// The monitor under test: the binary that `VESTA_VMM` names, else one that is built here.
    fn vesta() -> Result<Monitor> {
        let path = match std::env::var_os(env::VMM).map(PathBuf::from) {
            Some(path) => path.canonicalize().with_context(|| format!("{}: {}", env::VMM, path.display()))?,
            None => build_vmm(true)?,
        };
        Ok(Monitor { name: "vesta".to_owned(), path, kind: MonitorKind::Vesta, peer: false })
    }

    fn is_vesta(&self) -> bool {
        self.kind == MonitorKind::Vesta
    }
}

/// `cargo xtask bench boot|io|net|snapshot|vsock ...`.
pub(crate) fn command(parser: &mut lexopt::Parser) -> Result<ExitCode> {
    const THERE_ARE: &str = "there are boot, io, net, snapshot and vsock";
    let what = parser.value().with_context(|| format!("which benchmark? {THERE_ARE}"))?.string()?;
    match what.as_str() {
        "boot" => boot::command(parser),
        "io" => io::command(parser),
        "net" => net::command(parser),
        "snapshot" => snapshot::command(parser),
        "vsock" => vsock::command(parser),
        other => bail!("there is no benchmark {other}: {THERE_ARE}"),
    }
}

/// Where the benchmarks' files are: beside the binaries, a place that an emulated host shares.
fn files() -> Result<PathBuf> {
    let program = std::env::current_exe()?;
    let dir = program.parent().context("this program is in no directory")?.join("bench");
    std::fs::create_dir_all(&dir).with_context(|| dir.display().to_string())?;
    Ok(dir)
}

/// Runs this program's command `inner` on the host, with a file of these orders.
fn on_host(kind: Kind, inner: &str, orders: &impl Serialize, emulated: &Emulated) -> Result<Outcome> {
    let file = files()?.join(format!("{inner}-orders"));
    std::fs::write(&file, serde_json::to_vec(orders)?)?;
    let argv: [OsString; 3] = [std::env::current_exe()?.into(), inner.into(), file.into()];
    let mut job = Job::here(argv.to_vec())?;
    root().clone_into(&mut job.cwd);
    let outcome = host::run(kind, &job, emulated)?;
    outcome.report();
    Ok(outcome)
}

/// The orders that [`on_host`] wrote.
fn orders<T: for<'de> Deserialize<'de>>(parser: &mut lexopt::Parser) -> Result<T> {
    let file = std::fs::read(PathBuf::from(parser.value()?))?;
    serde_json::from_slice(&file).context("the orders")
}

/// Whether a median of so many runs says anything.
fn check_runs(runs: usize, fewest: usize) -> Result<()> {
    if runs < fewest {
        bail!("--runs is {runs}: a median is taken over at least {fewest}");
    }
    Ok(())
}

/// Whether so long a measurement says anything.
fn check_seconds(seconds: f64) -> Result<()> {
    if !(0.05..=60.0).contains(&seconds) {
        bail!("--seconds is {seconds}: it must be between 0.05 and 60");
    }
    Ok(())
}

/// Where guests of a few instructions run: here wherever `/dev/kvm` opens, since a software KVM runs them at native speed.
fn kind_for_null_guests(kind: Kind) -> Kind {
    let kvm_opens = std::fs::File::options().read(true).write(true).open("/dev/kvm").is_ok();
    if kvm_opens { Kind::Native } else { kind }
}

fn today() -> Result<String> {
    Ok(output(Command::new("date").arg("--iso-8601"))?.trim().to_owned())
}

fn describe(kind: Kind, why: &str) -> String {
    let system = rustix::system::uname();
    match kind {
        Kind::Native => format!("{kind} (Linux {}; {why})", system.release().to_string_lossy()),
        Kind::Emulated => kind.to_string(),
    }
}
