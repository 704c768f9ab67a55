//! `bench vsock`: latency and throughput between host programs and a program in the guest.
//!
//! A round trip is compared with the sum of its parts: a round trip over a pair of Unix sockets,
//! and one wake-up of the guest. The wake-up is measured as a read of one sector of a cached disk:
//! a kick, an interrupt and a process that wakes.

use std::io::{Read, Write};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::time::{Duration, Instant};

use anyhow::{Context, Result};
use lexopt::prelude::*;
use serde::{Deserialize, Serialize};
use serde_json::json;
use vesta_tests::vmm::{Vmm, VmmBuilder};
use vesta_tests::vsock::{connect, port};

use super::common::{check_runs, describe, files, on_host, today};
use super::cpu_time::cpu_ns;
use super::monitor::Monitor;
use super::peers::{Peers, lacking, not_measured};
use super::serving_guest::{SERVING, ServingGuest};
use super::table::{Row, markdown, median};
use crate::host::emulated::Emulated;
use crate::host::{self, Kind, Outcome};
use crate::process::say;

/// Longest wait for a guest.
const TIMEOUT: Duration = Duration::from_mins(2);

/// What to measure on the host.
#[derive(Debug, Serialize, Deserialize)]
struct RunSpec {
    monitors: Vec<Monitor>,
    /// Whether vesta is also measured with its devices on PCI.
    pci: bool,
    runs: usize,
    guest: ServingGuest,
    disk: PathBuf,
    /// Round trips, and bytes each way, of one run.
    trips: u32,
    bytes: u64,
}

/// Fewest runs that a median is taken over.
const FEWEST_RUNS: usize = 5;

/// `cargo xtask bench vsock [--peer NAME=PATH]... [--runs N] [--pci]`.
pub(super) fn command(parser: &mut lexopt::Parser) -> Result<ExitCode> {
    let (mut peers, mut runs, mut pci) = (Peers::default(), 11, false);
    while let Some(arg) = parser.next()? {
        match arg {
            Long("peer") => peers.add(parser.value()?),
            Long("no-peers") => peers.only_named(),
            Long("runs") => runs = parser.value()?.parse()?,
            Long("pci") => pci = true,
            _ => return Err(arg.unexpected().into()),
        }
    }
    check_runs(runs, FEWEST_RUNS)?;
    say!("building vesta-vmm and the guest's program");
    let monitors = peers.with_vesta()?;
    let lacking = if pci { lacking(&monitors, "virtio-pci") } else { String::new() };
    let (kind, why) = host::choose()?;
    let (trips, bytes) = match kind {
        Kind::Native => (10_000, 1 << 30),
        Kind::Emulated => (200, 8 << 20),
    };
    let dir = files()?;
    let script = format!("guest-vsock wake /dev/vda {trips}\nguest-vsock serve");
    let guest = ServingGuest::make(&dir, &script)?;
    let disk = dir.join("vsock-disk");
    std::fs::File::create(&disk)?.set_len(1 << 20)?;
    println!("\n## vsock ({}; 256 MiB, 1 vCPU), on {}\n", guest.kernel_name, describe(kind, &why));
    let spec = RunSpec { monitors, pci, runs, guest, disk, trips, bytes };
    let emulated = Emulated { timeout: Duration::from_mins(20), ..Emulated::default() };
    let outcome = on_host(kind, "bench-vsock-inner", &spec, &emulated)?;
    print!("{lacking}");
    println!(
        "\n`cargo xtask bench vsock`, {}: medians over {runs} interleaved runs, in brackets the least and\n\
         the most; each run has {trips} round trips of one byte and {} MiB each way. Wake-up: a read of\n\
         one sector of a cached disk, in the guest. Ratio: a round trip to the guest over the sum of one\n\
         over a pair of Unix sockets and one wake-up. CPU: of the monitor's threads other than vCPUs.",
        today()?,
        bytes >> 20
    );
    Ok(if outcome == Outcome::Exited(0) { ExitCode::SUCCESS } else { ExitCode::FAILURE })
}

/// The figures of one run.
#[derive(Debug, Clone, Copy)]
struct Sample {
    round_trip_us: f64,
    wake_us: Option<f64>,
    to_guest: Throughput,
    /// `None` where a peer delivered other bytes than were sent.
    to_host: Option<Throughput>,
}

/// Throughput in one direction.
#[derive(Debug, Clone, Copy)]
struct Throughput {
    mb_per_s: f64,
    /// Processor seconds for each gigabyte; `None` without a monitor.
    cpu_s_per_gb: Option<f64>,
}

/// `bench-vsock-inner SPEC`: runs on the host, and prints the table.
pub(crate) fn inner(parser: &mut lexopt::Parser) -> Result<ExitCode> {
    let spec: RunSpec = super::common::spec(parser)?;
    let mut pair = Vec::new();
    let buses = [false, true].into_iter().filter(|pci| spec.pci || !pci);
    let mut contestants: Vec<(&Monitor, bool)> = buses
        .flat_map(|pci| spec.monitors.iter().map(move |monitor| (monitor, pci)))
        .filter(|(monitor, pci)| !pci || monitor.is_vesta())
        .collect();
    let mut samples: Vec<Vec<Sample>> = vec![Vec::new(); contestants.len()];
    let mut left_out = String::new();
    // The first run is not counted. It shows which peers cannot be measured.
    for run in 0..=spec.runs {
        let alone = socket_pair(&spec)?;
        if run > 0 {
            pair.push(alone);
        }
        let mut at = 0;
        while let Some(&(monitor, pci)) = contestants.get(at) {
            match guest(monitor, pci, &spec) {
                Ok(sample) if run > 0 => samples[at].push(sample),
                Ok(_) => {}
                Err(error) if monitor.peer => {
                    say!("{} is not measured: {error:#}", monitor.name);
                    left_out += &not_measured(&monitor.name, &format!("{error:#}"));
                    contestants.remove(at);
                    samples.remove(at);
                    continue;
                }
                Err(error) => return Err(error).with_context(|| monitor.name.clone()),
            }
            at += 1;
        }
    }
    for ((monitor, _), samples) in contestants.iter().zip(&samples) {
        let wrong = samples.iter().filter(|sample| sample.to_host.is_none()).count();
        if wrong > 0 {
            let why = format!(
                "from guest to host, in {wrong} of {} runs: other bytes arrived than were sent",
                spec.runs
            );
            left_out += &not_measured(&monitor.name, &why);
        }
    }
    print!("{}{left_out}", table(&contestants, &pair, &samples));
    Ok(ExitCode::SUCCESS)
}

/// Measures two threads with a pair of sockets between them.
fn socket_pair(spec: &RunSpec) -> Result<Sample> {
    let (near, far) = UnixStream::pair()?;
    let echo = std::thread::spawn(move || echo(far));
    let round_trip_us = round_trips(&near, spec.trips)?;
    drop(near);
    echo.join().expect("it does not panic")?;
    let (mut near, far) = UnixStream::pair()?;
    let sink = std::thread::spawn(move || sink(far));
    let begun = Instant::now();
    send(&mut near, spec.bytes)?;
    drop(near);
    sink.join().expect("it does not panic")?;
    let both = Throughput { mb_per_s: rate(spec.bytes, begun), cpu_s_per_gb: None };
    Ok(Sample { round_trip_us, wake_us: None, to_guest: both, to_host: Some(both) })
}

/// Measures a guest that serves.
fn guest(monitor: &Monitor, pci: bool, spec: &RunSpec) -> Result<Sample> {
    let builder = VmmBuilder::new(&monitor.path)?.quiet().with_api();
    let vmm = if pci { builder.arg("--enable-pci") } else { builder }.spawn()?;
    let mut api = vmm.ready_client(TIMEOUT)?;
    let guest = spec.guest.guest().mem_mib(256);
    guest.put(&mut api)?;
    let drive =
        json!({"drive_id": "d", "path_on_host": spec.disk, "is_root_device": false, "is_read_only": true});
    api.put("/drives/d", &drive)?.ok()?;
    api.put("/vsock", &json!({"guest_cid": 3, "uds_path": "v.sock"}))?.ok()?;
    api.put("/actions", &json!({"action_type": "InstanceStart"}))?.ok()?;
    let wake = vmm.wait_for_output("WAKE ", TIMEOUT)?;
    let wake = wake.split("WAKE ").nth(1).context("the guest printed no wake-up time")?;
    vmm.wait_for_output(SERVING, TIMEOUT)?;
    let path = vmm.dir().join("v.sock");
    let carried = |sent: Result<Throughput>| match sent {
        Err(error) if monitor.peer => {
            say!("{} is not measured to the host: {error:#}", monitor.name);
            Ok(None)
        }
        sent => sent.map(Some),
    };
    Ok(Sample {
        round_trip_us: round_trips(&connect(&path, port::ECHO)?, spec.trips).context("round trips")?,
        wake_us: Some(wake.trim().parse::<f64>()? / 1e3),
        to_guest: throughput(&vmm, spec.bytes, || to_guest(&path, spec.bytes)).context("to the guest")?,
        to_host: carried(throughput(&vmm, spec.bytes, || to_host(&path, spec.bytes)))?,
    })
}

/// The throughput of `send`, which sends so many bytes through this monitor and returns MB per
/// second.
fn throughput(vmm: &Vmm, bytes: u64, send: impl FnOnce() -> Result<f64>) -> Result<Throughput> {
    let before = cpu_ns(vmm.pid())?;
    let mb_per_s = send()?;
    let used = cpu_ns(vmm.pid())?.saturating_sub(before);
    // Nanoseconds per byte are seconds per gigabyte.
    #[expect(clippy::cast_precision_loss, reason = "neither is precise to the last digit")]
    let cpu = used as f64 / bytes as f64;
    Ok(Throughput { mb_per_s, cpu_s_per_gb: Some(cpu) })
}

/// The median of so many round trips of one byte, in microseconds.
fn round_trips(mut stream: &UnixStream, count: u32) -> Result<f64> {
    let mut byte = [7];
    let mut times = Vec::new();
    for _ in 0..count {
        let begun = Instant::now();
        stream.write_all(&byte)?;
        stream.read_exact(&mut byte)?;
        times.push(begun.elapsed().as_secs_f64() * 1e6);
    }
    median(&times).context("there was no round trip")
}

fn to_guest(path: &Path, bytes: u64) -> Result<f64> {
    // The length goes first instead of an end of the stream: not every device half-closes.
    let mut stream = connect(path, port::COUNTED)?;
    let begun = Instant::now();
    stream.write_all(&bytes.to_le_bytes())?;
    send(&mut stream, bytes)?;
    let mut count = [0; 8];
    stream.read_exact(&mut count)?;
    anyhow::ensure!(u64::from_le_bytes(count) == bytes, "the guest got {} bytes", u64::from_le_bytes(count));
    Ok(rate(bytes, begun))
}

fn to_host(path: &Path, bytes: u64) -> Result<f64> {
    let mut stream = connect(path, port::SOURCE)?;
    let begun = Instant::now();
    stream.write_all(&bytes.to_le_bytes())?;
    let count = sink(stream)?;
    anyhow::ensure!(count == bytes, "the guest sent {bytes} bytes, and {count} arrived");
    Ok(rate(bytes, begun))
}

fn send(to: &mut UnixStream, bytes: u64) -> std::io::Result<()> {
    let piece = vec![7; 64 << 10];
    let mut left = bytes;
    while left > 0 {
        let len = left.min(piece.len() as u64);
        to.write_all(&piece[..usize::try_from(len).unwrap_or(piece.len())])?;
        left -= len;
    }
    Ok(())
}

fn sink(mut from: UnixStream) -> std::io::Result<u64> {
    let mut piece = vec![0; 256 << 10];
    let mut count = 0;
    loop {
        match from.read(&mut piece)? {
            0 => return Ok(count),
            len => count += len as u64,
        }
    }
}

fn echo(mut stream: UnixStream) -> std::io::Result<()> {
    let mut byte = [0];
    while stream.read(&mut byte)? > 0 {
        stream.write_all(&byte)?;
    }
    Ok(())
}

/// MB per second.
fn rate(bytes: u64, begun: Instant) -> f64 {
    #[expect(clippy::cast_precision_loss, reason = "the time is precise to a few digits")]
    let megabytes = bytes as f64 / 1e6;
    megabytes / begun.elapsed().as_secs_f64()
}

fn table(contestants: &[(&Monitor, bool)], pair: &[Sample], samples: &[Vec<Sample>]) -> String {
    let columns = [
        "round trip, µs",
        "wake-up, µs",
        "ratio",
        "host to guest, MB/s",
        "CPU s/GB",
        "guest to host, MB/s",
        "CPU s/GB",
    ];
    let column = |samples: &[Sample], value: fn(&Sample) -> Option<f64>| -> Vec<f64> {
        samples.iter().filter_map(value).collect()
    };
    let row = |name: &str, samples: &[Sample]| {
        let ratio = samples
            .iter()
            .zip(pair)
            .filter_map(|(sample, pair)| Some(sample.round_trip_us / (pair.round_trip_us + sample.wake_us?)));
        Row {
            name: name.to_owned(),
            samples: vec![
                column(samples, |sample| Some(sample.round_trip_us)),
                column(samples, |sample| sample.wake_us),
                ratio.collect(),
                column(samples, |sample| Some(sample.to_guest.mb_per_s)),
                column(samples, |sample| sample.to_guest.cpu_s_per_gb),
                column(samples, |sample| Some(sample.to_host?.mb_per_s)),
                column(samples, |sample| sample.to_host?.cpu_s_per_gb),
            ],
        }
    };
    let mut rows = vec![row("a pair of Unix sockets", pair)];
    rows.extend(contestants.iter().zip(samples).map(|((monitor, pci), samples)| {
        row(&format!("{}{}", monitor.name, if *pci { ", PCI" } else { "" }), samples)
    }));
    markdown(&columns, &rows)
}
