//! Guests of a few instructions: saved, restored, cloned and forked.
//!
//! They run wherever `/dev/kvm` opens, a software KVM included, so that what is measured is the monitor and its host's kernel at
//! native speed. A guest writes a word to each page (or huge page) of a stretch of its memory and then says bytes on its serial port, for ever or
//! once.

use std::fs;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};
use serde_json::{Value, json};
use vesta_tests::api::ApiClient;
use vesta_tests::elf::Elf;
use vesta_tests::guest::Guest;
use vesta_tests::process::Orphans;
use vesta_tests::vmm::{Vmm, VmmBuilder};

use super::{FEWEST_RUNS, Orders, PATIENCE, all_at_once, ms, pause, private_kib, rows};
use crate::bench::table::markdown;

const PAGE: u32 = 4096;
const HUGE_PAGE: u32 = 2 << 20;
/// Where the guests' stretch of memory begins.
const TOUCH_FROM: u32 = 4 << 20;

/// Prints the tables.
pub(super) fn tables(orders: &Orders) -> Result<()> {
    creates(orders)?;
    restores(orders)?;
    clones(orders)?;
    forks(orders)
}

/// A guest that writes to `count` places, `step` apart, and then says bytes: one and halts, or one after the other for ever.
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
    let vmm = VmmBuilder::new(program)?.quiet().with_api().spawn()?;
    let mut api = vmm.ready_client(PATIENCE)?;
    let image = vmm.dir().join("kernel");
    fs::write(&image, kernel.bytes())?;
    Guest { machine, ..Guest::bare(&image).mem_mib(mib) }.put(&mut api)?;
    let serial = serial_to(&vmm, &mut api)?;
    api.put("/actions", &json!({"action_type": "InstanceStart"}))?.ok()?;
    wait_for_bytes(&serial)?;
    Ok(Running { vmm, api })
}

fn serial_to(vmm: &Vmm, api: &mut ApiClient) -> Result<PathBuf> {
    let serial = vmm.dir().join("serial");
    api.put("/serial", &json!({"serial_out_path": serial}))?.ok()?;
    Ok(serial)
}

/// Waits until something is written.
fn wait_for_bytes(serial: &Path) -> Result<Instant> {
    let deadline = Instant::now() + PATIENCE;
    while fs::metadata(serial).map_or(0, |file| file.len()) == 0 {
        if Instant::now() > deadline {
            bail!("the guest of {} says nothing", serial.display());
        }
        std::thread::sleep(Duration::from_micros(50));
    }
    Ok(Instant::now())
}

/// Saves a paused guest to `dir`. How long that took, in ms, and the space of the memory file, in MiB.
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

fn creates(orders: &Orders) -> Result<()> {
    for (title, mib, pages) in [("128 MiB, nothing touched", 128, 1), ("2 GiB, 10% touched", 2048, 52429)] {
        let mut rows = rows(orders.monitors.iter().map(|m| m.name.as_str()), 2);
        for _ in 0..orders.runs {
            for (monitor, row) in orders.monitors.iter().zip(&mut rows) {
                let mut guest = start(&monitor.path, &toucher(pages, PAGE, false), mib, json!({}))?;
                pause(&mut guest.api)?;
                let (took, space) = create(&mut guest.api, &orders.dir)?;
                row.samples[0].push(took);
                row.samples[1].push(space);
                forget(&orders.dir);
            }
        }
        println!("## Create: {title}\n");
        println!("{}", markdown(&["PUT /snapshot/create, ms", "memory file, MiB"], &rows));
    }
    Ok(())
}

/// A process that was started and has loaded the snapshot in `dir`.
struct Restored {
    vmm: Vmm,
    api_ms: f64,
    load_ms: f64,
    running_ms: f64,
}

fn restore(program: &Path, dir: &Path) -> Result<Restored> {
    let vmm = VmmBuilder::new(program)?.quiet().with_api().spawn()?;
    let mut api = vmm.ready_client(PATIENCE)?;
    let api_ms = ms(vmm.started().elapsed());
    let serial = serial_to(&vmm, &mut api)?;
    let body = json!({
        "snapshot_path": dir.join("bench.state"),
        "mem_backend": {"backend_type": "File", "backend_path": dir.join("bench.memory")},
        "resume_vm": true,
    });
    let asked = Instant::now();
    api.put("/snapshot/load", &body)?.ok()?;
    let load_ms = ms(asked.elapsed());
    let running_ms = ms(wait_for_bytes(&serial)?.saturating_duration_since(vmm.started()));
    Ok(Restored { vmm, api_ms, load_ms, running_ms })
}

fn restores(orders: &Orders) -> Result<()> {
    let mut rows = rows(orders.monitors.iter().map(|m| m.name.as_str()), 3);
    for _ in 0..orders.runs {
        for (monitor, row) in orders.monitors.iter().zip(&mut rows) {
            let mut guest = start(&monitor.path, &toucher(1, PAGE, true), 128, json!({}))?;
            pause(&mut guest.api)?;
            create(&mut guest.api, &orders.dir)?;
            drop(guest);
            let restored = restore(&monitor.path, &orders.dir)?;
            for (sample, value) in
                row.samples.iter_mut().zip([restored.api_ms, restored.load_ms, restored.running_ms])
            {
                sample.push(value);
            }
            drop(restored.vmm);
            forget(&orders.dir);
        }
    }
    println!("## Restore: 128 MiB, nothing touched\n");
    let columns = ["spawn to API, ms", "PUT /snapshot/load, ms", "spawn to first byte of the guest's, ms"];
    println!("{}", markdown(&columns, &rows));
    Ok(())
}

fn clones(orders: &Orders) -> Result<()> {
    for count in [1, 10, 50] {
        let mut rows = rows(orders.monitors.iter().map(|m| m.name.as_str()), 2);
        for _ in 0..FEWEST_RUNS {
            for (monitor, row) in orders.monitors.iter().zip(&mut rows) {
                let mut guest = start(&monitor.path, &toucher(256, PAGE, false), 128, json!({}))?;
                pause(&mut guest.api)?;
                create(&mut guest.api, &orders.dir)?;
                drop(guest);
                let began = Instant::now();
                let clones = all_at_once(&monitor.path, count, |clone| load_idle(clone, &orders.dir))?;
                row.samples[0].push(ms(began.elapsed()));
                for clone in &clones {
                    row.samples[1].push(private_kib(clone.pid().into())?);
                }
                drop(clones);
                forget(&orders.dir);
            }
        }
        println!("## Clones: {count} at once of 128 MiB, 1 MiB touched, idle\n");
        println!(
            "{}",
            markdown(&["until all are restored and resumed, ms", "own memory of each, KiB"], &rows)
        );
    }
    Ok(())
}

/// Makes a monitor go on with the snapshot in `dir`, whose guest has nothing to say.
fn load_idle(vmm: &Vmm, dir: &Path) -> Result<()> {
    let mut api = vmm.ready_client(PATIENCE)?;
    serial_to(vmm, &mut api)?;
    let body = json!({
        "snapshot_path": dir.join("bench.state"),
        "mem_backend": {"backend_type": "File", "backend_path": dir.join("bench.memory")},
        "resume_vm": true,
    });
    api.put("/snapshot/load", &body)?.ok().map(drop)
}

/// Only vesta forks.
fn forks(orders: &Orders) -> Result<()> {
    let sizes = [
        ("128 MiB", 128, 60, HUGE_PAGE, "Transparent"),
        ("1 GiB", 1024, 500, HUGE_PAGE, "Transparent"),
        ("2 GiB", 2048, 1020, HUGE_PAGE, "Transparent"),
        ("2 GiB, ordinary pages", 2048, 1020 * 512, PAGE, "None"),
    ];
    let mut rows = rows(sizes.iter().map(|size| size.0), 4);
    let vesta = orders.monitors.first().context("vesta is measured first")?;
    for _ in 0..orders.runs {
        for ((_, mib, count, step, pages), row) in sizes.iter().zip(&mut rows) {
            let machine = json!({"huge_pages": pages});
            let mut guest = start(&vesta.path, &toucher(*count, *step, false), *mib, machine)?;
            let asked = Instant::now();
            let reply = guest.api.put("/fork", &json!({"children": [{"id": "child"}]}))?.ok()?.json()?;
            let call = ms(asked.elapsed());
            let child = &reply["children"][0];
            let pid = child["pid"].as_u64().with_context(|| reply.to_string())?;
            let orphan = Orphans::of(&[pid]);
            let number = |value: &Value| value.as_f64().map(|us| us / 1000.0).context("a number");
            row.samples[0].push(number(&reply["pause_us"])?);
            row.samples[1].push(number(&child["ready_us"])?);
            row.samples[2].push(call);
            row.samples[3].push(private_kib(pid)?);
            drop(guest.vmm);
            orphan.kill(PATIENCE)?;
        }
    }
    println!("## Fork: all memory touched, one child\n");
    let columns = ["pause, ms", "until the child runs, ms", "PUT /fork, ms", "idle child's own memory, KiB"];
    println!("{}", markdown(&columns, &rows));
    Ok(())
}
