//! `cargo xtask bench`: how long things take, beside what others take for them on the same host in the same run.
//!
//! Runs are interleaved (every monitor once, then every monitor again), so that what the host does meanwhile hits all
//! alike. What is printed are medians. A number means something beside the others of its table only: each table names
//! its host. Who takes part beside vesta is in [`peers`].

mod boot;
mod common;
mod cpu_time;
mod io;
mod measure;
mod monitor;
mod net;
mod peers;
mod qemu;
mod rounds;
mod serving_guest;
mod snapshot;
mod table;
mod vsock;

use std::process::ExitCode;

use anyhow::{Context, Result, bail};
use lexopt::prelude::*;

pub(crate) use boot::inner;
pub(crate) use io::inner as io_inner;
pub(crate) use net::inner as net_inner;
pub(crate) use snapshot::inner as snapshot_inner;
pub(crate) use vsock::inner as vsock_inner;

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
