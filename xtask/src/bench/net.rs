//! `bench net`: speed and host CPU cost of a guest's network, beside the host's own loopback.
//!
//! Every contestant boots the same guest on the same tap. The guest runs a server
//! ([`vesta_tests::net_load`]), and the same clients on the host load it. It is a small static
//! program and not `iperf3`: it starts at once on an emulated host, and measures latency and small
//! packets too.

use std::net::IpAddr;
use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};
use lexopt::prelude::*;
use serde::{Deserialize, Serialize};
use serde_json::json;
use vesta_tests::guest::{BOOT_ARGS, Guest, start};
use vesta_tests::host_net::HostNet;
use vesta_tests::initramfs::Initramfs;
use vesta_tests::net_load::Server;
use vesta_tests::vmm::{Vmm, VmmBuilder};

use super::common::{check_runs, check_seconds, describe, on_host, only_named, today};
use super::cpu_time::cpu_ns;
use super::monitor::Monitor;
use super::peers::{Peers, lacking};
use super::qemu;
use super::rounds::{Entry, interleaved};
use crate::host::emulated::Emulated;
use crate::host::{self, Kind};
use crate::process::say;
use crate::test::build_net_tool;
use crate::{apt, kernels};

/// Fewest rounds that a median is taken over.
const FEWEST_RUNS: usize = 5;
/// Longest time for all measurements.
const HOST_TIMEOUT: Duration = Duration::from_hours(1);
/// Longest wait for a guest.
const TIMEOUT: Duration = Duration::from_mins(1);

const HOST: &str = "10.99.0.1";
const GUEST: &str = "10.99.0.2";

/// One row of the table: a monitor with one configuration of its network.
#[derive(Debug, Clone, Serialize, Deserialize)]
struct Contestant {
    name: String,
    path: PathBuf,
    mode: Mode,
    /// Whether a failure leaves it out instead of ending the benchmark.
    peer: bool,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
enum Mode {
    /// The server on the host, without a guest.
    Loopback,
    /// A monitor with Firecracker's API.
    Api { vhost: bool, pci: bool },
    /// QEMU's `microvm`.
    Qemu { vhost: bool },
}

/// What to measure on the host.
#[derive(Debug, Serialize, Deserialize)]
struct RunSpec {
    contestants: Vec<Contestant>,
    runs: usize,
    seconds: f64,
    kernel: PathBuf,
    busybox: PathBuf,
    tool: PathBuf,
}

/// The titles of the columns, with their units.
const COLUMNS: [&str; 11] = [
    "guest to host, Gb/s",
    "10 streams",
    "CPU s/GB",
    "host to guest, Gb/s",
    "10 streams",
    "CPU s/GB",
    "round trip, us",
    "small packets guest to host, 1000/s",
    "host to guest",
    "no offloads: guest to host, Gb/s",
    "host to guest",
];

/// `cargo xtask bench net`.
pub(super) fn command(parser: &mut lexopt::Parser) -> Result<ExitCode> {
    let (mut peers, mut runs, mut seconds, mut pci, mut only) = (Peers::default(), 5, 1.0, false, Vec::new());
    while let Some(arg) = parser.next()? {
        match arg {
            Long("peer") => peers.add(parser.value()?),
            Long("no-peers") => peers.only_named(),
            Long("runs") => runs = parser.value()?.parse()?,
            Long("seconds") => seconds = parser.value()?.parse()?,
            Long("pci") => pci = true,
            Long("only") => only.push(parser.value()?.string()?),
            _ => return Err(arg.unexpected().into()),
        }
    }
    check_runs(runs, FEWEST_RUNS)?;
    check_seconds(seconds)?;
    let Some(kernel) = kernels::tuned()? else {
        bail!("bench net needs the tuned kernel: cargo xtask kernel")
    };
    apt::ensure(&[("ip", "iproute2"), ("ethtool", "ethtool")])?;
    say!("building vesta-vmm and net-tool");
    let tool = build_net_tool()?;
    let monitors = peers.with_vesta()?;
    let contestants = only_named(contestants(&tool, &monitors, pci), &only, |contestant| &contestant.name)?;
    let (kind, why) = host::choose()?;
    println!(
        "## Networks, as the tuned 6.12 kernel with one vCPU and 256 MiB sees them, on {}\n",
        describe(kind, &why)
    );
    let busybox = kernels::busybox()?;
    let spec = RunSpec { contestants, runs, seconds, kernel: kernel.image, busybox, tool };
    let mut emulated = Emulated { timeout: HOST_TIMEOUT, pin: host::default_pin()?, ..Emulated::default() };
    if kind == Kind::Emulated {
        emulated.modules = vec!["vhost_net".to_owned()];
    }
    let outcome = on_host(kind, "bench-net-inner", &spec, &emulated)?;
    print!("{}", lacking(&monitors, if pci { "vhost and no virtio-pci" } else { "vhost" }));
    println!(
        "\n`cargo xtask bench net`, {}: medians over {runs} interleaved rounds of {seconds} s for each\n\
         column, in brackets the least and the most. TCP over a tap at MTU 1500; small packets are UDP\n\
         with 64 bytes. CPU: what the monitor's threads other than vCPUs used (vhost's included), from\n\
         schedstat, with one stream.",
        today()?
    );
    Ok(outcome.report())
}

fn contestants(tool: &Path, monitors: &[Monitor], pci: bool) -> Vec<Contestant> {
    let one = |name: String, path: &Path, mode, peer| Contestant { name, path: path.to_owned(), mode, peer };
    let mut all = vec![one("loopback, no guest".into(), tool, Mode::Loopback, false)];
    for Monitor { name, path, peer, .. } in monitors.iter().filter(|monitor| monitor.is_vesta()) {
        for pci in [false, true].into_iter().filter(|&with| pci || !with) {
            let bus = if pci { ", PCI" } else { "" };
            all.push(one(format!("{name}{bus}"), path, Mode::Api { vhost: false, pci }, *peer));
            all.push(one(format!("{name}, vhost{bus}"), path, Mode::Api { vhost: true, pci }, *peer));
        }
    }
    for monitor in monitors.iter().filter(|monitor| !monitor.is_vesta()) {
        all.push(one(monitor.name.clone(), &monitor.path, Mode::Api { vhost: false, pci: false }, true));
    }
    if let Some(qemu) = apt::find("qemu-system-x86_64") {
        all.push(one("QEMU microvm".into(), &qemu, Mode::Qemu { vhost: false }, true));
        all.push(one("QEMU microvm, vhost".into(), &qemu, Mode::Qemu { vhost: true }, true));
    }
    all
}

/// `bench-net-inner SPEC`: runs on the host, and prints the table.
pub(crate) fn inner(parser: &mut lexopt::Parser) -> Result<ExitCode> {
    let spec: RunSpec = super::common::spec(parser)?;
    let net = HostNet::new()?;
    net.tap("tap0", &format!("{HOST}/24"), "")?;
    let time = Duration::try_from_secs_f64(spec.seconds)?;
    let entries = spec.contestants.iter().map(|contestant| Entry {
        name: contestant.name.clone(),
        may_fail: contestant.peer,
        contestant,
    });
    let measured = interleaved(entries.collect(), spec.runs, true, |contestant| {
        // The guest before had another MAC address.
        net.ip("neighbour flush dev tap0")?;
        let values = measure(&spec, contestant, time)?;
        Ok(values.map(|value| value.into_iter().collect()).into())
    })?;
    print!("{}", measured.markdown(&COLUMNS));
    Ok(ExitCode::SUCCESS)
}

/// Measures one contestant: a value for each column that it has.
fn measure(spec: &RunSpec, contestant: &Contestant, time: Duration) -> Result<[Option<f64>; 11]> {
    let vmm = boot(spec, contestant)?;
    vmm.wait_for_output("SERVING", TIMEOUT)?;
    let loopback = contestant.mode == Mode::Loopback;
    let address: IpAddr = if loopback { HOST } else { GUEST }.parse()?;
    let server = Server(address);
    // Warm-up: addresses are resolved, TCP windows grow.
    let begun = Instant::now();
    while let Err(error) = server.throughput(true, 1, time / 4) {
        if begun.elapsed() > TIMEOUT {
            return Err(error).context("the guest's server");
        }
    }
    server.throughput(false, 1, time / 4)?;
    let one = |to_guest: bool| -> Result<(f64, Option<f64>)> {
        let before = cpu_ns(vmm.pid())?;
        let (rate, bytes) = server.throughput(to_guest, 1, time)?;
        let used = cpu_ns(vmm.pid())?.saturating_sub(before);
        // Nanoseconds per byte are seconds per gigabyte.
        #[expect(clippy::cast_precision_loss, reason = "neither is precise to the last digit")]
        let cpu = used as f64 / bytes as f64;
        Ok((rate * 8e-9, (!loopback).then_some(cpu)))
    };
    let (from_guest, from_cpu) = one(false)?;
    let (to_guest, to_cpu) = one(true)?;
    let gigabits = |(rate, _): (f64, u64)| rate * 8e-9;
    let from_ten = gigabits(server.throughput(false, 10, time)?);
    let to_ten = gigabits(server.throughput(true, 10, time)?);
    let round_trip = server.round_trip(time)?;
    let packets_from = server.packets_from(time)? / 1000.0;
    let packets_to = server.packets_to(time)? / 1000.0;
    let (mut plain_from, mut plain_to) = (None, None);
    if !loopback {
        server.without_offloads()?;
        plain_from = Some(gigabits(server.throughput(false, 1, time)?));
        plain_to = Some(gigabits(server.throughput(true, 1, time)?));
    }
    Ok([
        Some(from_guest),
        Some(from_ten),
        from_cpu,
        Some(to_guest),
        Some(to_ten),
        to_cpu,
        Some(round_trip),
        Some(packets_from),
        Some(packets_to),
        plain_from,
        plain_to,
    ])
}

fn boot(spec: &RunSpec, contestant: &Contestant) -> Result<Vmm> {
    let builder = VmmBuilder::new(&contestant.path)?.quiet();
    if contestant.mode == Mode::Loopback {
        return builder.arg("load").spawn();
    }
    let mut disk = Initramfs::new(&spec.busybox)?;
    disk.file("sbin/net-tool", 0o755, &std::fs::read(&spec.tool)?);
    disk.program("ethtool")?;
    let script = format!(
        "ip link set lo up; ip address add {GUEST}/24 dev eth0; ip link set eth0 up\nnet-tool load\nsleep 1000"
    );
    let initrd = builder.dir().join("initramfs");
    std::fs::write(&initrd, disk.finish(&script))?;
    let mut guest = Guest::bare(&spec.kernel).boot_args(BOOT_ARGS).mem_mib(256);
    guest.initrd = Some(initrd);
    match contestant.mode {
        Mode::Api { vhost, pci } => {
            let builder = if pci { builder.arg("--enable-pci") } else { builder };
            let vmm = builder.with_api().spawn()?;
            let mut api = vmm.ready_client(TIMEOUT)?;
            guest.put(&mut api)?;
            let mut body = json!({"iface_id": "eth0", "host_dev_name": "tap0"});
            if vhost {
                body["backend"] = json!("vhost");
            }
            api.put("/network-interfaces/eth0", &body)?.ok()?;
            start(&mut api)?;
            Ok(vmm)
        }
        Mode::Qemu { vhost } => {
            let vhost = if vhost { "on" } else { "off" };
            let tap = format!("tap,id=n0,ifname=tap0,script=no,downscript=no,vhost={vhost}");
            let builder = qemu::microvm(builder, &guest).arg("-netdev").arg(tap);
            builder.arg("-device").arg("virtio-net-device,netdev=n0").spawn()
        }
        Mode::Loopback => bail!("{} has no guest", contestant.name),
    }
}
