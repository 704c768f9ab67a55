//! `bench boot`: from nothing to an API, to a guest's first instruction, and to its first process.
//!
//! Two tables, each on the host that says most: the null guest where `/dev/kvm` opens at all (a software KVM runs it
//! at native speed), Linux where unmodified kernels run.

use std::path::PathBuf;
use std::process::ExitCode;

use anyhow::Result;
use lexopt::prelude::*;
use serde::{Deserialize, Serialize};
use vesta_tests::elf::null_guest;
use vesta_tests::guest::{BOOT_ARGS, Guest};
use vesta_tests::initramfs::Initramfs;

use super::measure::{INIT, Life, Sign, life};
use super::table::{Row, markdown};
use super::{Monitor, MonitorKind, check_runs, describe, files, kind_for_null_guests, on_host, peer, today};
use crate::host::emulated::Emulated;
use crate::host::{self, Outcome};
use crate::process::say;
use crate::test::build_vmm;
use crate::{apt, kernels};

/// What runs on a host.
#[derive(Debug, Serialize, Deserialize)]
struct Orders {
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

/// `cargo xtask bench boot [--peer NAME=PATH]... [--runs N]`.
pub(super) fn command(parser: &mut lexopt::Parser) -> Result<ExitCode> {
    let (mut peers, mut runs) = (Vec::new(), FEWEST_RUNS);
    while let Some(arg) = parser.next()? {
        match arg {
            Long("peer") => peers.push(peer(parser.value()?)?),
            Long("runs") => runs = parser.value()?.parse()?,
            _ => return Err(arg.unexpected().into()),
        }
    }
    check_runs(runs, FEWEST_RUNS)?;
    say!("building vesta-vmm");
    let vmm = build_vmm(true)?;
    let mut monitors = vec![Monitor::api("vesta", vmm)];
    monitors.extend(peers);
    let dir = files()?;

    let (kind, why) = host::choose()?;
    let null_kind = kind_for_null_guests(kind);
    let kernel = dir.join("null-guest");
    std::fs::write(&kernel, null_guest().bytes())?;
    println!(
        "## A null guest (one instruction, then it halts; 128 MiB, 1 vCPU), on {}\n",
        describe(null_kind, &why)
    );
    let orders = Orders { monitors: monitors.clone(), runs, guest: GuestFiles::Null { kernel } };
    let null = on_host(null_kind, "bench-inner", &orders, &Emulated::default())?;

    let (kernel, name) = match kernels::tuned()? {
        Some(kernel) => (kernel, "the tuned 6.12 kernel"),
        None => (kernels::debian(kernels::DEBIAN_6_12)?, "Debian's 6.12 cloud kernel"),
    };
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
    }));
    println!("\n## Linux ({name}, initramfs with busybox; 128 MiB, 1 vCPU), on {}\n", describe(kind, &why));
    let orders = Orders { monitors, runs, guest: GuestFiles::Linux { kernel: kernel.image, initrd } };
    let linux = on_host(kind, "bench-inner", &orders, &Emulated::default())?;
    println!(
        "\n`cargo xtask bench boot`, {}: medians over {runs} interleaved runs, in brackets the least and",
        today()?
    );
    println!(
        "the most. Resident memory: the sum of Rss in /proc/PID/smaps, without mappings as large as the guest's"
    );
    println!("memory, at the guest's sign of life.");
    let good = [null, linux].iter().all(|outcome| *outcome == Outcome::Exited(0));
    Ok(if good { ExitCode::SUCCESS } else { ExitCode::FAILURE })
}

/// `bench-inner ORDERS`: runs on the host, and prints the table.
pub(crate) fn inner(parser: &mut lexopt::Parser) -> Result<ExitCode> {
    let orders: Orders = super::orders(parser)?;
    let (guest, sign) = match &orders.guest {
        GuestFiles::Null { kernel } => (Guest::bare(kernel), Sign::FirstInstruction),
        GuestFiles::Linux { kernel, initrd } => {
            let mut guest = Guest::bare(kernel).boot_args(BOOT_ARGS);
            guest.initrd = Some(initrd.clone());
            (guest, Sign::Init)
        }
    };
    let mut lives: Vec<Vec<Life>> = vec![Vec::new(); orders.monitors.len()];
    // One life first that does not count: it brings files into the page cache.
    for run in 0..=orders.runs {
        for (monitor, lives) in orders.monitors.iter().zip(&mut lives) {
            let life = life(monitor, &guest, sign)?;
            if run > 0 {
                lives.push(life);
            }
        }
    }
    print!("{}", table(&orders.monitors, &lives, sign));
    Ok(ExitCode::SUCCESS)
}

fn table(monitors: &[Monitor], lives: &[Vec<Life>], sign: Sign) -> String {
    type Column = (&'static str, fn(&Life) -> Option<f64>);
    let columns: [Column; 5] = match sign {
        Sign::FirstInstruction => [
            ("spawn to API, ms", |life| life.api_ms),
            ("InstanceStart call, ms", |life| life.start_call_ms),
            ("InstanceStart to first instruction, ms", |life| life.start_to_sign_ms),
            ("spawn to first instruction, ms", |life| life.spawn_to_sign_ms),
            ("resident above the guest's, KiB", |life| life.resident_kib),
        ],
        Sign::Init => [
            ("spawn to API, ms", |life| life.api_ms),
            ("InstanceStart call, ms", |life| life.start_call_ms),
            ("InstanceStart to init, ms", |life| life.start_to_sign_ms),
            ("spawn to init, ms", |life| life.spawn_to_sign_ms),
            ("resident above the guest's, KiB", |life| life.resident_kib),
        ],
    };
    let rows: Vec<Row> = monitors
        .iter()
        .zip(lives)
        .map(|(monitor, lives)| Row {
            name: monitor.name.clone(),
            samples: columns.iter().map(|(_, value)| lives.iter().filter_map(value).collect()).collect(),
        })
        .collect();
    markdown(&columns.map(|(title, _)| title), &rows)
}
