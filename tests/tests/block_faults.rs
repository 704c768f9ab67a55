//! Disks of the host that fail, shrink or fill up: the guest sees I/O errors, everything else
//! continues, and a repaired disk works again. But a failed flush is final: only another disk can
//! be flushed.

use std::fs::File;
use std::process::Command;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use serde_json::json;
use vesta_tests::disks::{DiskGuest, MIB, OverlayFile, disk, drive, with};
use vesta_tests::guest::{BOOT_TIMEOUT, TIMEOUT, Transport};
use vesta_tests::host_devices::{LoopDevice, MappedDevice, MountedFs, NullDevice, SmallFs};
use vesta_tests::on_each_transport;
use vesta_tests::snapshots::pause;
use vesta_tests::vmm::Vmm;

const TOOL: &str = env!("CARGO_BIN_EXE_disk-tool");

/// A good disk (vdb) works all the time. At about the middle of the bad one (vda), waits until it
/// fails, prints that, waits until it works, and checks all of it.
const WATCH: &str = "\
    disk-tool run vdb 17 2 600 > /good & good=$!\n\
    middle() { dd if=/dev/vda of=/dev/null bs=512 skip=12000 count=16 iflag=direct 2>/dev/null; }\n\
    middle && echo READY\n\
    while middle; do usleep 10000; done\n\
    dd if=/dev/vda of=/dev/null bs=512 skip=64 count=8 iflag=direct 2>/dev/null && echo LOW WORKS\n\
    echo FAILS $(grep -c FLUSHED /good)\n\
    until middle; do usleep 10000; done\n\
    disk-tool run vda 17 2 100\n\
    wait $good; tail -n 1 /good\n\
    poweroff -f";

/// Checks that the API responds, and that the microVM runs.
fn still_runs(vmm: &Vmm) -> Result<()> {
    let state = vmm.ready_client(TIMEOUT)?.get("/")?.json()?;
    ensure!(state["state"] == "Running", "{state}");
    Ok(())
}

fn output_of(vmm: &mut Vmm, marks: &[&str]) -> Result<String> {
    let output = vesta_tests::disks::output_of(vmm)?;
    for mark in marks {
        ensure!(output.contains(mark), "no {mark}: {output}");
    }
    ensure!(!output.contains("WRONG"), "{output}");
    Ok(output)
}

on_each_transport! {
    fn disk_errors_reach_the_guest_and_affect_no_other_disk(transport) {
        let guest = DiskGuest::new(transport)?.tool(TOOL);
        let device = MappedDevice::new(&disk(guest.dir(), "file", 8)?)?;
        let good = drive("good", &disk(guest.dir(), "good", 8)?);
        let writeback = json!({"cache_type": "Writeback"});
        let guest = guest.drive(with(drive("bad", device.path()), &writeback)).drive(good);
        let flush = "dd if=/dev/zero of=/dev/vda bs=4096 seek=1600 count=4 conv=fsync 2>/dev/null";
        let write = format!("until ! {flush}; do :; done; echo WRITE FAILS\necho FAILS");
        let again = format!("{flush} || echo FLUSH STILL FAILS\nuntil {flush}; do usleep 10000; done\ndisk-tool run vda");
        let mut vmm = guest.run(&WATCH.replace("echo FAILS", &write).replace("disk-tool run vda", &again))?;
        vmm.wait_for_output("READY", BOOT_TIMEOUT)?;
        device.fail_from(8192)?;
        // The host would not read again what is in its page cache.
        drop_cache(&device)?;
        vmm.wait_for_output("FAILS", BOOT_TIMEOUT)?;
        vmm.wait_for_output("WRITE FAILS", BOOT_TIMEOUT)?;
        still_runs(&vmm)?;
        device.heal()?;
        vmm.wait_for_output("FLUSH STILL FAILS", BOOT_TIMEOUT)?;
        let fresh = disk(vmm.dir(), "fresh", 8)?;
        vmm.ready_client(TIMEOUT)?.patch("/drives/bad", &json!({"drive_id": "bad", "path_on_host": fresh}))?.ok()?;
        let output = output_of(&mut vmm, &["LOW WORKS", "VERIFIED vda", "VERIFIED vdb"])?;
        ensure!(output.contains("drive bad: a read failed"), "the log does not say so: {output}");
        ensure!(output.contains("its contents are unknown since a flush failed"), "the log does not say why: {output}");
        Ok(())
    }

    fn a_truncated_file_gives_errors_until_it_has_grown_again(transport) {
        let guest = DiskGuest::new(transport)?.tool(TOOL);
        let (bad, good) = (disk(guest.dir(), "bad", 8)?, disk(guest.dir(), "good", 8)?);
        let mut vmm = guest.drive(drive("bad", &bad)).drive(drive("good", &good)).run(WATCH)?;
        vmm.wait_for_output("READY", BOOT_TIMEOUT)?;
        File::options().write(true).open(&bad)?.set_len(4 * MIB)?;
        vmm.wait_for_output("FAILS", BOOT_TIMEOUT)?;
        still_runs(&vmm)?;
        File::options().write(true).open(&bad)?.set_len(8 * MIB)?;
        output_of(&mut vmm, &["LOW WORKS", "VERIFIED vda", "VERIFIED vdb"])?;
        Ok(())
    }

    /// Requests of both engines take 300 ms each. Meanwhile other disks make progress, and the
    /// microVM can be paused.
    fn a_slow_disk_delays_no_other_disk_and_no_pause(transport) {
        let mut guest = DiskGuest::new(transport)?.tool(TOOL);
        let mut devices = Vec::new();
        for engine in ["Sync", "Async"] {
            let device = MappedDevice::new(&disk(guest.dir(), engine, 64)?)?;
            guest = guest.drive(with(drive(engine, device.path()), &json!({"io_engine": engine})));
            devices.push(device);
        }
        let quick = disk(guest.dir(), "quick", 8)?;
        // Far apart, so that the host does not read ahead.
        let script = "\
            go() { i=0; while dd if=/dev/$1 of=/dev/null bs=512 skip=$((i * 7919 % 131072)) count=1 iflag=direct 2>/dev/null; do i=$((i+1)); echo $1 DID $i; done; }\n\
            echo READY; until [ $(cat /sys/block/vdc/size) = 32768 ]; do usleep 10000; done\n\
            go vda & go vdb & disk-tool rate vdc read 4096";
        let vmm = guest.drive(drive("quick", &quick)).run(script)?;
        vmm.wait_for_output("READY", BOOT_TIMEOUT)?;
        for device in &devices {
            device.slow_down(300)?;
            drop_cache(device)?;
        }
        let mut api = vmm.ready_client(TIMEOUT)?;
        let begin = disk(vmm.dir(), "begin", 16)?;
        api.patch("/drives/quick", &json!({"drive_id": "quick", "path_on_host": begin}))?.ok()?;
        for dev in ["vda", "vdb"] {
            let one = vmm.wait_for_line(&format!("{dev} DID 2"), BOOT_TIMEOUT)?.at;
            let other = vmm.wait_for_line(&format!("{dev} DID 7"), BOOT_TIMEOUT)?.at;
            ensure!(other - one >= Duration::from_millis(1500), "{dev} is not slow: 5 requests took {:?}", other - one);
            // What the fast disk did meanwhile.
            let lines = vmm.stdout.lines();
            let between = lines.iter().filter(|line| (one..other).contains(&line.at));
            let counts = between.filter_map(|line| line.text.split("RATE vdc ").nth(1)?.split(' ').next()?.parse().ok());
            let counts: Vec<u64> = counts.collect();
            let (first, last) = counts.first().zip(counts.last()).context("the quick disk did nothing")?;
            eprintln!("{dev}: 5 requests in {:?}, the quick disk had {} meanwhile", other - one, last - first);
            ensure!(last - first >= 200, "while {dev} had 5 requests, the quick disk had only {}", last - first);
        }
        let begun = Instant::now();
        api.patch("/vm", &json!({"state": "Paused"}))?.ok()?;
        api.patch("/vm", &json!({"state": "Resumed"}))?.ok()?;
        ensure!(begun.elapsed() < Duration::from_secs(5), "a pause took {:?}", begun.elapsed());
        for device in &devices {
            device.heal()?;
        }
        Ok(())
    }

    /// Sparse disks are larger than the file system below them: raw ones and overlays, with both
    /// engines.
    fn a_full_file_system_loses_no_completed_write_and_recovers(transport) {
        let mut guest = DiskGuest::new(transport)?.tool(TOOL);
        let small = SmallFs::new(8 * MIB)?;
        for engine in ["Sync", "Async"] {
            let fields = json!({"io_engine": engine, "cache_type": "Writeback"});
            let raw = disk(&small.path(), &format!("raw{engine}"), 16)?;
            let base = disk(guest.dir(), &format!("base{engine}"), 16)?;
            let overlay = json!({"overlay": {"path": small.path().join(format!("overlay{engine}"))}});
            guest = guest.drive(with(drive(&format!("raw{engine}"), &raw), &fields));
            guest = guest.drive(with(with(drive(&format!("overlay{engine}"), &base), &fields), &overlay));
        }
        guest = { let good = disk(guest.dir(), "good", 8)?; guest.drive(drive("good", &good)) };
        let script = "\
            disk-tool run vde 17 2 600 > /good & good=$!\n\
            for d in a b c d; do disk-tool run vd$d 17 2 1000000 > /log$d & eval tool$d=$!; done\n\
            for d in a b c d; do\n\
              eval wait \\$tool$d\n\
              grep -q 'FAILED.*write' /log$d && echo FULL vd$d\n\
              counts=$(for s in 0 1; do grep \"FAILED vd$d $s\" /log$d | cut -d ' ' -f 4; done)\n\
              # What was over is there, on the full file system, too.\n\
              disk-tool check vd$d 17 2 $counts\n\
            done\n\
            echo ALL FULL\n\
            until dd if=/dev/zero of=/dev/vda bs=1M count=16 oflag=direct 2>/dev/null; do usleep 10000; done\n\
            for d in a b c d; do\n\
              # The same streams once more, on disks that are blank again.\n\
              disk-tool zero vd$d 0 16777216 free && disk-tool run vd$d 17 2 200\n\
            done\n\
            wait $good; tail -n 1 /good\n\
            poweroff -f";
        let mut vmm = guest.run(script)?;
        vmm.wait_for_output("ALL FULL", BOOT_TIMEOUT)?;
        still_runs(&vmm)?;
        small.resize(64 * MIB)?;
        let mut marks = vec!["VERIFIED vde".to_owned()];
        for dev in ["vda", "vdb", "vdc", "vdd"] {
            marks.extend(["FULL", "CHECKED", "ZEROED", "VERIFIED"].map(|mark| format!("{mark} {dev}")));
        }
        output_of(&mut vmm, &marks.iter().map(String::as_str).collect::<Vec<_>>())?;
        Ok(())
    }
}

/// The kernel treats data that it failed to write as clean: with space again, the next sync
/// succeeds and the data is lost. No overlay may then claim to have it. Both engines, on ext4 on a
/// loop device on a full file system.
#[test]
fn an_overlay_never_trusts_data_lost_by_a_failed_flush() -> Result<()> {
    const SECTORS: u64 = 16 * MIB / 512;
    // Space for the file system and the headers of both overlays, but not for their data.
    let small = SmallFs::new(20 * MIB)?;
    let device = LoopDevice::new(&disk(&small.path(), "device", 96)?)?;
    let disks = MountedFs::ext4(device.path())?;
    let mut guest = DiskGuest::new(Transport::Mmio)?;
    let mut paths = Vec::new();
    for engine in ["Sync", "Async"] {
        let path = disks.path().join(engine);
        let base = disk(guest.dir(), &format!("base{engine}"), 16)?;
        let fields = json!({"io_engine": engine, "cache_type": "Writeback", "overlay": {"path": path}});
        guest = guest.drive(with(drive(engine, &base), &fields));
        paths.push(engine);
    }
    // Its size tells the guest that there is space.
    let go = disk(guest.dir(), "go", 1)?;
    guest = guest.drive(drive("go", &go));
    let script = "\
        tr '\\0' '\\252' < /dev/zero | head -c 16777216 > /data\n\
        flush() { dd if=/data of=/dev/$1 bs=1M conv=fsync 2>/dev/null; }\n\
        for d in vda vdb; do flush $d && echo WORKS $d; done\n\
        echo READY; until [ $(cat /sys/block/vdc/size) = 4096 ]; do usleep 10000; done\n\
        for d in vda vdb; do flush $d && echo WORKS $d; done\n\
        echo TRIED; poweroff -f";
    let mut vmm = guest.mem_mib(128).run(script)?;
    vmm.wait_for_output("READY", BOOT_TIMEOUT)?;
    small.resize(256 * MIB)?;
    let space = disk(vmm.dir(), "space", 2)?;
    vmm.ready_client(TIMEOUT)?
        .patch("/drives/go", &json!({"drive_id": "go", "path_on_host": space}))?
        .ok()?;
    let output = vesta_tests::disks::output_of(&mut vmm)?;
    ensure!(output.contains("TRIED") && !output.contains("WORKS"), "{output}");
    drop(vmm);
    // Drops the page cache, to read what is on the disk.
    drop(disks);
    let disks = MountedFs::ext4_as_it_is(device.path())?;
    for engine in paths {
        // An overlay whose header is not on the disk claims nothing.
        let Ok(overlay) = OverlayFile::open(&disks.path().join(engine)) else { continue };
        ensure!(!overlay.is_closed()?, "{engine}: it is closed");
        for sector in 0..SECTORS {
            ensure!(
                !overlay.is_durable(sector)? || overlay.bytes(sector, 512)? == [0o252; 512],
                "{engine}: its durable map has sector {sector}, which does not hold the data"
            );
        }
    }
    Ok(())
}

/// The guest writes more than the disk can write in the 10 seconds that a pause waits, then
/// flushes. The pause does not fail.
#[test]
fn pause_succeeds_during_a_flush_of_a_slow_disk() -> Result<()> {
    let slow = NullDevice::new(256, 12)?;
    let guest = DiskGuest::new(Transport::Mmio)?;
    let guest = guest.drive(with(drive("slow", slow.path()), &json!({"cache_type": "Writeback"})));
    let script = "\
        dd if=/dev/zero of=/dev/vda bs=1M count=160 oflag=direct 2>/dev/null && echo WRITTEN\n\
        dd if=/dev/zero of=/dev/vda bs=512 count=1 conv=fsync 2>/dev/null && echo FLUSHED\n\
        sleep 1000";
    let vmm = guest.run(script)?;
    vmm.wait_for_output("WRITTEN", BOOT_TIMEOUT)?;
    let mut api = vmm.ready_client(TIMEOUT)?;
    pause(&mut api)?;
    api.patch("/vm", &json!({"state": "Resumed"}))?.ok()?;
    vmm.wait_for_output("FLUSHED", BOOT_TIMEOUT).map(drop)
}

/// Drops a device from the host's page cache.
fn drop_cache(device: &MappedDevice) -> Result<()> {
    let status = Command::new("blockdev").arg("--flushbufs").arg(device.path()).status();
    ensure!(status.context("blockdev")?.success(), "blockdev failed");
    Ok(())
}
