//! `bench io`: speed and host CPU cost of a guest's disk, beside the same file without a guest.
//!
//! Every contestant boots the same guest with the same disks. The guest runs the load generator
//! (`vesta-load`) that also runs on the bare file, so guest and host can be compared. `fio` is not
//! used: it needs forty libraries, and starting it on an emulated host takes longer than the
//! measurements.
//!
//! [`disks`] makes the disks, [`contestant`] starts a monitor, [`sample`] takes one measurement and
//! [`report`] prints the tables.

mod contestant;
mod disks;
mod report;
mod sample;
mod setup;

use std::path::Path;
use std::process::ExitCode;
use std::time::Duration;

use anyhow::Result;
use lexopt::prelude::*;
use serde::{Deserialize, Serialize};
use vesta_tests::load::Workload;

use super::common::{check_runs, check_seconds, describe, files, on_host, only_named, today};
use super::monitor::Monitor;
use super::peers::{Peers, lacking, not_measured};
use crate::host::emulated::Emulated;
use crate::host::{self, Kind};
use crate::process::say;
use crate::test::build_load;
use crate::{apt, kernels};
use contestant::{Contestant, Drive, Engine};
use disks::{DiskPlan, Disks};
use report::Results;
use setup::{GuestParts, Setup};

/// Fewest rounds that a median is taken over.
const FEWEST_RUNS: usize = 5;
/// Longest time for all measurements.
const HOST_TIMEOUT: Duration = Duration::from_hours(1);

/// The workloads on each disk.
const WORKLOADS: [&str; 7] = [
    "randread:4096:1",
    "randwrite:4096:1",
    // A flush after every 64 writes.
    "randwrite:4096:1:64",
    "randread:4096:32",
    "randwrite:4096:32",
    "read:131072:4",
    "write:131072:4",
];

/// What to measure on the host.
#[derive(Debug, Serialize, Deserialize)]
struct RunSpec {
    contestants: Vec<Contestant>,
    runs: usize,
    seconds: f64,
    workloads: Vec<String>,
    guest: GuestParts,
    disks: DiskPlan,
}

/// `cargo xtask bench io`.
pub(super) fn command(parser: &mut lexopt::Parser) -> Result<ExitCode> {
    let (mut peers, mut runs, mut seconds, mut pci) = (Peers::default(), 9, 0.5, false);
    let (mut disk, mut workloads, mut only) = (None, Vec::new(), Vec::new());
    while let Some(arg) = parser.next()? {
        match arg {
            Long("peer") => peers.add(parser.value()?),
            Long("no-peers") => peers.only_named(),
            Long("runs") => runs = parser.value()?.parse()?,
            Long("seconds") => seconds = parser.value()?.parse()?,
            Long("pci") => pci = true,
            Long("disk") => disk = Some(std::fs::canonicalize(parser.value()?)?),
            Long("workload") => {
                let workload: Workload = parser.value()?.parse()?;
                workloads.push(workload.to_string());
            }
            Long("only") => only.push(parser.value()?.string()?),
            _ => return Err(arg.unexpected().into()),
        }
    }
    check_runs(runs, FEWEST_RUNS)?;
    check_seconds(seconds)?;
    if workloads.is_empty() {
        workloads = WORKLOADS.map(str::to_owned).into();
    }

    say!("building vesta-vmm and vesta-load");
    let load = build_load()?;
    let monitors = peers.with_vesta()?;
    let contestants = only_named(contestants(&load, &monitors, pci), &only, |contestant| &contestant.name)?;
    let dir = files()?;
    let (kind, why) = host::choose()?;
    let (kernel, kernel_name) = kernels::preferred()?;
    let guest = GuestParts {
        kernel: kernel.image,
        modules: kernel.modules.map(|modules| modules.dir().to_owned()),
        busybox: kernels::busybox()?,
        load,
    };
    let disks = DiskPlan { emulated: kind == Kind::Emulated, given: disk, dir };
    let spec = RunSpec { contestants, runs, seconds, workloads, guest, disks };
    println!("## Disks, as {kernel_name} with one vCPU and 128 MiB sees them, on {}\n", describe(kind, &why));
    let mut emulated = Emulated { timeout: HOST_TIMEOUT, pin: host::default_pin()?, ..Emulated::default() };
    if kind == Kind::Emulated {
        apt::ensure(&[("mkfs.ext4", "e2fsprogs")])?;
        emulated.modules = vec!["null_blk".to_owned()];
    }
    let outcome = on_host(kind, "bench-io-inner", &spec, &emulated)?;
    print!("{}", lacking(&monitors, if pci { "overlays and no virtio-pci" } else { "overlays" }));
    println!(
        "\n`cargo xtask bench io`, {}: medians over {runs} interleaved rounds of {seconds} s for each\n\
         workload, in brackets the least and the most. Host CPU: what the monitor's threads used (guest\n\
         code is part of its vCPU), from schedstat.",
        today()?
    );
    Ok(outcome.report())
}

fn contestants(load: &Path, monitors: &[Monitor], pci: bool) -> Vec<Contestant> {
    let mut all = vec![Contestant::raw(load)];
    for monitor in monitors {
        for pci in [false, true].into_iter().filter(|&with| !with || pci && monitor.is_vesta()) {
            for engine in [Engine::Async, Engine::Sync] {
                all.push(Contestant::api(monitor, Drive { engine, ..Drive::default() }, pci));
            }
        }
        all.push(Contestant::api(monitor, Drive { writeback: true, ..Drive::default() }, false));
        if monitor.is_vesta() {
            all.push(Contestant::api(monitor, Drive { overlay: true, ..Drive::default() }, false));
        }
    }
    all.extend(apt::find("qemu-system-x86_64").map(|path| Contestant::qemu(&path)));
    all
}

/// `bench-io-inner SPEC`: runs on the host, and prints the tables.
pub(crate) fn inner(parser: &mut lexopt::Parser) -> Result<ExitCode> {
    let spec: RunSpec = super::common::spec(parser)?;
    let workloads: Vec<Workload> = spec.workloads.iter().map(|text| text.parse()).collect::<Result<_>>()?;
    let disks = Disks::make(&spec.disks)?;
    let setup = Setup::new(&spec.guest, &disks, &workloads, spec.seconds)?;
    let mut results = Results::new(spec.contestants);
    let mut left_out = String::new();
    // The first round is not counted: it brings files into the page cache.
    for round in 0..=spec.runs {
        let mut index = 0;
        while let Some(contestant) = results.contestant(index) {
            disks.forget()?;
            match sample::measure(&setup, contestant) {
                Ok(samples) if round > 0 => results.add(index, samples),
                Ok(_) => {}
                Err(error) if contestant.is_peer() => {
                    say!("{} is not measured: {error:#}", contestant.name);
                    left_out += &not_measured(&contestant.name, &format!("{error:#}"));
                    results.exclude(index);
                    continue;
                }
                Err(error) => return Err(error.context(contestant.name.clone())),
            }
            index += 1;
        }
        if round > 0 {
            say!("round {round} of {} is done", spec.runs);
        }
    }
    print!("{}{left_out}", results.tables(disks.list(), &workloads));
    Ok(ExitCode::SUCCESS)
}
