//! Snapshots of Linux guests under load: they go on in other monitors as if nothing had happened, and their clones are told apart.

use std::collections::BTreeSet;
use std::fs;
use std::path::{Path, PathBuf};
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use anyhow::{Context, Result, ensure};
use serde_json::{Value, json};
use vesta_tests::disks::{DiskGuest, disk, drive, said, with};
use vesta_tests::guest::{BOOT, SOON, Transport};
use vesta_tests::on_each_transport;
use vesta_tests::process::Orphans;
use vesta_tests::said::{wait_for_text, word};
use vesta_tests::snapshots::{Files, copy, empty, go_on, pause};
use vesta_tests::vmm::Vmm;

const TOOL: &str = env!("CARGO_BIN_EXE_disk-tool");

/// Keeps the processors, the disks, the timers and the source of entropy busy until the disk vdc says stop. Each says that it goes
/// on, and WRONG where something is not as it was. The last word is LAST.
const LOAD: &str = r#"
going() { [ ! -e /stop ]; }
right=$(md5sum </bin/busybox)
( while going; do
    [ "$(md5sum </bin/busybox)" = "$right" ] || echo WRONG sum
    n=$((n+1)); echo SUM $n
  done ) &
( last=0; while going; do
    usleep 100000
    read up rest </proc/uptime; up=$(echo $up | tr -d .)
    [ $up -ge $last ] || echo WRONG time $up after $last
    last=$up; n=$((n+1)); echo TICK $n
  done ) &
( while going; do
    head -c 64 /dev/hwrng | md5sum >>/numbers
    echo NUMBER; usleep 100000
  done ) &
disk-tool until /stop vda 7 2 &
disk-tool until /stop vdb 8 2 &
until dd if=/dev/vdc bs=512 count=1 iflag=direct 2>/dev/null | grep -q stop; do usleep 200000; done
touch /stop
wait
[ $(sort /numbers | uniq -d | wc -l) = 0 ] || echo WRONG numbers
echo RANDOM $(head -c 16 /dev/urandom | hexdump -v -e '/1 "%02x"')
echo RESEEDED $(dmesg | grep -c 'crng reseeded due to virtual machine fork')
echo LAST
poweroff -f"#;

/// The disks of such a guest: a raw one, one with an overlay, and the one that tells it to stop.
struct Disks {
    raw: PathBuf,
    base: PathBuf,
    overlay: PathBuf,
    control: PathBuf,
}

impl Disks {
    fn new(dir: &Path) -> Result<Disks> {
        let control = dir.join("control");
        fs::write(&control, [0; 4096])?;
        let (raw, base) = (disk(dir, "raw", 4)?, disk(dir, "base", 4)?);
        Ok(Disks { raw, base, overlay: dir.join("overlay"), control })
    }

    /// A guest with them that is under load.
    fn guest(&self, transport: Transport, machine: &Value) -> Result<Vmm> {
        let raw = json!({"io_engine": "Sync", "cache_type": "Writeback"});
        let over = json!({"io_engine": "Async", "overlay": {"path": self.overlay}});
        DiskGuest::new(transport)?
            .tool(TOOL)
            .vcpus(2)
            .machine(machine.clone())
            .entropy(json!({}))
            .drive(with(drive("raw", &self.raw), &raw))
            .drive(with(drive("over", &self.base), &over))
            .drive(with(drive("control", &self.control), &json!({"is_read_only": true})))
            .run(LOAD)
    }

    /// Copies of what is written to, and where `/snapshot/load` is to find them.
    fn copies(&self, dir: &Path, name: &str) -> Result<(Disks, Value)> {
        let path = |what: &str| dir.join(format!("{what}-{name}"));
        let copies = Disks {
            raw: copy(&self.raw, &path("raw"))?,
            base: self.base.clone(),
            overlay: copy(&self.overlay, &path("overlay"))?,
            control: copy(&self.control, &path("control"))?,
        };
        let drives = json!([
            {"drive_id": "raw", "path_on_host": copies.raw},
            {"drive_id": "over", "overlay": {"path": copies.overlay}},
            {"drive_id": "control", "path_on_host": copies.control},
        ]);
        Ok((copies, drives))
    }

    /// Tells the guest to stop.
    fn stop(&self) -> Result<()> {
        let mut sector = [0; 4096];
        sector[..5].copy_from_slice(b"stop\n");
        Ok(fs::write(&self.control, sector)?)
    }
}

/// Waits until all that keeps the guest busy has gone on.
fn wait_for_progress(vmm: &Vmm) -> Result<()> {
    let from = vmm.stdout.len();
    for mark in ["SUM ", "TICK ", "NUMBER", "FLUSHED vda", "FLUSHED vdb"] {
        vmm.stdout.wait_for_after(from, mark, BOOT)?;
    }
    Ok(())
}

/// Lets the guest come to its end, where it must find all as it was. All that it said.
fn ends_well(mut vmm: Vmm, disks: &Disks) -> Result<String> {
    disks.stop()?;
    let said = said(&mut vmm)?;
    all_is_right(&said)?;
    Ok(said)
}

fn all_is_right(said: &str) -> Result<()> {
    for mark in ["VERIFIED vda", "VERIFIED vdb", "LAST"] {
        ensure!(said.contains(mark), "no {mark}: {said}");
    }
    for mark in ["WRONG", "FAILED", "Call Trace"] {
        ensure!(!said.contains(mark), "{mark}: {said}");
    }
    Ok(())
}

/// Saves the guest and ends its monitor, so that its disks stay as they were.
fn save_and_kill(vmm: Vmm, files: &Files, kind: &str) -> Result<()> {
    let mut api = vmm.ready_client(SOON)?;
    pause(&mut api)?;
    api.put("/snapshot/create", &files.create(kind))?.ok()?;
    drop(vmm);
    Ok(())
}

/// A guest under load is saved and goes on in a new monitor, three times. The first snapshot is loaded once more at the end, with
/// the disks as they were then.
fn three_generations(transport: Transport, kind: &str, tracked: bool) -> Result<()> {
    let home = tempfile::tempdir()?;
    let disks = Disks::new(home.path())?;
    let track = json!({"track_dirty_pages": tracked});
    let mut vmm = disks.guest(transport, &track)?;
    let mut first = None;
    for generation in 0..3 {
        wait_for_progress(&vmm)?;
        // A Diff goes onto the memory that is there, a Full one anew.
        let full = kind == "Full" || generation == 0;
        let mut files = Files::new(home.path(), &format!("generation{generation}"));
        if kind == "Diff" {
            files.memory = home.path().join("memory");
        }
        save_and_kill(vmm, &files, if full { "Full" } else { "Diff" })?;
        if first.is_none() {
            let (copies, drives) = disks.copies(home.path(), "first")?;
            let memory = copy(&files.memory, &home.path().join("memory-first"))?;
            first = Some((copies, drives, Files { memory, ..files.clone() }));
        }
        let (next, _api) = go_on(transport, &with(files.load(), &track))?;
        vmm = next;
    }
    wait_for_progress(&vmm)?;
    let said = ends_well(vmm, &disks)?;
    ensure!(word(&said, "RESEEDED")?.parse::<u32>()? == 3, "{said}");

    let (copies, drives, files) = first.context("there was a first generation")?;
    let (vmm, _api) = go_on(transport, &with(files.load(), &json!({"drives": drives})))?;
    let said = ends_well(vmm, &copies)?;
    ensure!(word(&said, "RESEEDED")?.parse::<u32>()? == 1, "{said}");
    Ok(())
}

on_each_transport! {
    fn a_guest_under_load_goes_on_through_three_full_snapshots(transport) {
        three_generations(transport, "Full", false)
    }

    fn a_guest_under_load_goes_on_through_three_diffs_of_tracked_pages(transport) {
        three_generations(transport, "Diff", true)
    }

    fn a_guest_under_load_goes_on_through_three_diffs_without_tracking(transport) {
        three_generations(transport, "Diff", false)
    }

    /// Two clones of one snapshot, on copies of its disks, and a fork of each: all have random numbers of their own, find their own
    /// data, and outlive the others.
    fn clones_and_their_forks_have_random_numbers_and_disks_of_their_own(transport) {
        let home = tempfile::tempdir()?;
        let disks = Disks::new(home.path())?;
        let vmm = disks.guest(transport, &json!({}))?;
        wait_for_progress(&vmm)?;
        let files = Files::new(home.path(), "a");
        save_and_kill(vmm, &files, "Full")?;

        let mut random = BTreeSet::new();
        let mut serials = Vec::new();
        let mut orphans = Vec::new();
        for name in ["one", "two"] {
            let (copies, drives) = disks.copies(home.path(), name)?;
            let (vmm, mut api) = go_on(transport, &with(files.load(), &json!({"drives": drives})))?;
            wait_for_progress(&vmm)?;
            let serial = home.path().join(format!("serial-{name}"));
            let child = json!({"id": format!("child-{name}"), "serial": {"serial_out_path": serial}});
            let reply = api.put("/fork", &json!({"children": [child]}))?.ok()?.json()?;
            orphans.push(Orphans::of_fork(&reply)?);
            serials.push(serial);
            if name == "one" {
                let said = ends_well(vmm, &copies)?;
                ensure!(word(&said, "RESEEDED")? == "1", "{said}");
                random.insert(word(&said, "RANDOM")?.to_owned());
            } else {
                // Its child has a life of its own.
                drop(vmm);
                copies.stop()?;
            }
        }
        for serial in &serials {
            let said = wait_for_text(serial, "LAST", BOOT)?;
            all_is_right(&said)?;
            ensure!(word(&said, "RESEEDED")? == "2", "{said}");
            random.insert(word(&said, "RANDOM")?.to_owned());
        }
        ensure!(random.len() == 3, "random numbers are repeated: {random:?}");
        orphans.into_iter().try_for_each(|child| child.wait(SOON))
    }

    fn a_disk_that_is_missing_at_a_load_is_named_and_the_next_try_works(transport) {
        let home = tempfile::tempdir()?;
        let disks = Disks::new(home.path())?;
        let vmm = disks.guest(transport, &json!({}))?;
        wait_for_progress(&vmm)?;
        let files = Files::new(home.path(), "a");
        save_and_kill(vmm, &files, "Full")?;
        let away = home.path().join("away");
        let (vmm, mut api) = empty(transport)?;
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
        ends_well(vmm, &disks)?;
        Ok(())
    }

    /// The clock of a guest that was saved a while ago goes on where it stood, or has caught up: as the load says.
    fn the_guests_clock_goes_on_or_catches_up(transport) {
        let home = tempfile::tempdir()?;
        let script = "while :; do echo DATE $(date +%s) END; usleep 100000; done";
        let vmm = DiskGuest::new(transport)?.run(script)?;
        let before = clock_behind(&vmm)?;
        let files = Files::new(home.path(), "a");
        save_and_kill(vmm, &files, "Full")?;
        // It is time itself that is wanted here.
        std::thread::sleep(AWAY);
        for (catches_up, lag) in [(false, AWAY.as_secs_f64()), (true, 0.0)] {
            let load = with(files.load(), &json!({"clock_realtime": catches_up}));
            let (vmm, _api) = go_on(transport, &load)?;
            let behind = clock_behind(&vmm)? - before;
            let right = if catches_up { (-3.0..3.0).contains(&behind) } else { behind > lag - 2.0 };
            ensure!(right, "clock_realtime {catches_up}: it is {behind} s behind after {lag} s");
        }
        Ok(())
    }
}

/// How long a guest is not there.
const AWAY: Duration = Duration::from_secs(8);

/// How far the guest's clock is behind the host's, in seconds, when it next says.
fn clock_behind(vmm: &Vmm) -> Result<f64> {
    let line = vmm.stdout.wait_for_after(vmm.stdout.len(), "END", BOOT)?;
    let said: f64 = word(&line.text, "DATE ")?.trim_end_matches("END").trim().parse()?;
    Ok(SystemTime::now().duration_since(UNIX_EPOCH)?.as_secs_f64() - said)
}

#[test]
fn a_snapshot_is_loaded_on_the_transport_that_it_was_saved_on_whatever_the_process_was_told() -> Result<()> {
    let home = tempfile::tempdir()?;
    let vmm = DiskGuest::new(Transport::Pci)?
        .entropy(json!({}))
        .run("n=0; while :; do n=$((n+1)); echo TICK $n; usleep 100000; done")?;
    vmm.wait_for_output("TICK", BOOT)?;
    let files = Files::new(home.path(), "a");
    save_and_kill(vmm, &files, "Full")?;
    for transport in [Transport::Mmio, Transport::Pci] {
        let (vmm, _api) = go_on(transport, &files.load())?;
        vmm.wait_for_output("TICK", BOOT)?;
    }
    Ok(())
}
