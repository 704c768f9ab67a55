//! `bench api`: the API of a monitor with a null guest, over its Unix socket.
//!
//! - The rate and latency of `GET /` on one connection, one request after another: alone, and
//!   beside nine clients that are silent or stopped halfway through a request.
//! - Configuring and starting a microVM with eight devices: ten calls and `InstanceStart` beside a
//!   configuration file with the same content.

use std::io::{Read, Write};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use serde::{Deserialize, Serialize};
use serde_json::{Value, json};
use vesta_tests::api::ApiClient;
use vesta_tests::elf::null_guest_of_any_monitor;
use vesta_tests::vmm::{Vmm, VmmBuilder};

use super::common::{check_runs, describe, files, kind_for_null_guests, on_host, today};
use super::measure::BOOT_TIMER;
use super::monitor::Monitor;
use super::peers::peers_and_runs;
use super::rounds::{Entry, Values, interleaved};
use super::table::median;
use crate::host::emulated::Emulated;
use crate::host::{self, Outcome};
use crate::process::say;

/// Longest wait for anything.
const TIMEOUT: Duration = Duration::from_mins(1);
/// Fewest runs that a median is taken over.
const FEWEST_RUNS: usize = 5;
/// Requests of one measurement, and those before it that are not counted.
const REQUESTS: usize = 5000;
const WARM_UP: usize = 500;
/// The question, as curl asks it.
const QUESTION: &[u8] = b"GET / HTTP/1.1\r\nHost: localhost\r\nAccept: */*\r\n\r\n";
/// What each of the other clients has sent, three of each kind: nothing, half a head, half a body.
const UNFINISHED: [&[u8]; 3] =
    [b"", b"GET / HTT", b"PUT /boot-source HTTP/1.1\r\nContent-Length: 100\r\n\r\n{\"kernel"];
/// Drives of the microVM. An entropy device and a vsock device make eight.
const DRIVES: usize = 6;

/// What to measure on the host.
#[derive(Debug, Serialize, Deserialize)]
struct RunSpec {
    monitors: Vec<Monitor>,
    runs: usize,
    kernel: PathBuf,
}

/// `cargo xtask bench api [--runs N] [PEERS]`.
pub(super) fn command(parser: &mut lexopt::Parser) -> Result<ExitCode> {
    let (peers, runs) = peers_and_runs(parser, 11)?;
    check_runs(runs, FEWEST_RUNS)?;
    say!("building vesta-vmm");
    let monitors = peers.with_vesta()?;
    let kernel = files()?.join("null-guest");
    std::fs::write(&kernel, null_guest_of_any_monitor().bytes())?;
    let (kind, why) = host::choose()?;
    let kind = kind_for_null_guests(kind);
    println!("# The API, on {}\n", describe(kind, &why));
    let spec = RunSpec { monitors, runs, kernel };
    let outcome = on_host(kind, "bench-api-inner", &spec, &Emulated::default())?;
    println!(
        "\n`cargo xtask bench api`, {}: medians over {runs} interleaved runs, in brackets the least\n\
         and the most. {REQUESTS} requests on one connection in each run.",
        today()?
    );
    Ok(if outcome == Outcome::Exited(0) { ExitCode::SUCCESS } else { ExitCode::FAILURE })
}

/// `bench-api-inner SPEC`: runs on the host, and prints the tables.
pub(crate) fn inner(parser: &mut lexopt::Parser) -> Result<ExitCode> {
    let spec: RunSpec = super::common::spec(parser)?;
    let questions = ["requests per second", "median, us", "99 % within, us"];
    let alone = interleaved(entries(&spec), spec.runs, true, |monitor| question(&monitor.path, 0))?;
    println!("## `GET /`, one connection\n\n{}", alone.markdown(&questions));
    let among = interleaved(entries(&spec), spec.runs, true, |monitor| question(&monitor.path, 3))?;
    println!("## `GET /`, beside nine silent or unfinished clients\n\n{}", among.markdown(&questions));
    let starts =
        interleaved(entries(&spec), spec.runs, true, |monitor| start_both_ways(&monitor.path, &spec.kernel))?;
    let columns = [
        "API answers, ms",
        "10 calls, ms",
        "InstanceStart, ms",
        "spawn to first instruction, ms",
        "the same with a configuration file, ms",
        "ratio",
    ];
    print!("## A microVM with 8 devices: calls and configuration file\n\n{}", starts.markdown(&columns));
    Ok(ExitCode::SUCCESS)
}

fn entries(spec: &RunSpec) -> Vec<Entry<&Monitor>> {
    fn entry(monitor: &Monitor) -> Entry<&Monitor> {
        Entry { name: monitor.name.clone(), may_fail: monitor.peer, contestant: monitor }
    }
    spec.monitors.iter().map(entry).collect()
}

/// Rate, median and 99th percentile of `GET /` on one connection, beside `clients` of each kind in
/// [`UNFINISHED`].
fn question(program: &Path, clients: usize) -> Result<Values> {
    let vmm = VmmBuilder::new(program)?.quiet().with_api().spawn()?;
    let mut api = vmm.client();
    api.wait_ready(TIMEOUT)?;
    // Its connection would be one of the ten.
    api.typed().disconnect();
    let mut others = Vec::new();
    for sent in UNFINISHED.iter().cycle().take(clients * UNFINISHED.len()) {
        let mut other = api.connect()?;
        other.write_all(sent)?;
        others.push(other);
    }
    let mut connection = api.connect()?;
    for _ in 0..WARM_UP {
        ask(&mut connection)?;
    }
    let mut times = Vec::with_capacity(REQUESTS);
    let begin = Instant::now();
    for _ in 0..REQUESTS {
        let asked = Instant::now();
        ask(&mut connection)?;
        times.push(asked.elapsed().as_secs_f64() * 1e6);
    }
    let total = begin.elapsed().as_secs_f64();
    drop(others);
    times.sort_by(f64::total_cmp);
    let (median, last) = (median(&times), times[REQUESTS * 99 / 100]);
    let rate = f64::from(u32::try_from(REQUESTS)?) / total;
    Ok(vec![vec![rate], vec![median.context("there are times")?], vec![last]])
}

/// Asks once. Only the client's two system calls are part of it.
fn ask(connection: &mut UnixStream) -> Result<()> {
    connection.write_all(QUESTION)?;
    let mut buffer = [0; 1024];
    let mut len = 0;
    // The body is one object.
    while !buffer[..len].ends_with(b"}") {
        let read = connection.read(&mut buffer[len..])?;
        ensure!(read > 0, "the answer is cut: {}", String::from_utf8_lossy(&buffer[..len]));
        len += read;
    }
    ensure!(buffer.starts_with(b"HTTP/1.1 200 "), "{}", String::from_utf8_lossy(&buffer[..len]));
    Ok(())
}

/// Times of a start by calls and of one by a configuration file.
fn start_both_ways(program: &Path, kernel: &Path) -> Result<Values> {
    let vmm = VmmBuilder::new(program)?.quiet().with_api().arg("--boot-timer");
    let devices = Devices::new(vmm.dir(), kernel)?;
    let vmm = vmm.spawn()?;
    let mut api = vmm.client();
    api.wait_ready(TIMEOUT)?;
    let answered = Instant::now();
    let calls = devices.calls();
    ensure!(calls.len() == 10, "there are {} calls", calls.len());
    for (path, body) in &calls {
        put(&mut api, path, body)?;
    }
    let configured = Instant::now();
    put(&mut api, "/actions", &json!({"action_type": "InstanceStart"}))?;
    let started = Instant::now();
    let by_calls = until_first_instruction(&vmm)?;
    let times = [answered - vmm.started(), configured - answered, started - configured, by_calls];
    drop(vmm);

    let vmm = VmmBuilder::new(program)?.quiet().with_api().arg("--boot-timer");
    let config = Devices::new(vmm.dir(), kernel)?.file();
    let vmm = vmm.with_config(&config)?.spawn()?;
    let by_file = until_first_instruction(&vmm)?;
    let ratio = by_calls.as_secs_f64() / by_file.as_secs_f64();
    let mut values: Values =
        times.iter().chain([&by_file]).map(|time| vec![time.as_secs_f64() * 1e3]).collect();
    values.push(vec![ratio]);
    Ok(values)
}

fn put(api: &mut ApiClient, path: &str, body: &Value) -> Result<()> {
    api.put(path, body)?.ok().with_context(|| format!("PUT {path}")).map(drop)
}

/// Time from the process's start until the guest writes to the boot timer.
fn until_first_instruction(vmm: &Vmm) -> Result<Duration> {
    Ok(vmm.wait_for_line(BOOT_TIMER, TIMEOUT)?.at - vmm.started())
}

/// The configuration of a microVM with eight devices, with their files.
struct Devices {
    boot_source: Value,
    drives: Vec<Value>,
    vsock: Value,
}

impl Devices {
    fn new(dir: &Path, kernel: &Path) -> Result<Devices> {
        let drives = (0..DRIVES).map(|number| {
            let path = dir.join(format!("disk{number}"));
            std::fs::File::create(&path)?.set_len(1 << 20)?;
            let is_root = number == 0;
            Ok(json!({"drive_id": format!("drive{number}"), "path_on_host": path,
                      "is_root_device": is_root, "is_read_only": false}))
        });
        Ok(Devices {
            boot_source: json!({"kernel_image_path": kernel, "boot_args": "reboot=k panic=1"}),
            drives: drives.collect::<Result<_>>()?,
            vsock: json!({"guest_cid": 3, "uds_path": dir.join("vsock")}),
        })
    }

    fn machine_config() -> Value {
        json!({"vcpu_count": 1, "mem_size_mib": 128})
    }

    /// Paths and bodies of the calls.
    fn calls(&self) -> Vec<(String, Value)> {
        let mut calls = vec![
            ("/machine-config".to_owned(), Self::machine_config()),
            ("/boot-source".to_owned(), self.boot_source.clone()),
        ];
        let path = |drive: &Value| format!("/drives/{}", drive["drive_id"].as_str().unwrap_or_default());
        calls.extend(self.drives.iter().map(|drive| (path(drive), drive.clone())));
        calls.extend([("/entropy".to_owned(), json!({})), ("/vsock".to_owned(), self.vsock.clone())]);
        calls
    }

    /// The same as a configuration file.
    fn file(&self) -> Value {
        json!({
            "machine-config": Self::machine_config(),
            "boot-source": self.boot_source,
            "drives": self.drives,
            "entropy": {},
            "vsock": self.vsock,
        })
    }
}
