//! `bench snapshot`: time to save, restore, clone and fork guests.
//!
//! - [`null`]: guests of a few instructions, wherever `/dev/kvm` opens: the cost of the monitor and
//!   the host's kernel.
//! - [`linux`]: Linux guests, where unmodified kernels run: time until a program in the guest
//!   answers.

mod common;
mod linux;
mod null;

use std::process::ExitCode;
use std::time::Duration;

use anyhow::Result;

use self::common::{FEWEST_RUNS, RunSpec};
use super::common::{check_runs, describe, files, kind_for_null_guests, on_host, today};
use super::peers::peers_and_runs;
use super::serving_guest::ServingGuest;
use crate::host::emulated::Emulated;
use crate::host::{self, Outcome};
use crate::process::say;

/// Longest time for the measurements on one host.
const HOST_TIMEOUT: Duration = Duration::from_mins(30);
/// `cargo xtask bench snapshot [--peer NAME=PATH]... [--runs N]`.
pub(super) fn command(parser: &mut lexopt::Parser) -> Result<ExitCode> {
    let (peers, runs) = peers_and_runs(parser, 9)?;
    check_runs(runs, FEWEST_RUNS)?;
    say!("building vesta-vmm and the guest's program");
    let monitors = peers.with_vesta()?;
    let dir = files()?;
    let guest = ServingGuest::make(&dir, "guest-vsock serve")?;

    let (kind, why) = host::choose()?;
    let null_kind = kind_for_null_guests(kind);
    println!("# Guests of a few instructions, on {}\n", describe(null_kind, &why));
    let spec = RunSpec { monitors, runs, dir, linux: None };
    let emulated = Emulated { timeout: HOST_TIMEOUT, ..Emulated::default() };
    let null = on_host(null_kind, "bench-snapshot-inner", &spec, &emulated)?;
    println!("# Linux ({}; 128 MiB, 1 vCPU), on {}\n", guest.kernel_name, describe(kind, &why));
    let spec = RunSpec { linux: Some(guest), ..spec };
    let linux = on_host(kind, "bench-snapshot-inner", &spec, &emulated)?;

    println!(
        "\n`cargo xtask bench snapshot`, {}: medians over {runs} interleaved runs ({FEWEST_RUNS} of\n\
         clones), in brackets the least and the most. Own memory: private pages in\n\
         /proc/PID/smaps_rollup.",
        today()?
    );
    let good = [null, linux].iter().all(|outcome| *outcome == Outcome::Exited(0));
    Ok(if good { ExitCode::SUCCESS } else { ExitCode::FAILURE })
}

/// `bench-snapshot-inner SPEC`: runs on the host, and prints the tables.
pub(crate) fn inner(parser: &mut lexopt::Parser) -> Result<ExitCode> {
    let spec: RunSpec = super::common::spec(parser)?;
    match &spec.linux {
        None => null::tables(&spec)?,
        Some(guest) => linux::tables(&spec, guest)?,
    }
    Ok(ExitCode::SUCCESS)
}
