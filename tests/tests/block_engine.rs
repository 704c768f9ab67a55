//! The I/O engine of a drive, as configured and as the host's kernel supports it.

use anyhow::{Result, ensure};
use serde_json::json;
use vesta_tests::disks::{DiskGuest, check_file, disk, drive, output_of, with};
use vesta_tests::guest::{TIMEOUT, Transport, vmm_path};
use vesta_tests::on_each_transport;
use vesta_tests::vmm::VmmBuilder;

const TOOL: &str = env!("CARGO_BIN_EXE_disk-tool");

on_each_transport! {
    /// Raw, overlaid and read-only drives without `io_engine`.
    fn drives_work_without_io_uring_and_the_log_says_how(transport) {
        let guest = DiskGuest::new(transport)?.tool(TOOL).without_io_uring();
        let (raw, base) = (disk(guest.dir(), "raw", 4)?, disk(guest.dir(), "base", 4)?);
        let read_only = disk(guest.dir(), "ro", 1)?;
        let writeback = json!({"cache_type": "Writeback"});
        let overlay = json!({"overlay": {"path": guest.dir().join("overlay")}});
        let guest = guest
            .drive(with(drive("raw", &raw), &writeback))
            .drive(with(with(drive("overlaid", &base), &writeback), &overlay))
            .drive(with(drive("ro", &read_only), &json!({"is_read_only": true})));
        let script = "\
            for d in a b; do disk-tool run vd$d 17 2 100 & done; wait\n\
            echo ZEROS $(dd if=/dev/vdc bs=64k iflag=direct 2>/dev/null | wc -c)\n\
            poweroff -f";
        let mut vmm = guest.run(script)?;
        let output = output_of(&mut vmm)?;
        for mark in ["VERIFIED vda", "VERIFIED vdb", "ZEROS 1048576", "io_engine Sync: io_uring is not available"] {
            ensure!(output.contains(mark), "no {mark:?}: {output}");
        }
        check_file(&raw, 17, &[100; 2])
    }
}

#[test]
fn io_engine_async_is_refused_without_io_uring() -> Result<()> {
    let builder = VmmBuilder::new(&vmm_path())?.with_api().without_io_uring();
    let vmm = builder.spawn()?;
    let mut api = vmm.ready_client(TIMEOUT)?;
    let path = disk(vmm.dir(), "disk", 1)?;
    let wanted = |engine| with(drive("scratch", &path), &json!({"io_engine": engine}));
    for put_before in [false, true] {
        let refused = api.put("/drives/scratch", &wanted("Async"))?;
        ensure!(refused.status == 400, "{refused:?}");
        for part in ["drive scratch", "io_engine Async", "io_uring is not available"] {
            ensure!(refused.fault().contains(part), "no {part:?} in {refused:?}");
        }
        let drives = api.get("/vm/config")?.json()?["drives"].clone();
        let left = if put_before { json!([wanted("Sync")]) } else { json!([]) };
        ensure!(drives.as_array().map(Vec::len) == left.as_array().map(Vec::len), "{drives}");
        ensure!(drives[0]["io_engine"] == left[0]["io_engine"], "{drives}");
        api.put("/drives/scratch", &wanted("Sync"))?.ok()?;
    }
    // In a configuration file it ends the monitor before the guest starts.
    let guest = DiskGuest::new(Transport::Mmio)?.without_io_uring();
    let mut vmm = guest.drive(wanted("Async")).run("echo BEGUN; poweroff -f")?;
    let (code, output) = vmm.finish(TIMEOUT)?;
    ensure!(code != 0 && !output.contains("BEGUN"), "it ended with {code}: {output}");
    ensure!(output.contains("drive scratch: io_engine Async: io_uring is not available"), "{output}");
    Ok(())
}
