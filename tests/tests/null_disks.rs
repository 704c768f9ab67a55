//! Disks of guests of a few instructions: locks between monitors, and failing disks of the host.

use std::fs::File;
use std::os::unix::fs::FileExt;
use std::path::Path;

use anyhow::{Result, ensure};
use rustix::process::Signal;
use serde_json::{Value, json};
use vesta_tests::api::{ApiClient, Response};
use vesta_tests::counting::counting_with;
use vesta_tests::disks::{MIB, disk, drive, with};
use vesta_tests::events::EventStream;
use vesta_tests::guest::{TIMEOUT, Transport};
use vesta_tests::host_devices::{LoopDevice, SmallFs};
use vesta_tests::process::Orphans;
use vesta_tests::snapshots::{Files, pause, resume, unconfigured};

fn put(api: &mut ApiClient, drive: &Value) -> Result<Response> {
    api.put("/drives/d", drive)
}

fn child(dir: &Path, id: &str) -> Value {
    json!({"id": id, "serial": {"serial_out_path": dir.join(format!("{id}.serial"))}})
}

fn refused(response: &Response, printed: &[&str]) -> Result<()> {
    let fault = response.fault();
    ensure!(response.status == 400, "{} {fault}", response.status);
    ensure!(printed.iter().all(|printed| fault.contains(printed)), "no {printed:?} in: {fault}");
    Ok(())
}

#[test]
fn a_raw_disk_in_use_is_refused_and_its_holder_named() -> Result<()> {
    let home = tempfile::tempdir()?;
    let image = disk(home.path(), "disk.img", 1)?;
    let raw = drive("d", &image);
    let read_only = with(raw.clone(), &json!({"is_read_only": true}));
    let overlay = home.path().join("top");
    let overlaid = with(raw.clone(), &json!({"overlay": {"path": overlay}}));
    let (mut writer, mut writers_api) = unconfigured(Transport::Mmio)?;
    put(&mut writers_api, &raw)?.ok()?;
    // Set again, and used by another drive of the same microVM.
    put(&mut writers_api, &raw)?.ok()?;
    writers_api.put("/drives/e", &with(raw.clone(), &json!({"drive_id": "e"})))?.ok()?;

    let (other, mut api) = unconfigured(Transport::Mmio)?;
    let holder = format!("process {} (", writer.pid());
    for drive in [&raw, &read_only, &overlaid] {
        refused(&put(&mut api, drive)?, &["drive d", "disk.img", &holder, "\"lock\""])?;
    }
    ensure!(!overlay.exists(), "a refused request leaves no file");
    let shared = with(raw.clone(), &json!({"lock": false}));
    put(&mut api, &shared)?.ok()?;
    refused(&put(&mut api, &raw)?, &[&holder])?;
    let config = api.get("/vm/config")?.ok()?.json()?;
    ensure!(config["drives"][0]["lock"] == json!(false), "{config}");

    writer.signal(Signal::KILL)?;
    writer.exit_status(TIMEOUT)?;
    put(&mut api, &raw)?.ok()?;
    let config = api.get("/vm/config")?.ok()?.json()?;
    ensure!(config["drives"][0].get("lock").is_none(), "{config}");
    drop(other);

    // Readers do not exclude each other.
    let (_one, mut one) = unconfigured(Transport::Mmio)?;
    put(&mut one, &read_only)?.ok()?;
    let (_two, mut two) = unconfigured(Transport::Mmio)?;
    put(&mut two, &overlaid)?.ok()?;
    let (_three, mut three) = unconfigured(Transport::Mmio)?;
    refused(&put(&mut three, &raw)?, &["drive d", "for writing"])
}

#[test]
fn a_forked_disk_is_a_shared_base_that_no_one_can_write() -> Result<()> {
    let home = tempfile::tempdir()?;
    let dir = home.path();
    let image = disk(dir, "disk.img", 1)?;
    let (none, raw) = (disk(dir, "none", 0)?, drive("d", &image));
    let (parent, mut api, _serial) = counting_with(&[raw.clone(), drive("none", &none)])?;
    // The same disk again, as for a file that has grown.
    api.patch("/drives/d", &json!({"drive_id": "d", "path_on_host": image}))?.ok()?;
    let (_other, mut other) = unconfigured(Transport::Mmio)?;
    let overlaid = with(raw.clone(), &json!({"overlay": {"path": dir.join("others")}}));
    refused(&put(&mut other, &overlaid)?, &["disk.img"])?;
    let children = json!({"children": [child(dir, "a"), child(dir, "b")]});
    let orphans = Orphans::of_fork(&api.put("/fork", &children)?.ok()?.json()?)?;
    put(&mut other, &overlaid)?.ok()?;
    refused(&put(&mut other, &raw)?, &["disk.img"])?;
    drop(parent);
    let (_more, mut more) = unconfigured(Transport::Mmio)?;
    refused(&put(&mut more, &raw)?, &["disk.img"])?;
    orphans.kill(TIMEOUT)?;
    // `other` uses it as a base itself, which does not conflict with its own drive.
    put(&mut other, &raw)?.ok().map(drop)
}

#[test]
fn a_saved_disk_is_written_by_one_microvm_at_a_time() -> Result<()> {
    let home = tempfile::tempdir()?;
    let image = disk(home.path(), "disk.img", 1)?;
    let (saved, mut api, _serial) = counting_with(&[drive("d", &image)])?;
    let files = Files::new(home.path(), "vm");
    pause(&mut api)?;
    api.put("/snapshot/create", &files.create("Full"))?.ok()?;
    resume(&mut api)?;
    let (vmm, mut api) = unconfigured(Transport::Mmio)?;
    api.put("/serial", &json!({"serial_out_path": vmm.dir().join("serial")}))?.ok()?;
    let holder = format!("process {} (", saved.pid());
    refused(&api.put("/snapshot/load", &files.load())?, &["drive d", "disk.img", &holder])?;
    drop(saved);
    api.put("/snapshot/load", &files.load())?.ok().map(drop)
}

/// A disk larger than the file system below it: a loop device on a full file system in memory.
#[test]
fn a_failed_write_back_refuses_forks_until_the_disk_is_replaced() -> Result<()> {
    let small = SmallFs::new(4 * MIB)?;
    let device = LoopDevice::new(&disk(&small.path(), "disk", 16)?)?;
    let home = tempfile::tempdir()?;
    let dir = home.path();
    let writeback = json!({"cache_type": "Writeback"});
    let (_vmm, mut api, _serial) = counting_with(&[with(drive("d", device.path()), &writeback)])?;
    let mut events = EventStream::open(&api)?;
    events.expect("started")?;
    // As if the guest had written: the page cache does not record the writer.
    File::options().write(true).open(device.path())?.write_all_at(&vec![7; 8 << 20], 0)?;

    let files = Files::new(dir, "vm");
    let overlays = json!([{"drive_id": "d", "overlay": dir.join("top")}]);
    let fork = |name: &str| {
        let mut child = child(dir, name);
        child["drives"] = json!([{"drive_id": "d", "overlay": dir.join(name)}]);
        json!({"children": [child], "drives": overlays})
    };
    let unknown =
        ["drive d", "contents are unknown since a write-back", "Input/output error", "replace the disk"];
    let all_refused = |api: &mut ApiClient| -> Result<()> {
        refused(&api.put("/fork", &fork("a"))?, &unknown)?;
        let mut live = files.create("Full");
        (live["live"], live["drives"]) = (json!(true), overlays.clone());
        refused(&api.put("/snapshot/create", &live)?, &unknown)?;
        pause(api)?;
        refused(&api.put("/snapshot/create", &files.create("Full"))?, &unknown)?;
        resume(api)?;
        ensure!(std::fs::read_dir(dir)?.next().is_none(), "a refused request leaves no file");
        Ok(())
    };
    all_refused(&mut api)?;
    let failed = events.expect("device_error")?;
    ensure!(failed["device"] == "drive d" && failed["needs_reset"] == false, "{failed}");
    // With space again the kernel's next sync succeeds, because it treats the lost data as written.
    small.resize(64 * MIB)?;
    all_refused(&mut api)?;
    let patch = |path: &Path| json!({"drive_id": "d", "path_on_host": path});
    api.patch("/drives/d", &patch(device.path()))?.ok()?;
    all_refused(&mut api)?;

    let other = disk(&small.path(), "other", 16)?;
    api.patch("/drives/d", &patch(&other))?.ok()?;
    Orphans::of_fork(&api.put("/fork", &fork("b"))?.ok()?.json()?)?.kill(TIMEOUT)
}
