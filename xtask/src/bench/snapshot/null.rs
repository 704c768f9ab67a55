//! Guests of a few instructions: saved, restored, cloned and forked.
//!
//! They run wherever `/dev/kvm` opens, also on a software KVM, so the monitor and the host's kernel
//! are measured at native speed. A guest writes to each page (or huge page) of a range of its
//! memory and then writes bytes to its serial port, once or endlessly. Its serial port is the
//! monitor's standard output, which is a file here.

use std::fs;
use std::os::unix::fs::MetadataExt;
use std::path::Path;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};
use serde_json::{Value, json};
use vesta_tests::api::ApiClient;
use vesta_tests::elf::Elf;
use vesta_tests::guest::Guest;
use vesta_tests::process::Orphans;
use vesta_tests::vmm::{STDOUT, Vmm, VmmBuilder};

use super::common::{FEWEST_RUNS, RunSpec, TIMEOUT, all_at_once, entries, ms, pause, private_kib};
use crate::bench::monitor::Monitor;
use crate::bench::peers::lacking;
use crate::bench::rounds::{Entry, interleaved};

const PAGE: u32 = 4096;
const HUGE_PAGE: u32 = 2 << 20;
/// Where the guests' range of memory begins.
const TOUCH_FROM: u32 = 4 << 20;

/// Prints the tables.
pub(super) fn tables(spec: &RunSpec) -> Result<()> {
    creates(spec)?;
    restores(spec)?;
    clones(spec)?;
    live(spec)?;
    forks(spec)
}

/// A guest that writes to `count` addresses, `step` bytes apart, and then to its serial port: one
/// byte before it halts, or bytes without end.
fn toucher(count: u32, step: u32, for_ever: bool) -> Elf {
    let mut code = vec![0xbf];
    code.extend(TOUCH_FROM.to_le_bytes()); // mov edi, TOUCH_FROM
    code.push(0xb9);
    code.extend(count.to_le_bytes()); // mov ecx, count
    code.extend([0x89, 0x0f]); // again: mov [edi], ecx
    code.extend([0x81, 0xc7]);
    code.extend(step.to_le_bytes()); // add edi, step
    code.extend([0x49, 0x75, 0xf5]); // dec ecx; jnz again
    code.extend([0x66, 0xba, 0xf8, 0x03, 0xee]); // mov dx, 0x3f8; out dx, al
    // out dx, al; jmp to it: or hlt; jmp to it
    code.extend(if for_ever { [0xee, 0xeb, 0xfd] } else { [0xf4, 0xeb, 0xfd] });
    Elf::of(&code)
}

/// A running guest that has touched its memory.
struct Running {
    vmm: Vmm,
    api: ApiClient,
}

fn start(program: &Path, kernel: &Elf, mib: u32, machine: Value) -> Result<Running> {
    let vmm = spawn(program)?;
    let mut api = vmm.ready_client(TIMEOUT)?;
    let image = vmm.dir().join("kernel");
    fs::write(&image, kernel.bytes())?;
    Guest { machine, ..Guest::bare(&image).mem_mib(mib) }.put(&mut api)?;
    api.put("/actions", &json!({"action_type": "InstanceStart"}))?.ok()?;
    wait_for_bytes(&vmm)?;
    Ok(Running { vmm, api })
}

fn spawn(program: &Path) -> Result<Vmm> {
    VmmBuilder::new(program)?.quiet().with_api().stdout_to_file()?.spawn()
}

/// Waits until the guest has written to its serial port.
fn wait_for_bytes(vmm: &Vmm) -> Result<Instant> {
    let serial = vmm.dir().join(STDOUT);
    let deadline = Instant::now() + TIMEOUT;
    while fs::metadata(&serial).map_or(0, |file| file.len()) == 0 {
        if Instant::now() > deadline {
            bail!("the guest has written nothing to {}", serial.display());
        }
        std::thread::sleep(Duration::from_micros(50));
    }
    Ok(Instant::now())
}

/// Saves a paused guest to `dir`. Returns the time in ms and the size of the memory file on disk,
/// in MiB.
fn create(api: &mut ApiClient, dir: &Path) -> Result<(f64, f64)> {
    let (state, memory) = (dir.join("bench.state"), dir.join("bench.memory"));
    let body = json!({"snapshot_path": state, "mem_file_path": memory});
    let asked = Instant::now();
    api.put("/snapshot/create", &body)?.ok()?;
    let took = ms(asked.elapsed());
    let kib = u32::try_from(fs::metadata(&memory)?.blocks() / 2).context("a memory file below 4 TiB")?;
    let space = f64::from(kib) / 1024.0;
    Ok((took, space))
}

fn forget(dir: &Path) {
    for name in ["bench.state", "bench.memory"] {
        let _ = fs::remove_file(dir.join(name));
    }
}

fn creates(spec: &RunSpec) -> Result<()> {
    for (title, mib, pages) in [("128 MiB, nothing touched", 128, 1), ("2 GiB, 10% touched", 2048, 52429)] {
        let measured = interleaved(entries(&spec.monitors), spec.runs, false, |monitor| {
            let mut guest = start(&monitor.path, &toucher(pages, PAGE, false), mib, json!({}))?;
            pause(&mut guest.api)?;
            let (took, space) = create(&mut guest.api, &spec.dir)?;
            forget(&spec.dir);
            Ok(vec![vec![took], vec![space]])
        })?;
        println!("## Create: {title}\n");
        println!("{}", measured.markdown(&["PUT /snapshot/create, ms", "memory file, MiB"]));
    }
    Ok(())
}

/// A new process that has restored a snapshot.
struct Restored {
    vmm: Vmm,
    api_ms: f64,
    load_ms: f64,
    running_ms: f64,
}

fn restore(program: &Path, dir: &Path) -> Result<Restored> {
    let vmm = spawn(program)?;
    let mut api = vmm.ready_client(TIMEOUT)?;
    let api_ms = ms(vmm.started().elapsed());
    let asked = Instant::now();
    load(&mut api, dir)?;
    let load_ms = ms(asked.elapsed());
    let running_ms = ms(wait_for_bytes(&vmm)?.saturating_duration_since(vmm.started()));
    Ok(Restored { vmm, api_ms, load_ms, running_ms })
}

fn restores(spec: &RunSpec) -> Result<()> {
    let measured = interleaved(entries(&spec.monitors), spec.runs, false, |monitor| {
        let mut guest = start(&monitor.path, &toucher(1, PAGE, true), 128, json!({}))?;
        pause(&mut guest.api)?;
        create(&mut guest.api, &spec.dir)?;
        drop(guest);
        let restored = restore(&monitor.path, &spec.dir)?;
        let values = [restored.api_ms, restored.load_ms, restored.running_ms].map(|value| vec![value]);
        drop(restored.vmm);
        forget(&spec.dir);
        Ok(values.into())
    })?;
    println!("## Restore: 128 MiB, nothing touched\n");
    let columns = ["spawn to API, ms", "PUT /snapshot/load, ms", "spawn to the guest's first byte, ms"];
    println!("{}", measured.markdown(&columns));
    Ok(())
}

fn clones(spec: &RunSpec) -> Result<()> {
    for count in [1, 10, 50] {
        let measured = interleaved(entries(&spec.monitors), FEWEST_RUNS, false, |monitor| {
            let mut guest = start(&monitor.path, &toucher(256, PAGE, false), 128, json!({}))?;
            pause(&mut guest.api)?;
            create(&mut guest.api, &spec.dir)?;
            drop(guest);
            let began = Instant::now();
            let clones = all_at_once(&monitor.path, count, |clone| {
                load(&mut clone.ready_client(TIMEOUT)?, &spec.dir)
            })?;
            let took = ms(began.elapsed());
            let own = clones.iter().map(|clone| private_kib(clone.pid().into()));
            let values = vec![vec![took], own.collect::<Result<_>>()?];
            drop(clones);
            forget(&spec.dir);
            Ok(values)
        })?;
        println!("## Clones: {count} at once of 128 MiB, 1 MiB touched, idle\n");
        let columns = ["until all are restored and resumed, ms", "own memory of each, KiB"];
        println!("{}", measured.markdown(&columns));
    }
    Ok(())
}

/// Restores and resumes the guest of the snapshot in `dir`.
fn load(api: &mut ApiClient, dir: &Path) -> Result<()> {
    let body = json!({
        "snapshot_path": dir.join("bench.state"),
        "mem_backend": {"backend_type": "File", "backend_path": dir.join("bench.memory")},
        "resume_vm": true,
    });
    api.put("/snapshot/load", &body)?.ok().map(drop)
}

/// Live snapshots, which only vesta has.
fn live(spec: &RunSpec) -> Result<()> {
    let vestas = spec.monitors.iter().filter(|monitor| monitor.is_vesta());
    let measured = interleaved(entries(vestas), spec.runs, false, |monitor| {
        let mut guest = start(&monitor.path, &toucher(52429, PAGE, false), 2048, json!({}))?;
        let (state, memory) = (spec.dir.join("bench.state"), spec.dir.join("bench.memory"));
        let body = json!({"snapshot_path": state, "mem_file_path": memory, "live": true});
        let asked = Instant::now();
        let job = guest.api.put("/snapshot/create", &body)?.ok()?.json()?;
        let call = ms(asked.elapsed());
        let written = wait_for_job(&mut guest.api, asked)?;
        forget(&spec.dir);
        Ok(vec![vec![millis(&job["pause_us"])?], vec![call], vec![written]])
    })?;
    println!("## Live snapshot: 2 GiB, 10% touched\n");
    let columns = ["pause, ms", "PUT /snapshot/create, ms", "until all is written, ms"];
    println!("{}{}", measured.markdown(&columns), lacking(&spec.monitors, "live snapshots"));
    Ok(())
}

/// Waits until the live snapshot is done. Returns the time since `asked`, in ms.
fn wait_for_job(api: &mut ApiClient, asked: Instant) -> Result<f64> {
    loop {
        let job = api.get("/snapshot/job")?.ok()?.json()?;
        match job["state"].as_str() {
            Some("Done") => return Ok(ms(asked.elapsed())),
            Some("Running") if asked.elapsed() < TIMEOUT => std::thread::sleep(Duration::from_millis(1)),
            _ => bail!("the live snapshot is not done: {job}"),
        }
    }
}

/// A number of microseconds, in ms.
fn millis(microseconds: &Value) -> Result<f64> {
    microseconds.as_f64().map(|us| us / 1000.0).context("a number")
}

/// A guest that is forked: its name in the table, its MiB, the number of addresses that it touches,
/// the bytes between them, and its `huge_pages`.
type Size = (&'static str, u32, u32, u32, &'static str);

/// Forks, which only vesta has.
fn forks(spec: &RunSpec) -> Result<()> {
    const SIZES: [Size; 4] = [
        ("128 MiB", 128, 60, HUGE_PAGE, "Transparent"),
        ("1 GiB", 1024, 500, HUGE_PAGE, "Transparent"),
        ("2 GiB", 2048, 1020, HUGE_PAGE, "Transparent"),
        ("2 GiB, ordinary pages", 2048, 1020 * 512, PAGE, "None"),
    ];
    let vestas: Vec<&Monitor> = spec.monitors.iter().filter(|monitor| monitor.is_vesta()).collect();
    let entries = SIZES.iter().flat_map(|size| {
        vestas.iter().map(move |&monitor| Entry {
            name: format!("{}: {}", monitor.name, size.0),
            may_fail: monitor.peer,
            contestant: (monitor, size),
        })
    });
    let measured =
        interleaved(entries.collect(), spec.runs, false, |(monitor, size)| fork(&monitor.path, size))?;
    println!("## Fork: all memory touched, one child\n");
    let columns = ["pause, ms", "until the child runs, ms", "PUT /fork, ms", "idle child's own memory, KiB"];
    println!("{}{}", measured.markdown(&columns), lacking(&spec.monitors, "forks"));
    Ok(())
}

fn fork(program: &Path, &(_, mib, count, step, pages): &Size) -> Result<Vec<Vec<f64>>> {
    let machine = json!({"huge_pages": pages});
    let mut guest = start(program, &toucher(count, step, false), mib, machine)?;
    let asked = Instant::now();
    let reply = guest.api.put("/fork", &json!({"children": [{"id": "child"}]}))?.ok()?.json()?;
    let call = ms(asked.elapsed());
    let child = &reply["children"][0];
    let pid = child["pid"].as_u64().with_context(|| reply.to_string())?;
    let orphan = Orphans::of(&[pid]);
    let values = [millis(&reply["pause_us"])?, millis(&child["ready_us"])?, call, private_kib(pid)?];
    drop(guest.vmm);
    orphan.kill(TIMEOUT)?;
    Ok(values.map(|value| vec![value]).into())
}
