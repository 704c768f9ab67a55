//! `cargo xtask bench`: measures vesta beside other monitors, on the same host and in the same run.
//!
//! Runs are interleaved (every monitor once, then every monitor again), so that other load on the
//! host affects all of them. Tables show medians. Numbers can only be compared within one table;
//! each table names its host. [`peers`] chooses the other monitors.

mod api;
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

pub(crate) use api::inner as api_inner;
pub(crate) use boot::inner;
pub(crate) use io::inner as io_inner;
pub(crate) use net::inner as net_inner;
pub(crate) use snapshot::inner as snapshot_inner;
pub(crate) use vsock::inner as vsock_inner;

/// `cargo xtask bench api|boot|io|net|snapshot|vsock ...`.
pub(crate) fn command(parser: &mut lexopt::Parser) -> Result<ExitCode> {
    const BENCHMARKS: &str = "one of api, boot, io, net, snapshot, vsock";
    let what = parser.value().with_context(|| format!("no benchmark is given; {BENCHMARKS}"))?.string()?;
    match what.as_str() {
        "api" => api::command(parser),
        "boot" => boot::command(parser),
        "io" => io::command(parser),
        "net" => net::command(parser),
        "snapshot" => snapshot::command(parser),
        "vsock" => vsock::command(parser),
        other => bail!("benchmark {other}: unknown; {BENCHMARKS}"),
    }
}
