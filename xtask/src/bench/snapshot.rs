//! `bench snapshot`: saving, restoring, cloning and forking.
//!
//! - [`null`]: guests of a few instructions, wherever `/dev/kvm` opens: what the monitor and its host's kernel take.
//! - [`linux`]: Linux guests, where unmodified kernels run: how long until a program in the guest answers.

mod linux;
mod null;

use std::fs;
use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::time::Duration;

use anyhow::{Result, anyhow};
use lexopt::prelude::*;
use serde::{Deserialize, Serialize};
use serde_json::json;
use vesta_tests::api::ApiClient;
use vesta_tests::vmm::{Vmm, VmmBuilder};

use super::peers::Peers;
use super::rounds::Turn;
use super::serving_guest::ServingGuest;
use super::{Monitor, check_runs, describe, files, kind_for_null_guests, on_host, today};
use crate::host::emulated::Emulated;
use crate::host::{self, Outcome};
use crate::process::say;

/// Longest wait for anything.
const PATIENCE: Duration = Duration::from_mins(1);
/// Longest that the measurements on one host may take.
const ALL_OF_IT: Duration = Duration::from_mins(30);
/// Fewest runs that a median is taken over.
const FEWEST_RUNS: usize = 5;

/// What runs on a host.
#[derive(Debug, Serialize, Deserialize)]
struct Orders {
    monitors: Vec<Monitor>,
    runs: usize,
    /// Where snapshots are written.
    dir: PathBuf,
    /// The Linux guest; none: guests of a few instructions.
    linux: Option<ServingGuest>,
}

/// `cargo xtask bench snapshot [--peer NAME=PATH]... [--runs N]`.
pub(super) fn command(parser: &mut lexopt::Parser) -> Result<ExitCode> {
    let (mut peers, mut runs) = (Peers::default(), 9);
    while let Some(arg) = parser.next()? {
        match arg {
            Long("peer") => peers.add(parser.value()?),
            Long("no-peers") => peers.only_named(),
            Long("runs") => runs = parser.value()?.parse()?,
            _ => return Err(arg.unexpected().into()),
        }
    }
    check_runs(runs, FEWEST_RUNS)?;
    say!("building vesta-vmm and the guest's program");
    let mut monitors = vec![Monitor::vesta()?];
    monitors.extend(peers.monitors()?);
    let dir = files()?;
    let guest = ServingGuest::make(&dir, "guest-vsock serve")?;

    let (kind, why) = host::choose()?;
    let null_kind = kind_for_null_guests(kind);
    println!("# Guests of a few instructions, on {}\n", describe(null_kind, &why));
    let orders = Orders { monitors, runs, dir, linux: None };
    let emulated = Emulated { timeout: ALL_OF_IT, ..Emulated::default() };
    let null = on_host(null_kind, "bench-snapshot-inner", &orders, &emulated)?;
    println!("# Linux ({}; 128 MiB, 1 vCPU), on {}\n", guest.kernel_name, describe(kind, &why));
    let orders = Orders { linux: Some(guest), ..orders };
    let linux = on_host(kind, "bench-snapshot-inner", &orders, &emulated)?;

    println!(
        "\n`cargo xtask bench snapshot`, {}: medians over {runs} interleaved runs ({FEWEST_RUNS} of clones), in brackets the",
        today()?
    );
    println!("least and the most. Own memory: private pages in /proc/PID/smaps_rollup.");
    let good = [null, linux].iter().all(|outcome| *outcome == Outcome::Exited(0));
    Ok(if good { ExitCode::SUCCESS } else { ExitCode::FAILURE })
}

/// `bench-snapshot-inner ORDERS`: runs on the host, and prints the tables.
pub(crate) fn inner(parser: &mut lexopt::Parser) -> Result<ExitCode> {
    let orders: Orders = super::orders(parser)?;
    match &orders.linux {
        None => null::tables(&orders)?,
        Some(guest) => linux::tables(&orders, guest)?,
    }
    Ok(ExitCode::SUCCESS)
}

fn pause(api: &mut ApiClient) -> Result<()> {
    api.patch("/vm", &json!({"state": "Paused"}))?.ok().map(drop)
}

fn ms(time: Duration) -> f64 {
    time.as_secs_f64() * 1000.0
}

/// A turn for each of these monitors.
fn turns<'a>(monitors: impl IntoIterator<Item = &'a Monitor>) -> Vec<Turn<&'a Monitor>> {
    let turn = |monitor: &'a Monitor| Turn {
        name: monitor.name.clone(),
        may_fail: monitor.peer,
        contestant: monitor,
    };
    monitors.into_iter().map(turn).collect()
}

/// Private memory of a process, in KiB.
fn private_kib(pid: u64) -> Result<f64> {
    let text = fs::read_to_string(format!("/proc/{pid}/smaps_rollup"))?;
    let kib = text
        .lines()
        .filter(|line| line.starts_with("Private_"))
        .filter_map(|line| line.split_whitespace().nth(1)?.parse::<u32>().ok())
        .sum::<u32>();
    Ok(kib.into())
}

/// Starts so many monitors, and does the same with all of them at once.
fn all_at_once(program: &Path, count: usize, each: impl Fn(&Vmm) -> Result<()> + Sync) -> Result<Vec<Vmm>> {
    // Started from this thread, with which they end.
    let spawn = |_| VmmBuilder::new(program)?.quiet().with_api().stdout_to_file()?.spawn();
    let monitors = (0..count).map(spawn).collect::<Result<Vec<_>>>()?;
    std::thread::scope(|scope| {
        let threads: Vec<_> = monitors.iter().map(|monitor| scope.spawn(|| each(monitor))).collect();
        threads.into_iter().try_for_each(|thread| thread.join().map_err(|_| anyhow!("a thread failed"))?)
    })?;
    Ok(monitors)
}
