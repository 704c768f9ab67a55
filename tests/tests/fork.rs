//! Forks of Linux guests: children and parent continue from the same state, each with its own
//! disks.

use std::collections::BTreeSet;
use std::fs::{self, File};
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::time::Instant;

use anyhow::{Result, ensure};
use serde_json::{Value, json};
use vesta_tests::api::ApiClient;
use vesta_tests::disks::{DiskGuest, disk, drive, output_of, with};
use vesta_tests::guest::{BOOT_TIMEOUT, TIMEOUT, Transport};
use vesta_tests::host_devices::LoopDevice;
use vesta_tests::on_each_transport;
use vesta_tests::process::Orphans;
use vesta_tests::serial_file::{wait_for_text, word};
use vesta_tests::snapshots::{Files, restore, save_live, wait_for_live_snapshot};
use vesta_tests::vmm::Vmm;

const TOOL: &str = env!("CARGO_BIN_EXE_disk-tool");

on_each_transport! {
    /// Raw disks and overlays, through both engines, forked twice during writes that are read back.
    fn parent_and_child_each_read_their_own_writes_after_a_fork(transport) {
        let mut guest = DiskGuest::new(transport)?.tool(TOOL).vcpus(2).entropy(json!({}));
        let home = tempfile::tempdir()?;
        for (name, fields) in [
            ("raw", json!({"io_engine": "Sync", "cache_type": "Writeback"})),
            ("over", json!({"io_engine": "Async", "overlay": {"path": home.path().join("first-overlay")}})),
        ] {
            let path = disk(home.path(), name, 4)?;
            guest = guest.drive(with(drive(name, &path), &fields));
        }
        let script = "disk-tool run vda 7 2 128 & disk-tool run vdb 8 2 128 & wait\n\
            echo RANDOM $(head -c 16 /dev/urandom | hexdump -v -e '/1 \"%02x\"')\n\
            echo RESEEDED $(dmesg | grep -c 'crng reseeded due to virtual machine fork')\n\
            echo LAST\npoweroff -f";
        let mut vmm = guest.run(script)?;
        vmm.wait_for_output("FLUSHED", BOOT_TIMEOUT)?;
        let mut api = vmm.ready_client(TIMEOUT)?;

        let (mut children, mut alive) = (Vec::new(), Vec::new());
        for generation in 0..2 {
            let bodies = (0..2).map(|n| {
                let id = format!("g{generation}c{n}");
                let serial = home.path().join(&id);
                children.push(serial.clone());
                json!({"id": id, "serial": {"serial_out_path": serial}})
            });
            let bodies: Vec<_> = bodies.collect();
            let reply = api.put("/fork", &json!({"children": bodies}))?.ok()?.json()?;
            alive.push(Orphans::of_fork(&reply)?);
        }
        let parent = output_of(&mut vmm)?;
        ensure!(parent.contains("VERIFIED vda") && parent.contains("VERIFIED vdb"), "{parent}");
        ensure!(word(&parent, "RESEEDED")? == "0", "the parent is the same guest as before: {parent}");
        let mut random = BTreeSet::from([word(&parent, "RANDOM")?.to_owned()]);
        for child in &children {
            let output = wait_for_text(child, "LAST", BOOT_TIMEOUT)?;
            ensure!(output.contains("VERIFIED vda") && output.contains("VERIFIED vdb"), "{output}");
            ensure!(!output.contains("WRONG") && !output.contains("FAILED"), "{output}");
            ensure!(word(&output, "RESEEDED")? != "0", "{output}");
            random.insert(word(&output, "RANDOM")?.to_owned());
        }
        ensure!(random.len() == 5, "random numbers are repeated: {random:?}");
        alive.into_iter().try_for_each(|children| children.wait(TIMEOUT))?;
        Ok(())
    }
}

/// Forks, after waiting for a merge of layers if there are too many.
fn fork_when_it_can_be(api: &mut ApiClient, fork: &Value) -> Result<Value> {
    let begun = Instant::now();
    loop {
        let reply = api.put("/fork", fork)?;
        if reply.status != 400 || !reply.fault().contains("overlay.layers") || begun.elapsed() > BOOT_TIMEOUT
        {
            return reply.ok()?.json();
        }
        std::thread::yield_now();
    }
}

/// Writes to both disks until the third says stop.
const WRITES: &str = "disk-tool until /stop vda 7 2 & disk-tool until /stop vdb 8 2 &
until dd if=/dev/vdc bs=512 count=1 iflag=direct 2>/dev/null | grep -q stop; do usleep 200000; done
touch /stop
wait
echo LAST
poweroff -f";

on_each_transport! {
    /// Forked after each of so many writes that layers are merged, then saved live. Each restore
    /// finds on its disks what was written.
    fn a_writing_guest_is_forked_many_times_and_restored_each_time(transport) {
        let home = tempfile::tempdir()?;
        let control = disk(home.path(), "control", 1)?;
        let mut guest = DiskGuest::new(transport)?.tool(TOOL);
        for (name, fields) in [
            ("raw", json!({"io_engine": "Sync", "cache_type": "Writeback"})),
            ("over", json!({"io_engine": "Async", "overlay": {"path": home.path().join("first-overlay")}})),
        ] {
            guest = guest.drive(with(drive(name, &disk(home.path(), name, 4)?), &fields));
        }
        let mut vmm = guest.drive(with(drive("control", &control), &json!({"is_read_only": true}))).run(WRITES)?;
        vmm.wait_for_output("FLUSHED", BOOT_TIMEOUT)?;
        let mut api = vmm.ready_client(TIMEOUT)?;
        let (mut layers, mut merged) = ([0; 2], [false; 2]);
        // Layers are merged some time after there are many of them.
        for round in 0.. {
            let from = vmm.stdout.len();
            for mark in ["FLUSHED vda", "FLUSHED vdb"] {
                vmm.stdout.wait_for_after(from, mark, BOOT_TIMEOUT)?;
            }
            let child = json!({"id": format!("c{round}"), "resume": false});
            let reply = fork_when_it_can_be(&mut api, &json!({"children": [child]}))?;
            Orphans::of_fork(&reply)?.kill(TIMEOUT)?;
            let config = api.get("/vm/config")?.json()?;
            for drive in 0..2 {
                let now = config["drives"][drive]["overlay"]["layers"].as_array().map_or(0, Vec::len);
                merged[drive] |= now < layers[drive];
                layers[drive] = now;
            }
            if merged == [true; 2] {
                break;
            }
            ensure!(round < 40, "there are {layers:?} layers, {merged:?}");
        }
        let files = Files::new(home.path(), "live");
        save_live(&mut api, &files.create("Full"))?;

        File::options().write(true).open(&control)?.write_all_at(b"stop\n", 0)?;
        let verified = |output: &str| {
            ensure!(output.contains("VERIFIED vda") && output.contains("VERIFIED vdb"), "{output}");
            ensure!(!output.contains("WRONG") && !output.contains("FAILED"), "{output}");
            Ok(())
        };
        verified(&output_of(&mut vmm)?)?;
        // The second begins when the first has written and ended.
        for _load in 0..2 {
            let (mut clone, _api) = restore(transport, &files.load())?;
            verified(&output_of(&mut clone)?)?;
        }
        Ok(())
    }
}

/// Writes to the first disk until the second says stop.
const WRITES_TO_ONE: &str = "disk-tool until /stop vda 7 2 &
until dd if=/dev/vdb bs=512 count=1 iflag=direct 2>/dev/null | grep -q stop; do usleep 200000; done
touch /stop
wait
echo LAST
poweroff -f";

/// A guest that writes to a block device of the host until that file says stop.
fn on_block_device(dir: &Path) -> Result<(LoopDevice, PathBuf, Vmm, ApiClient)> {
    let device = LoopDevice::new(&disk(dir, "backing", 4)?)?;
    let control = disk(dir, "control", 1)?;
    let guest = DiskGuest::new(Transport::Mmio)?.tool(TOOL).drive(drive("device", device.path()));
    let vmm =
        guest.drive(with(drive("control", &control), &json!({"is_read_only": true}))).run(WRITES_TO_ONE)?;
    vmm.wait_for_output("FLUSHED", BOOT_TIMEOUT)?;
    let api = vmm.ready_client(TIMEOUT)?;
    Ok((device, control, vmm, api))
}

fn check_verified(output: &str) -> Result<()> {
    ensure!(output.contains("VERIFIED vda"), "{output}");
    ensure!(!output.contains("WRONG") && !output.contains("FAILED"), "{output}");
    Ok(())
}

#[test]
fn a_block_device_is_forked_onto_named_overlays() -> Result<()> {
    let home = tempfile::tempdir()?;
    let (device, control, mut vmm, mut api) = on_block_device(home.path())?;
    let on = |name: &str| json!([{"drive_id": "device", "overlay": home.path().join(name)}]);
    let serial = home.path().join("serial");
    let child = json!({"id": "c", "serial": {"serial_out_path": serial}, "drives": on("childs")});
    // No overlay can be created beside it.
    let refused = api.put("/fork", &json!({"children": [child]}))?;
    ensure!(refused.status == 400 && refused.fault().contains("drives[].overlay"), "{refused:?}");
    let reply = api.put("/fork", &json!({"children": [child], "drives": on("parents")}))?.ok()?.json()?;
    let orphans = Orphans::of_fork(&reply)?;
    let base = fs::read(device.path())?;
    File::options().write(true).open(&control)?.write_all_at(b"stop\n", 0)?;
    check_verified(&output_of(&mut vmm)?)?;
    check_verified(&wait_for_text(&serial, "LAST", BOOT_TIMEOUT)?)?;
    orphans.wait(TIMEOUT)?;
    ensure!(fs::read(device.path())? == base, "the base has changed");
    Ok(())
}

#[test]
fn a_block_device_is_saved_live_onto_a_named_overlay() -> Result<()> {
    let home = tempfile::tempdir()?;
    let (device, control, mut vmm, mut api) = on_block_device(home.path())?;
    let files = Files::new(home.path(), "live");
    let mut create = files.create("Full");
    create["live"] = json!(true);
    let refused = api.put("/snapshot/create", &create)?;
    ensure!(refused.status == 400 && refused.fault().contains("drives[].overlay"), "{refused:?}");
    create["drives"] = json!([{"drive_id": "device", "overlay": home.path().join("parents")}]);
    api.put("/snapshot/create", &create)?.ok()?;
    let base = fs::read(device.path())?;
    let job = wait_for_live_snapshot(&mut api)?;
    ensure!(job["state"] == "Done", "{job}");
    File::options().write(true).open(&control)?.write_all_at(b"stop\n", 0)?;
    check_verified(&output_of(&mut vmm)?)?;
    for _load in 0..2 {
        let (mut clone, _api) = restore(Transport::Mmio, &files.load())?;
        check_verified(&output_of(&mut clone)?)?;
    }
    ensure!(fs::read(device.path())? == base, "the base has changed");
    Ok(())
}
