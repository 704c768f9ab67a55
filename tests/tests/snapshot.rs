//! Snapshots of Linux guests: their clones differ, their clocks continue, and errors of loads name
//! the cause.

use std::collections::BTreeSet;
use std::fs;
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use anyhow::{Result, ensure};
use serde_json::json;
use vesta_tests::busy::{Disks, check_output, finish_and_check, save_and_kill, wait_for_progress};
use vesta_tests::disks::{DiskGuest, with};
use vesta_tests::guest::{BOOT_TIMEOUT, TIMEOUT, Transport};
use vesta_tests::on_each_transport;
use vesta_tests::process::Orphans;
use vesta_tests::serial_file::{wait_for_text, word};
use vesta_tests::snapshots::{Files, restore, unconfigured};
use vesta_tests::vmm::Vmm;

const TOOL: &str = env!("CARGO_BIN_EXE_disk-tool");
const CLOCKS: &str = env!("CARGO_BIN_EXE_clock-tool");

on_each_transport! {
    /// Two clones of one snapshot, on copies of its disks, and a fork of each: all have their own
    /// random numbers, find their own data, and outlive the others.
    fn clones_and_their_forks_have_own_random_numbers_and_disks(transport) {
        let home = tempfile::tempdir()?;
        let disks = Disks::new(home.path())?;
        let vmm = disks.guest(transport, TOOL, &json!({}))?;
        wait_for_progress(&vmm)?;
        let files = Files::new(home.path(), "a");
        save_and_kill(vmm, &files, "Full")?;

        let mut random = BTreeSet::new();
        let mut serials = Vec::new();
        let mut orphans = Vec::new();
        for name in ["one", "two"] {
            let (copies, drives) = disks.copies(home.path(), name)?;
            let (vmm, mut api) = restore(transport, &with(files.load(), &json!({"drives": drives})))?;
            wait_for_progress(&vmm)?;
            let serial = home.path().join(format!("serial-{name}"));
            let child = json!({"id": format!("child-{name}"), "serial": {"serial_out_path": serial}});
            let reply = api.put("/fork", &json!({"children": [child]}))?.ok()?.json()?;
            orphans.push(Orphans::of_fork(&reply)?);
            serials.push(serial);
            if name == "one" {
                let output = finish_and_check(vmm, &copies)?;
                ensure!(word(&output, "RESEEDED")? == "1", "{output}");
                random.insert(word(&output, "RANDOM")?.to_owned());
            } else {
                // Its child outlives it.
                drop(vmm);
                copies.stop()?;
            }
        }
        for serial in &serials {
            let output = wait_for_text(serial, "LAST", BOOT_TIMEOUT)?;
            check_output(&output)?;
            ensure!(word(&output, "RESEEDED")? == "2", "{output}");
            random.insert(word(&output, "RANDOM")?.to_owned());
        }
        ensure!(random.len() == 3, "random numbers are repeated: {random:?}");
        orphans.into_iter().try_for_each(|child| child.wait(TIMEOUT))
    }

    fn a_missing_disk_is_named_by_a_load_that_can_be_retried(transport) {
        let home = tempfile::tempdir()?;
        let disks = Disks::new(home.path())?;
        let vmm = disks.guest(transport, TOOL, &json!({}))?;
        wait_for_progress(&vmm)?;
        let files = Files::new(home.path(), "a");
        save_and_kill(vmm, &files, "Full")?;
        let away = home.path().join("away");
        let (vmm, mut api) = unconfigured(transport)?;
        for path in [&disks.raw, &disks.base, &disks.overlay, &disks.control] {
            fs::rename(path, &away)?;
            let refused = api.put("/snapshot/load", &files.load())?;
            ensure!(
                refused.status == 400 && refused.fault().contains(&path.display().to_string()),
                "{}: {refused:?}",
                path.display()
            );
            ensure!(!path.exists(), "{} was made", path.display());
            fs::rename(&away, path)?;
        }
        api.put("/snapshot/load", &files.load())?.ok()?;
        finish_and_check(vmm, &disks)?;
        Ok(())
    }

    /// The clock of a guest that was saved a while ago continues from its old time or has caught
    /// up, as the load requests. Its vCPUs agree on the time all along, also in a fork's child.
    fn the_guest_clock_continues_or_catches_up(transport) {
        let home = tempfile::tempdir()?;
        let script = "clock-tool & while :; do echo DATE $(date +%s) END; usleep 100000; done";
        let vmm = DiskGuest::new(transport)?.program("clock-tool", CLOCKS).vcpus(4).run(script)?;
        let before = clock_behind(&vmm)?;
        vmm.wait_for_output("HOPPED", BOOT_TIMEOUT)?;
        let files = Files::new(home.path(), "a");
        save_and_kill(vmm, &files, "Full")?;
        // Real time has to pass.
        std::thread::sleep(AWAY);
        for (catches_up, lag) in [(false, AWAY.as_secs_f64()), (true, 0.0)] {
            let load = with(files.load(), &json!({"clock_realtime": catches_up}));
            let (vmm, mut api) = restore(transport, &load)?;
            let behind = clock_behind(&vmm)? - before;
            let right = if catches_up { (-3.0..3.0).contains(&behind) } else { behind > lag - 2.0 };
            ensure!(right, "clock_realtime {catches_up}: it is {behind} s behind after {lag} s");
            vmm.stdout.wait_for_after(vmm.stdout.len(), "HOPPED", BOOT_TIMEOUT)?;
            let serial = home.path().join(format!("serial-{catches_up}"));
            let child = json!({"id": "child", "serial": {"serial_out_path": serial}});
            let reply = api.put("/fork", &json!({"children": [child]}))?.ok()?.json()?;
            let child = Orphans::of_fork(&reply)?;
            let output = wait_for_text(&serial, "HOPPED", BOOT_TIMEOUT)? + &vmm.stdout.text();
            ensure!(!output.contains("WRONG"), "clock_realtime {catches_up}: {output}");
            drop(child);
        }
        Ok(())
    }
}

/// How long the guest does not exist.
const AWAY: Duration = Duration::from_secs(8);

/// How far the guest's clock is behind the host's, in seconds, at its next line.
fn clock_behind(vmm: &Vmm) -> Result<f64> {
    let next = || vmm.stdout.wait_for_after(vmm.stdout.len(), "END", BOOT_TIMEOUT);
    let mut line = next()?;
    // A restored guest first prints the rest of the line that it was printing when it was saved.
    if !line.text.contains("DATE ") {
        line = next()?;
    }
    let output: f64 = word(&line.text, "DATE ")?.trim_end_matches("END").trim().parse()?;
    Ok(SystemTime::now().duration_since(UNIX_EPOCH)?.as_secs_f64() - output)
}

#[test]
fn a_snapshot_keeps_the_transport_that_it_was_saved_with() -> Result<()> {
    let home = tempfile::tempdir()?;
    let vmm = DiskGuest::new(Transport::Pci)?
        .entropy(json!({}))
        .run("n=0; while :; do n=$((n+1)); echo TICK $n; usleep 100000; done")?;
    vmm.wait_for_output("TICK", BOOT_TIMEOUT)?;
    let files = Files::new(home.path(), "a");
    save_and_kill(vmm, &files, "Full")?;
    for transport in [Transport::Mmio, Transport::Pci] {
        let (vmm, _api) = restore(transport, &files.load())?;
        vmm.wait_for_output("TICK", BOOT_TIMEOUT)?;
    }
    Ok(())
}
