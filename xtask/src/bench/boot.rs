//! `bench boot`: time from spawn to the API, to a guest's first instruction and to its first
//! process.
//!
//! Two tables, each on the host that suits it: the null guest wherever `/dev/kvm` opens (a software
//! KVM runs it at native speed), Linux where unmodified kernels run.

use std::path::PathBuf;
use std::process::ExitCode;

use anyhow::Result;
use serde::{Deserialize, Serialize};
use vesta_tests::elf::null_guest_of_any_monitor;
use vesta_tests::guest::{BOOT_ARGS, Guest};
use vesta_tests::initramfs::Initramfs;

use super::common::{check_runs, describe, files, kind_for_null_guests, on_host, today};
use super::measure::{BootSample, INIT, Milestone, boot_once};
use super::monitor::{Monitor, MonitorKind};
use super::peers::peers_and_runs;
use super::rounds::{Entry, interleaved};
use crate::host::emulated::Emulated;
use crate::host::{self, Outcome};
use crate::process::say;
use crate::{apt, kernels};

/// What to measure on the host.
#[derive(Debug, Serialize, Deserialize)]
struct RunSpec {
    monitors: Vec<Monitor>,
    runs: usize,
    guest: GuestFiles,
}

#[derive(Debug, Serialize, Deserialize)]
enum GuestFiles {
    Null { kernel: PathBuf },
    Linux { kernel: PathBuf, initrd: PathBuf },
}

/// Fewest runs that a median is taken over.
const FEWEST_RUNS: usize = 11;

/// `cargo xtask bench boot [--runs N] [PEERS]`.
pub(super) fn command(parser: &mut lexopt::Parser) -> Result<ExitCode> {
    let (peers, runs) = peers_and_runs(parser, FEWEST_RUNS)?;
    check_runs(runs, FEWEST_RUNS)?;
    say!("building vesta-vmm");
    let mut monitors = peers.with_vesta()?;
    let dir = files()?;

    let (kind, why) = host::choose()?;
    let null_kind = kind_for_null_guests(kind);
    let kernel = dir.join("null-guest");
    std::fs::write(&kernel, null_guest_of_any_monitor().bytes())?;
    println!(
        "## A null guest (one instruction, then it halts; 128 MiB, 1 vCPU), on {}\n",
        describe(null_kind, &why)
    );
    let spec = RunSpec { monitors: monitors.clone(), runs, guest: GuestFiles::Null { kernel } };
    let null = on_host(null_kind, "bench-inner", &spec, &Emulated::default())?;

    let (kernel, name) = kernels::preferred()?;
    let initrd = dir.join("initramfs");
    std::fs::write(
        &initrd,
        Initramfs::new(&kernels::busybox()?)?.finish(&format!("echo {INIT}\nsleep 1000")),
    )?;
    let qemu = apt::find("qemu-system-x86_64");
    monitors.extend(qemu.map(|path| Monitor {
        name: "QEMU microvm".to_owned(),
        path,
        kind: MonitorKind::Qemu,
        peer: true,
    }));
    println!("\n## Linux ({name}, initramfs with busybox; 128 MiB, 1 vCPU), on {}\n", describe(kind, &why));
    let spec = RunSpec { monitors, runs, guest: GuestFiles::Linux { kernel: kernel.image, initrd } };
    let linux = on_host(kind, "bench-inner", &spec, &Emulated::default())?;
    println!(
        "\n`cargo xtask bench boot`, {}: medians over {runs} interleaved runs, in brackets the least\n\
         and the most. Resident memory: the sum of Rss in /proc/PID/smaps, without mappings as large as\n\
         guest memory, at the guest's first instruction or process.",
        today()?
    );
    let good = [null, linux].iter().all(|outcome| *outcome == Outcome::Exited(0));
    Ok(if good { ExitCode::SUCCESS } else { ExitCode::FAILURE })
}

/// `bench-inner SPEC`: runs on the host, and prints the table.
pub(crate) fn inner(parser: &mut lexopt::Parser) -> Result<ExitCode> {
    let spec: RunSpec = super::common::spec(parser)?;
    let (guest, milestone) = match &spec.guest {
        GuestFiles::Null { kernel } => (Guest::bare(kernel), Milestone::FirstInstruction),
        GuestFiles::Linux { kernel, initrd } => {
            let mut guest = Guest::bare(kernel).boot_args(BOOT_ARGS);
            guest.initrd = Some(initrd.clone());
            (guest, Milestone::Init)
        }
    };
    let entry =
        |monitor: Monitor| Entry { name: monitor.name.clone(), may_fail: monitor.peer, contestant: monitor };
    let entries = spec.monitors.into_iter().map(entry).collect();
    let measured =
        interleaved(entries, spec.runs, true, |monitor| Ok(values(&boot_once(monitor, &guest, milestone)?)))?;
    print!("{}", measured.markdown(&columns(milestone)));
    Ok(ExitCode::SUCCESS)
}

fn columns(milestone: Milestone) -> [&'static str; 5] {
    let (start, spawn) = match milestone {
        Milestone::FirstInstruction => {
            ("InstanceStart to first instruction, ms", "spawn to first instruction, ms")
        }
        Milestone::Init => ("InstanceStart to init, ms", "spawn to init, ms"),
    };
    ["spawn to API, ms", "InstanceStart call, ms", start, spawn, "resident above the guest's, KiB"]
}

/// The values of the columns.
fn values(sample: &BootSample) -> Vec<Vec<f64>> {
    [
        sample.api_ms,
        sample.start_call_ms,
        sample.start_to_milestone_ms,
        sample.spawn_to_milestone_ms,
        sample.resident_kib,
    ]
    .map(|value| value.into_iter().collect())
    .into()
}
