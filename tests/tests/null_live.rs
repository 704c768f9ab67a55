//! Live snapshots of guests of a few instructions: their disks, cancellation, and invalid requests.

use std::fs::{self, File};
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result, ensure};
use serde_json::{Value, json};
use vesta_tests::api::ApiClient;
use vesta_tests::counting::{counting_with, filled, is_consecutive, restored, wait_for_bytes};
use vesta_tests::disks::{disk, drive, with};
use vesta_tests::guest::Transport;
use vesta_tests::host_devices::SmallFs;
use vesta_tests::snapshots::{Files, pause, save_live, unconfigured, wait_for_live_snapshot};
use vesta_tests::vmm::Vmm;

fn live(files: &Files, kind: &str) -> Value {
    let mut create = files.create(kind);
    create["live"] = json!(true);
    create
}

/// Restores a snapshot in a new monitor, and checks that its guest counts.
fn restore(load: &Value) -> Result<(Vmm, ApiClient)> {
    let (vmm, api, serial) = restored(load)?;
    ensure!(is_consecutive(&wait_for_bytes(&serial, 10)?));
    Ok((vmm, api))
}

/// The overlay of the first drive: its file and its layers.
fn overlay(api: &mut ApiClient) -> Result<(PathBuf, Vec<PathBuf>)> {
    let config = api.get("/vm/config")?.ok()?.json()?;
    let overlay = &config["drives"][0]["overlay"];
    let path = |path: &Value| path.as_str().map(PathBuf::from);
    let layers = overlay["layers"].as_array().into_iter().flatten().filter_map(path).collect();
    Ok((path(&overlay["path"]).with_context(|| format!("an overlay in {config}"))?, layers))
}

/// As if a guest that has ended had written the first sectors: their bits in the overlay's first
/// map.
fn write_to(overlay: &Path) -> Result<()> {
    Ok(File::options().write(true).open(overlay)?.write_all_at(&[0xff], 8192)?)
}

#[test]
fn each_load_of_a_live_snapshot_gets_its_own_overlay() -> Result<()> {
    let home = tempfile::tempdir()?;
    let dir = home.path();
    let image = disk(dir, "disk.img", 1)?;
    let (_vmm, mut api, _serial) = counting_with(&[drive("d", &image)])?;
    // The state file has the microVM's name, which makes the names of their overlays alike.
    let files = Files { state: dir.join("parent"), memory: dir.join("memory") };
    save_live(&mut api, &files.create("Full"))?;
    ensure!(overlay(&mut api)? == (dir.join("disk.img.parent.1"), Vec::new()));

    let (first, mut first_api) = restore(&files.load())?;
    ensure!(overlay(&mut first_api)? == (dir.join("disk.img.parent.2"), Vec::new()));
    let (_second, mut second_api) = restore(&files.load())?;
    ensure!(overlay(&mut second_api)? == (dir.join("disk.img.parent.3"), Vec::new()));
    // What the first has written is no part of the snapshot, though the first has ended.
    drop(first);
    write_to(&dir.join("disk.img.parent.2"))?;
    let (_third, mut third_api) = restore(&files.load())?;
    ensure!(overlay(&mut third_api)? == (dir.join("disk.img.parent.4"), Vec::new()));
    // And it cannot be named as an overlay.
    let mut load = files.load();
    load["drives"] = json!([{"drive_id": "d", "overlay": {"path": dir.join("disk.img.parent.2")}}]);
    let (_fourth, mut fourth_api) = unconfigured(Transport::Mmio)?;
    let refused = fourth_api.put("/snapshot/load", &load)?;
    ensure!(
        refused.status == 400 && refused.fault().contains("disk.img.parent.2 exists already"),
        "{refused:?}"
    );
    load["drives"][0]["overlay"]["path"] = json!(dir.join("mine"));
    fourth_api.put("/snapshot/load", &load)?.ok()?;
    ensure!(overlay(&mut fourth_api)? == (dir.join("mine"), Vec::new()));
    Ok(())
}

#[test]
fn a_failed_load_leaves_no_overlay() -> Result<()> {
    let home = tempfile::tempdir()?;
    let dir = home.path();
    let image = disk(dir, "disk.img", 1)?;
    let (_vmm, mut api, _serial) = counting_with(&[drive("d", &image)])?;
    let files = Files::new(dir, "s");
    save_live(&mut api, &files.create("Full"))?;
    fs::rename(&files.memory, dir.join("elsewhere"))?;
    let (_clone, mut clone) = unconfigured(Transport::Mmio)?;
    let refused = clone.put("/snapshot/load", &files.load())?;
    ensure!(refused.status == 400 && refused.fault().contains("s.memory"), "{refused:?}");
    ensure!(!dir.join("disk.img.s.state.1").exists());
    fs::rename(dir.join("elsewhere"), &files.memory)?;
    clone.put("/snapshot/load", &files.load())?.ok()?;
    ensure!(overlay(&mut clone)?.0 == dir.join("disk.img.s.state.1"));
    Ok(())
}

#[test]
fn writes_before_a_live_snapshot_are_a_layer_of_all() -> Result<()> {
    let home = tempfile::tempdir()?;
    let dir = home.path();
    let image = disk(dir, "disk.img", 1)?;
    fs::create_dir(dir.join("writes"))?;
    let top = dir.join("writes/top");
    let with_top = with(drive("d", &image), &json!({"overlay": {"path": top}}));
    drop(counting_with(std::slice::from_ref(&with_top))?);
    write_to(&top)?;
    let (_vmm, mut api, _serial) = counting_with(&[with_top])?;
    let files = Files::new(dir, "s");
    let mut create = live(&files, "Full");
    let own = dir.join("own");
    create["drives"] = json!([{"drive_id": "d", "overlay": own}]);
    save_live(&mut api, &create)?;
    ensure!(overlay(&mut api)? == (own, vec![top.clone()]));
    // Beside the overlay of the microVM that was saved.
    let (_clone, mut clone) = restore(&files.load())?;
    ensure!(overlay(&mut clone)? == (dir.join("disk.img.s.state.1"), vec![top.clone()]));
    // Another overlay does not remove the layers from the disk.
    let mut load = files.load();
    load["drives"] = json!([{"drive_id": "d", "overlay": {"path": dir.join("mine")}}]);
    let (_other, mut other) = restore(&load)?;
    ensure!(overlay(&mut other)? == (dir.join("mine"), vec![top]));
    Ok(())
}

#[test]
fn an_idle_guest_can_be_saved_live_any_number_of_times() -> Result<()> {
    let home = tempfile::tempdir()?;
    let dir = home.path();
    let image = disk(dir, "disk.img", 1)?;
    let (_vmm, mut api, _serial) = counting_with(&[drive("d", &image)])?;
    let files = Files::new(dir, "s");
    // More often than an overlay can have layers.
    for _round in 0..40 {
        save_live(&mut api, &files.create("Full"))?;
        ensure!(overlay(&mut api)? == (dir.join("disk.img.parent.1"), Vec::new()));
    }
    Ok(())
}

#[test]
fn an_invalid_live_snapshot_is_refused_without_a_change() -> Result<()> {
    let home = tempfile::tempdir()?;
    let dir = home.path();
    let image = disk(dir, "disk.img", 1)?;
    let (_vmm, mut api, serial) = counting_with(&[drive("d", &image)])?;
    let none = api.get("/snapshot/job")?;
    ensure!(none.status == 400 && none.fault().contains("no live snapshot"), "{none:?}");
    let good = live(&Files::new(dir, "s"), "Full");
    let changed = |changes: Value| with(good.clone(), &changes);
    for (create, named) in [
        (changed(json!({"snapshot_path": "/nowhere/state"})), "/nowhere/state"),
        (changed(json!({"mem_file_path": "/nowhere/memory"})), "/nowhere/memory"),
        (
            changed(json!({"drives": [{"drive_id": "e", "overlay": dir.join("o")}]})),
            "drive e: there is no such drive",
        ),
        (changed(json!({"drives": [{"drive_id": "d", "overlay": image}]})), "disk.img exists already"),
        (changed(json!({"drives": [{"drive_id": "d", "overlay": "/nowhere/o"}]})), "/nowhere/o"),
        (changed(json!({"live": false, "drives": [{"drive_id": "d", "overlay": dir.join("o")}]})), "live"),
    ] {
        let refused = api.put("/snapshot/create", &create)?;
        ensure!(refused.status == 400 && refused.fault().contains(named), "{named}: {refused:?}");
        ensure!(fs::read_dir(dir)?.count() == 1, "{named}: a file was left behind");
        ensure!(api.get("/vm/config")?.json()?["drives"][0]["overlay"].is_null(), "{named}");
    }
    ensure!(is_consecutive(&wait_for_bytes(&serial, 10)?));
    Ok(())
}

#[test]
fn a_cancelled_live_snapshot_leaves_its_pages_to_the_next_diff() -> Result<()> {
    let home = tempfile::tempdir()?;
    let dir = home.path();
    // Writing so much takes a while. A round in which it ended before it was cancelled does not
    // count.
    let (_vmm, mut api, _serial) = filled(128, &json!({"track_dirty_pages": true}))?;
    let base = Files::new(dir, "base");
    let mut cancelled = false;
    for round in 0..20 {
        let files = Files::new(dir, &format!("s{round}"));
        api.put("/snapshot/create", &live(&files, "Full"))?.ok()?;
        api.delete("/snapshot/job")?.ok()?;
        let end = wait_for_live_snapshot(&mut api)?;
        cancelled = end["state"] == json!("Cancelled");
        if cancelled {
            ensure!(end["error"].is_null(), "{end}");
            ensure!(!files.state.exists() && !files.memory.exists());
            break;
        }
        ensure!(end["state"] == json!("Done"), "{end}");
    }
    ensure!(cancelled, "it was never given up in time");
    ensure!(
        fs::read_dir(dir)?
            .all(|file| file.is_ok_and(|file| !file.file_name().to_string_lossy().contains("tmp")))
    );
    // All that was filled counts as unsaved again.
    pause(&mut api)?;
    api.put("/snapshot/create", &base.create("Diff"))?.ok()?;
    let space = vesta_tests::disks::space_of(&base.memory)?;
    ensure!(space >= 100 << 20, "the Diff has {space} bytes only");
    Ok(())
}

#[test]
fn a_live_snapshot_without_space_leaves_no_file() -> Result<()> {
    let (_vmm, mut api, serial) = filled(64, &json!({}))?;
    let small = SmallFs::new(8 << 20)?;
    let files = Files::new(&small.path(), "s");
    api.put("/snapshot/create", &live(&files, "Full"))?.ok()?;
    let end = wait_for_live_snapshot(&mut api)?;
    ensure!(end["state"] == json!("Failed") && end["error"].to_string().contains("No space left"), "{end}");
    ensure!(fs::read_dir(small.path())?.next().is_none(), "a file was left behind");
    ensure!(is_consecutive(&wait_for_bytes(&serial, 10)?));
    Ok(())
}
