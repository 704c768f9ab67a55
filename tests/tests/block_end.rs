//! However a monitor ends, its overlays have all writes that it acknowledged. After an orderly end
//! they are closed, so the data is also safe from a crash of the host.

use std::path::{Path, PathBuf};

use anyhow::{Context, Result, ensure};
use rustix::process::{Pid, Signal, kill_process};
use serde_json::json;
use vesta_tests::disks::{DiskGuest, MIB, OverlayFile, bytes_at, disk, drive, output_of, space_of, with};
use vesta_tests::guest::{BOOT_TIMEOUT, TIMEOUT, Transport, vmm_path};
use vesta_tests::on_each_transport;
use vesta_tests::process::Orphans;
use vesta_tests::serial_file::wait_for_text;
use vesta_tests::vmm::{Vmm, VmmBuilder};

/// The number of sectors that the guest writes, and the distance between them. Each has its own
/// page of the overlay's map.
const PLACES: u64 = 40;
const APART: u64 = 32768;

/// Writes all those sectors of both disks at once with `O_DIRECT`, and flushes nothing.
const WRITE: &str = "yes vesta | head -c 4096 > /x\n\
    for d in a b; do i=0; while [ $i -lt 40 ]; do\n\
      dd if=/x of=/dev/vd$d bs=4096 count=1 seek=$((i * 4096)) conv=notrunc oflag=direct 2>/dev/null || echo FAILED &\n\
      i=$((i + 1))\n\
    done; done; wait; echo WRITTEN";

/// A guest with two overlays: one with `cache_type` Unsafe, the default, and one with Writeback.
fn guest(transport: Transport, home: &Path) -> Result<(DiskGuest, [PathBuf; 2])> {
    let mut guest = DiskGuest::new(transport)?;
    let overlays = ["Unsafe", "Writeback"].map(|cache_type| home.join(format!("{cache_type}.overlay")));
    for (cache_type, overlay) in ["Unsafe", "Writeback"].into_iter().zip(&overlays) {
        let base = home.join(cache_type);
        if !base.exists() {
            disk(home, cache_type, PLACES * APART / 2048)?;
        }
        let fields = json!({"cache_type": cache_type, "overlay": {"path": overlay}});
        guest = guest.drive(with(drive(cache_type, &base), &fields));
    }
    Ok((guest, overlays))
}

fn check_all_is_there(overlays: &[PathBuf; 2]) -> Result<()> {
    for path in overlays {
        let overlay = OverlayFile::open(path)?;
        for place in 0..PLACES {
            ensure!(overlay.holds(place * APART)?, "{}: place {place} is not in the map", path.display());
            let bytes = overlay.bytes(place * APART, 12)?;
            ensure!(bytes == *b"vesta\nvesta\n", "{}: place {place} has {bytes:?}", path.display());
        }
    }
    Ok(())
}

fn check_closed(overlays: &[PathBuf; 2]) -> Result<()> {
    for path in overlays {
        ensure!(OverlayFile::open(path)?.is_closed()?, "{} is not closed", path.display());
        check_exported(path)?;
    }
    check_all_is_there(overlays)
}

/// Checks that `vesta-vmm overlay` finds the overlay valid and exports the disk with all that the
/// guest has written.
fn check_exported(overlay: &Path) -> Result<()> {
    let tool = |args: &[&str]| -> Result<String> {
        let mut builder = VmmBuilder::new(&vmm_path())?.quiet().arg("overlay").arg(args[0]);
        builder = builder.arg(overlay.to_str().context("a path that is text")?);
        let (code, output) = args[1..].iter().fold(builder, VmmBuilder::arg).spawn()?.finish(TIMEOUT)?;
        ensure!(code == 0, "overlay {args:?}: {code} {output}");
        Ok(output)
    };
    let info = tool(&["info", "--json"])?;
    ensure!(info.contains("\"state\": \"Closed\""), "{info}");
    let base = overlay.with_extension("");
    let base = base.to_str().context("a path that is text")?;
    let checked = tool(&["check", "--base", base])?;
    ensure!(checked.contains("closed: complete on any host") && checked.contains("it fits"), "{checked}");
    for format in ["raw", "qcow2"] {
        let image = overlay.with_extension(format);
        let out = image.to_str().context("a path that is text")?;
        tool(&["export", "--base", base, "--format", format, "--out", out])?;
        if format == "raw" {
            for place in 0..PLACES {
                let bytes = bytes_at(&image, place * APART * 512, 12)?;
                ensure!(bytes == *b"vesta\nvesta\n", "{out}: place {place} has {bytes:?}");
            }
            ensure!(std::fs::metadata(&image)?.len() == PLACES * APART * 512, "{out} has another size");
        }
        ensure!(space_of(&image)? < 64 * MIB, "{out} is not sparse");
        std::fs::remove_file(&image)?;
    }
    Ok(())
}

/// A guest that has written and is now idle.
fn written(transport: Transport, home: &Path) -> Result<(Vmm, [PathBuf; 2])> {
    let (guest, overlays) = guest(transport, home)?;
    let vmm = guest.run(&format!("{WRITE}\nwhile :; do sleep 1; done"))?;
    let output = vmm.wait_for_output("WRITTEN", BOOT_TIMEOUT)?;
    ensure!(!output.contains("FAILED"), "{output}");
    Ok((vmm, overlays))
}

on_each_transport! {
    fn overlays_are_closed_when_the_guest_ends(transport) {
        for end in ["poweroff -f", "reboot -f"] {
            let home = tempfile::tempdir()?;
            let (guest, overlays) = guest(transport, home.path())?;
            let output = output_of(&mut guest.run(&format!("{WRITE}\n{end}"))?)?;
            ensure!(output.contains("WRITTEN") && !output.contains("FAILED"), "{output}");
            check_closed(&overlays)?;
        }
        Ok(())
    }

    fn sigterm_closes_overlays_of_running_and_paused_guests(transport) {
        for (signal, paused) in [(Signal::TERM, false), (Signal::HUP, false), (Signal::TERM, true)] {
            let home = tempfile::tempdir()?;
            let (mut vmm, overlays) = written(transport, home.path())?;
            if paused {
                vmm.ready_client(TIMEOUT)?.patch("/vm", &json!({"state": "Paused"}))?.ok()?;
            }
            vmm.signal(signal)?;
            vmm.exit_status(TIMEOUT)?;
            check_closed(&overlays)?;
        }
        Ok(())
    }

    fn overlay_keeps_acknowledged_writes_after_sigkill(transport) {
        let home = tempfile::tempdir()?;
        let (mut vmm, overlays) = written(transport, home.path())?;
        vmm.signal(Signal::KILL)?;
        vmm.exit_status(TIMEOUT)?;
        for path in &overlays {
            ensure!(!OverlayFile::open(path)?.is_closed()?, "{} was not closed", path.display());
        }
        check_all_is_there(&overlays)
    }

    /// The child's overlays have its parent's as layers. It writes to them until it is told to end.
    fn overlays_of_a_forked_child_are_closed_when_it_ends(transport) {
        let home = tempfile::tempdir()?;
        let (guest, _) = guest(transport, home.path())?;
        let write = "dd if=/x of=/dev/vd$d bs=4096 count=1 seek=1 conv=notrunc oflag=direct 2>/dev/null";
        let script = format!("{WRITE}\nwhile :; do for d in a b; do {write} || echo FAILED; done; echo AGAIN; done");
        let vmm = guest.run(&script)?;
        vmm.wait_for_output("AGAIN", BOOT_TIMEOUT)?;
        let serial = home.path().join("serial");
        let overlays = ["a", "b"].map(|name| home.path().join(format!("child.{name}")));
        let drives: Vec<_> = ["Unsafe", "Writeback"]
            .iter()
            .zip(&overlays)
            .map(|(id, path)| json!({"drive_id": id, "overlay": path}))
            .collect();
        let child = json!({"id": "child", "serial": {"serial_out_path": serial}, "drives": drives});
        let reply = vmm.ready_client(TIMEOUT)?.put("/fork", &json!({"children": [child]}))?.ok()?.json()?;
        let alive = Orphans::of_fork(&reply)?;
        let pid = reply["children"][0]["pid"].as_u64().and_then(|pid| Pid::from_raw(i32::try_from(pid).ok()?));
        let pid = pid.context("the child's pid")?;
        // Two lines, so that it has written to both since the fork.
        let output = wait_for_text(&serial, "AGAIN\r\nAGAIN", BOOT_TIMEOUT)?;
        ensure!(!output.contains("FAILED"), "{output}");
        kill_process(pid, Signal::TERM)?;
        alive.wait(TIMEOUT)?;
        for path in &overlays {
            let overlay = OverlayFile::open(path)?;
            ensure!(overlay.is_closed()? && overlay.holds(8)?, "{}", path.display());
        }
        Ok(())
    }
}
