//! Data on disks survives events in the device, the driver and the monitor.

use std::path::Path;

use anyhow::{Context, Result, ensure};
use serde_json::{Value, json};
use vesta_tests::api::ApiClient;
use vesta_tests::disks::{DiskGuest, check_file, disk, drive, flushed, output_of, with};
use vesta_tests::guest::{BOOT_TIMEOUT, TIMEOUT, Transport};
use vesta_tests::on_each_transport;
use vesta_tests::vmm::Vmm;

const TOOL: &str = env!("CARGO_BIN_EXE_disk-tool");

/// How many streams write to each disk at once.
const WRITERS: usize = 2;

/// Four disks: raw and overlay, each through both engines. All of them support flushes.
fn four_disks(dir: &Path, mib: u64) -> Result<Vec<Value>> {
    let mut drives = Vec::new();
    for engine in ["Sync", "Async"] {
        let fields = json!({"io_engine": engine, "cache_type": "Writeback"});
        let raw = disk(dir, &format!("raw-{engine}"), mib)?;
        drives.push(with(drive(&format!("raw{engine}"), &raw), &fields));
        let base = disk(dir, &format!("base-{engine}"), mib)?;
        let overlaid = with(drive(&format!("overlay{engine}"), &base), &fields);
        let overlay = dir.join(format!("overlay-{engine}"));
        drives.push(with(overlaid, &json!({"overlay": {"path": overlay}})));
    }
    Ok(drives)
}

/// Waits until `vmm` prints another line with `mark`. False if it has printed all of `ends`
/// instead.
fn says_more(vmm: &Vmm, mark: &str, from: &mut usize, ends: &[String]) -> Result<bool> {
    loop {
        let text = vmm.stdout.text();
        if ends.iter().all(|end| text.contains(end)) {
            return Ok(false);
        }
        ensure!(!text.contains("WRONG") && !text.contains("FAILED"), "{text}");
        if text.get(*from..).is_some_and(|more| more.contains(mark)) {
            *from = text.len();
            return Ok(true);
        }
        vmm.stdout.wait_for_more_than(text.len(), BOOT_TIMEOUT)?;
    }
}

fn patch(api: &mut ApiClient, path: &str, body: &Value) -> Result<()> {
    api.patch(path, body)?.ok().with_context(|| format!("PATCH {path} {body}")).map(drop)
}

on_each_transport! {
    /// The host pauses the guest, changes limits and patches paths of the same disks all the while.
    fn writes_are_read_back_across_pauses_and_disk_patches(transport) {
        let mut guest = DiskGuest::new(transport)?.tool(TOOL).vcpus(2);
        for fields in four_disks(guest.dir(), 4)? {
            guest = guest.drive(fields);
        }
        for engine in ["Sync", "Async"] {
            std::fs::hard_link(guest.dir().join(format!("raw-{engine}")), guest.dir().join(format!("again-{engine}")))?;
        }
        let script = "for d in a b c d; do disk-tool run vd$d 17 2 400 & done; wait; poweroff -f";
        let mut vmm = guest.run(script)?;
        let mut api = vmm.ready_client(TIMEOUT)?;
        let ends = ["vda", "vdb", "vdc", "vdd"].map(|dev| format!("VERIFIED {dev}"));
        let (mut from, mut round) = (0, 0);
        while says_more(&vmm, "FLUSHED", &mut from, &ends)? {
            let engine = ["Sync", "Async"][round / 2 % 2];
            let name = ["again", "raw"][round / 4 % 2];
            let path = vmm.dir().join(format!("{name}-{engine}"));
            let (raw, overlay) = (format!("raw{engine}"), format!("overlay{engine}"));
            let limit = json!({"size": 1 << 20, "refill_time": 500});
            let (limits, none) = (json!({"bandwidth": limit}), json!({"bandwidth": {"size": 0, "refill_time": 0}}));
            // The guest may end first, and the monitor with it.
            let changed = match round % 2 {
                0 => patch(&mut api, "/vm", &json!({"state": "Paused"}))
                    .and_then(|()| patch(&mut api, &format!("/drives/{raw}"), &json!({"drive_id": raw, "path_on_host": path})))
                    .and_then(|()| patch(&mut api, "/vm", &json!({"state": "Resumed"}))),
                _ => patch(&mut api, &format!("/drives/{raw}"), &json!({"drive_id": raw, "path_on_host": path, "rate_limiter": limits}))
                    .and_then(|()| patch(&mut api, &format!("/drives/{overlay}"), &json!({"drive_id": overlay, "rate_limiter": limits})))
                    .and_then(|()| patch(&mut api, &format!("/drives/{raw}"), &json!({"drive_id": raw, "rate_limiter": none})))
                    .and_then(|()| patch(&mut api, &format!("/drives/{overlay}"), &json!({"drive_id": overlay, "rate_limiter": none}))),
            };
            if let Err(error) = changed {
                ensure!(ends.iter().all(|end| vmm.stdout.text().contains(end)), "{error:#}");
            }
            round += 1;
        }
        let output = output_of(&mut vmm)?;
        eprintln!("{round} rounds of changes");
        ensure!(round >= 8, "there were only {round} rounds of changes: the writes were too few");
        ensure!(!output.contains("WRONG"), "{output}");
        for name in ["raw-Sync", "raw-Async"] {
            check_file(&vmm.dir().join(name), 17, &[400; WRITERS])?;
        }
        Ok(())
    }

    /// The driver is unbound during writes, and bound again: the same disk has all acknowledged
    /// writes.
    fn writes_survive_a_driver_unbind_and_rebind(transport) {
        let mut guest = DiskGuest::new(transport)?.tool(TOOL);
        for fields in four_disks(guest.dir(), 4)? {
            guest = guest.drive(fields);
        }
        let script = "\
            for d in a b c d; do\n\
              id=$(basename $(readlink /sys/block/vd$d/device))\n\
              disk-tool run vd$d 17 2 1000000 > /log$d & tool=$!\n\
              until [ \"$(grep -c FLUSHED /log$d)\" -ge 4 ]; do usleep 20000; done\n\
              echo $id > /sys/bus/virtio/drivers/virtio_blk/unbind\n\
              wait $tool; grep -v FLUSHED /log$d\n\
              grep -q 'FAILED.*write\\|FAILED.*read\\|FAILED.*flush' /log$d && echo FELL vd$d\n\
              echo $id > /sys/bus/virtio/drivers/virtio_blk/bind\n\
              # What was over when the first of them failed, of each stream.\n\
              counts=$(for s in 0 1; do grep \"FAILED vd$d $s\" /log$d | cut -d ' ' -f 4; done)\n\
              disk-tool check vd$d 17 2 $counts && echo AGAIN vd$d $counts\n\
            done\n\
            poweroff -f";
        let mut vmm = guest.run(script)?;
        let output = output_of(&mut vmm)?;
        for dev in ["vda", "vdb", "vdc", "vdd"] {
            for mark in ["FELL", "CHECKED", "AGAIN"] {
                ensure!(output.contains(&format!("{mark} {dev}")), "no {mark} {dev}: {output}");
            }
        }
        ensure!(!output.contains("WRONG"), "{output}");
        Ok(())
    }

    /// A program in the guest resets the device without its driver, during I/O.
    fn flushed_writes_survive_an_unexpected_device_reset(transport) {
        let guest = DiskGuest::new(transport)?.tool(TOOL);
        let writeback = json!({"cache_type": "Writeback"});
        let (first, second) = (disk(guest.dir(), "first", 4)?, disk(guest.dir(), "second", 4)?);
        let guest = guest.drive(with(drive("first", &first), &writeback)).drive(with(drive("second", &second), &writeback));
        // The address of the device's status register.
        let status = match transport {
            Transport::Mmio => "$((0x$(grep -i 'virtio-mmio\\|LNRO0005' /proc/iomem | head -n 1 | sed 's/^ *//;s/-.*//') + 0x70))",
            Transport::Pci => "$(( $(grep -m 1 '^0x[0-9a-f]*[1-9a-f]' $(readlink -f /sys/block/vda/device)/../resource | cut -d ' ' -f 1) + 0x14 ))",
        };
        let width = if transport == Transport::Mmio { 32 } else { 8 };
        let script = format!("\
            disk-tool run vda 17 2 1000000 &\n\
            disk-tool run vdb 17 2 200 > /log & second=$!\n\
            until grep -q FLUSHED /log; do usleep 20000; done\n\
            echo RESETTING $(printf %x {status})\n\
            devmem {status} {width} 0\n\
            echo RESET $(printf %x $(devmem {status} {width}))\n\
            wait $second; cat /log; echo ENDED\n\
            while :; do sleep 1; done");
        let vmm = guest.run(&script)?;
        vmm.wait_for_output("FLUSHED vda 1", BOOT_TIMEOUT)?;
        vmm.wait_for_output("RESET 0", BOOT_TIMEOUT)?;
        vmm.wait_for_output("ENDED", BOOT_TIMEOUT)?;
        let output = vmm.stdout.text();
        ensure!(output.contains("VERIFIED vdb"), "{output}");
        check_file(&first, 17, &flushed(&output, "vda", WRITERS))?;
        ensure!(vmm.ready_client(TIMEOUT)?.get("/")?.json()?["state"] == "Running", "the machine does not run");
        Ok(())
    }

    /// After `kill -9`, raw disks and overlays with both engines have all flushed data; later
    /// writes are old or new.
    fn flushed_writes_survive_a_killed_monitor(transport) {
        let keep = tempfile::tempdir()?;
        let drives = four_disks(keep.path(), 4)?;
        let boot = |script: &str| {
            drives.iter().cloned().fold(DiskGuest::new(transport)?.tool(TOOL).vcpus(2), DiskGuest::drive).run(script)
        };
        let vmm = boot("for d in a b c d; do disk-tool run vd$d 17 2 1000000 & done; wait")?;
        for dev in ["vda", "vdb", "vdc", "vdd"] {
            vmm.wait_for_output(&format!("FLUSHED {dev} 1 160"), BOOT_TIMEOUT)?;
        }
        let stdout = vmm.stdout.clone();
        // SIGKILL.
        drop(vmm);
        let output = stdout.wait_for_end(TIMEOUT)?;
        ensure!(!output.contains("WRONG") && !output.contains("FAILED"), "{output}");
        let counts = |dev| flushed(&output, dev, WRITERS);
        check_file(&keep.path().join("raw-Sync"), 17, &counts("vda"))?;
        check_file(&keep.path().join("raw-Async"), 17, &counts("vdc"))?;
        let checks = ["vda", "vdb", "vdc", "vdd"].map(|dev| {
            let counts: Vec<_> = counts(dev).iter().map(u64::to_string).collect();
            format!("disk-tool check {dev} 17 {WRITERS} {}", counts.join(" "))
        });
        let mut again = boot(&format!("{}\npoweroff -f", checks.join("\n")))?;
        let output = vesta_tests::disks::output_of(&mut again)?;
        for dev in ["vda", "vdb", "vdc", "vdd"] {
            ensure!(output.contains(&format!("CHECKED {dev}")), "{dev}: {output}");
        }
        Ok(())
    }
}
