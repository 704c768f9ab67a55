//! `cargo xtask bench`: how long things take, beside what others take for them on the same host in the same run.
//!
//! Runs are interleaved (every monitor once, then every monitor again), so that what the host does meanwhile hits all
//! alike. What is printed are medians. A number means something beside the others of its table only: each table names
//! its host.

mod boot;
mod io;
mod measure;
mod net;
mod serving_guest;
mod snapshot;
mod table;
mod vsock;

use std::ffi::OsString;
use std::path::PathBuf;
use std::process::ExitCode;

use anyhow::{Context, Result, bail};
use lexopt::prelude::*;
use serde::{Deserialize, Serialize};

use crate::host::Kind;

pub(crate) use boot::inner;
pub(crate) use io::inner as io_inner;
pub(crate) use net::inner as net_inner;
pub(crate) use snapshot::inner as snapshot_inner;
pub(crate) use vsock::inner as vsock_inner;

/// A monitor to measure.
#[derive(Debug, Clone, Serialize, Deserialize)]
struct Monitor {
    name: String,
    path: PathBuf,
    kind: MonitorKind,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
enum MonitorKind {
    /// It has Firecracker's API and flags.
    Api,
    /// QEMU with its `microvm` machine.
    Qemu,
}

impl Monitor {
    fn api(name: &str, path: PathBuf) -> Monitor {
        Monitor { name: name.to_owned(), path, kind: MonitorKind::Api }
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

fn describe(kind: Kind, why: &str) -> String {
    let system = rustix::system::uname();
    match kind {
        Kind::Native => format!("{kind} (Linux {}; {why})", system.release().to_string_lossy()),
        Kind::Emulated => kind.to_string(),
    }
}

fn peer(text: OsString) -> Result<Monitor> {
    let text = text.string()?;
    let (name, path) =
        text.split_once('=').with_context(|| format!("--peer is {text}: it must be NAME=PATH"))?;
    let path = std::fs::canonicalize(path).with_context(|| format!("--peer {name}: {path}"))?;
    Ok(Monitor::api(name, path))
}
