//! Snapshots of guests of a few instructions.

use std::fs::{self, File};
use std::os::unix::fs::MetadataExt;
use std::path::Path;

use anyhow::{Context, Result, ensure};
use serde_json::{Value, json};
use vesta_tests::counting::{counting, is_consecutive, unconfigured, wait_for_bytes};
use vesta_tests::guest::TIMEOUT;
use vesta_tests::snapshots::{pause, resume, wait_for_live_snapshot};

fn create(dir: &Path, name: &str, kind: &str) -> Value {
    let [state, memory] = ["state", "memory"].map(|part| dir.join(format!("{name}.{part}")));
    json!({"snapshot_path": state, "mem_file_path": memory, "snapshot_type": kind})
}

fn load(dir: &Path, state: &str, memory: &str) -> Value {
    json!({
        "snapshot_path": dir.join(format!("{state}.state")),
        "mem_backend": {"backend_type": "File", "backend_path": dir.join(format!("{memory}.memory"))},
        "resume_vm": true,
    })
}

#[test]
fn restored_guests_resume_where_they_were_saved() -> Result<()> {
    let home = tempfile::tempdir()?;
    let mut family = vec![counting(&json!({}))?];
    for generation in ["one", "two", "three"] {
        let (_, api, serial) = family.last_mut().context("there is a guest")?;
        pause(api)?;
        let saved = fs::read(&*serial)?;
        api.put("/snapshot/create", &create(home.path(), generation, "Full"))?.ok()?;
        resume(api)?;
        ensure!(is_consecutive(&wait_for_bytes(serial, 10)?), "{generation}");
        for _clone in 0..2 {
            let (vmm, mut api, serial) = unconfigured()?;
            api.put("/snapshot/load", &load(home.path(), generation, generation))?.ok()?;
            let output = wait_for_bytes(&serial, 10)?;
            let next = saved.last().map(|byte| byte.wrapping_add(1));
            ensure!(
                is_consecutive(&output) && output.first().copied() == next,
                "{generation}: after {next:?} {output:?}"
            );
            family.push((vmm, api, serial));
        }
    }
    Ok(())
}

#[test]
fn a_snapshot_of_a_small_guest_is_a_sparse_file() -> Result<()> {
    let (vmm, mut api, _serial) = counting(&json!({"mem_size_mib": 1024}))?;
    pause(&mut api)?;
    api.put("/snapshot/create", &create(vmm.dir(), "a", "Full"))?.ok()?;
    let memory = fs::metadata(vmm.dir().join("a.memory"))?;
    ensure!(memory.len() == 1 << 30, "{}", memory.len());
    ensure!(memory.blocks() * 512 < 1 << 20, "{} blocks", memory.blocks());
    Ok(())
}

#[test]
fn a_diff_has_only_pages_written_since_the_last_snapshot() -> Result<()> {
    for tracked in [true, false] {
        let (vmm, mut api, serial) = counting(&json!({"track_dirty_pages": tracked}))?;
        let dir = vmm.dir();
        pause(&mut api)?;
        api.put("/snapshot/create", &create(dir, "base", "Full"))?.ok()?;
        resume(&mut api)?;
        wait_for_bytes(&serial, 10)?;
        pause(&mut api)?;
        let output = wait_for_bytes(&serial, 0)?;
        // Onto the base, in place.
        let mut diff = create(dir, "diff", "Diff");
        diff["mem_file_path"] = json!(dir.join("base.memory"));
        api.put("/snapshot/create", &diff)?.ok()?;
        let (_clone, mut clone, clone_serial) = unconfigured()?;
        clone.put("/snapshot/load", &load(dir, "diff", "base"))?.ok()?;
        let resumed = wait_for_bytes(&clone_serial, 10)?;
        ensure!(
            is_consecutive(&resumed) && resumed[0] == output.last().copied().unwrap_or(0).wrapping_add(1),
            "{tracked}"
        );
    }
    Ok(())
}

#[test]
fn an_invalid_load_is_refused_by_name_and_can_be_retried() -> Result<()> {
    let home = tempfile::tempdir()?;
    let dir = home.path();
    let (_vmm, mut api, _serial) = counting(&json!({}))?;
    pause(&mut api)?;
    api.put("/snapshot/create", &create(dir, "good", "Full"))?.ok()?;

    let state = fs::read(dir.join("good.state"))?;
    fs::write(dir.join("short.state"), &state[..state.len() / 2])?;
    let mut damaged = state.clone();
    damaged[state.len() / 2] ^= 1;
    fs::write(dir.join("damaged.state"), &damaged)?;
    fs::write(dir.join("other.state"), b"something else")?;
    File::create(dir.join("short.memory"))?.set_len(4096)?;

    let (_clone, mut clone, serial) = unconfigured()?;
    for (state, memory, named) in [
        ("missing", "good", "missing.state"),
        ("short", "good", "short.state"),
        ("damaged", "good", "damaged.state"),
        ("other", "good", "other.state"),
        ("good", "missing", "missing.memory"),
        ("good", "short", "4096 bytes"),
    ] {
        let refused = clone.put("/snapshot/load", &load(dir, state, memory))?;
        ensure!(refused.status == 400 && refused.fault().contains(named), "{named}: {refused:?}");
        ensure!(clone.get("/")?.json()?["state"] == json!("Not started"));
    }
    let mut unknown_drive = load(dir, "good", "good");
    unknown_drive["drives"] = json!([{"drive_id": "d", "path_on_host": "/d"}]);
    let refused = clone.put("/snapshot/load", &unknown_drive)?;
    ensure!(refused.status == 400 && refused.fault().contains("no drive d"), "{refused:?}");
    clone.put("/snapshot/load", &load(dir, "good", "good"))?.ok()?;
    ensure!(is_consecutive(&wait_for_bytes(&serial, 10)?));
    let again = clone.put("/snapshot/load", &load(dir, "good", "good"))?;
    ensure!(again.status == 400, "{again:?}");
    Ok(())
}

#[test]
fn an_invalid_create_is_refused_and_leaves_no_file() -> Result<()> {
    let home = tempfile::tempdir()?;
    let dir = home.path();
    let (_vmm, mut api, serial) = counting(&json!({}))?;
    let running = api.put("/snapshot/create", &create(dir, "a", "Full"))?;
    ensure!(running.status == 400 && running.fault().contains("paused"), "{running:?}");
    pause(&mut api)?;
    for (body, named) in [
        (create(Path::new("/nowhere"), "a", "Full"), "/nowhere/a.memory"),
        (json!({"snapshot_path": "/nowhere/s", "mem_file_path": dir.join("m")}), "/nowhere/s"),
        (json!({"snapshot_path": dir.join("x"), "mem_file_path": dir.join("x")}), "both"),
        (json!({"snapshot_path": dir.join("x"), "mem_file_path": dir.join("./x")}), "both"),
        (json!({"snapshot_path": dir, "mem_file_path": dir.join("m")}), "not a regular file"),
    ] {
        let refused = api.put("/snapshot/create", &body)?;
        ensure!(refused.status == 400 && refused.fault().contains(named), "{named}: {refused:?}");
        ensure!(fs::read_dir(dir)?.next().is_none(), "{named}: a file was left behind");
    }
    resume(&mut api)?;
    ensure!(is_consecutive(&wait_for_bytes(&serial, 10)?));
    Ok(())
}

#[test]
fn a_live_snapshot_has_the_state_at_its_request() -> Result<()> {
    let (vmm, mut api, serial) = counting(&json!({}))?;
    for kind in ["Full", "Diff"] {
        let mut live = create(vmm.dir(), "live", kind);
        live["live"] = json!(true);
        let before = fs::read(&serial)?.len();
        let begun = api.put("/snapshot/create", &live)?.ok()?.json()?;
        ensure!(begun["pause_us"].as_u64().context("a pause")? > 0, "{begun}");
        ensure!(api.get("/")?.json()?["state"] == json!("Running"));
        let end = wait_for_live_snapshot(&mut api)?;
        ensure!(end["state"] == json!("Done") && end["bytes_total"].is_u64(), "{end}");
        let parent = wait_for_bytes(&serial, 10)?;
        ensure!(is_consecutive(&parent), "{kind}");

        let (_clone, mut clone, clone_serial) = unconfigured()?;
        clone.put("/snapshot/load", &load(vmm.dir(), "live", "live"))?.ok()?;
        let output = wait_for_bytes(&clone_serial, 10)?;
        ensure!(is_consecutive(&output), "{kind}");
        // Its first number is between the parent's before and after the request.
        let began_at = (before..parent.len()).find(|at| parent[*at] == output[0]);
        ensure!(began_at.is_some() || parent.len() - before > 255, "{kind}: {before} {}", output[0]);
    }
    Ok(())
}

#[test]
fn a_restore_records_pages_that_later_restores_prefetch() -> Result<()> {
    let home = tempfile::tempdir()?;
    let (_vmm, mut api, _serial) = counting(&json!({}))?;
    pause(&mut api)?;
    api.put("/snapshot/create", &create(home.path(), "a", "Full"))?.ok()?;
    let mut body = load(home.path(), "a", "a");
    body["prefetch"] = json!(true);
    let (first, mut api, serial) = unconfigured()?;
    api.put("/snapshot/load", &body)?.ok()?;
    ensure!(is_consecutive(&wait_for_bytes(&serial, 10)?));
    first.wait_for_output("working set", TIMEOUT)?;
    ensure!(home.path().join("a.memory.working-set").exists(), "{}", first.stdout.text());
    let (second, mut api, serial) = unconfigured()?;
    api.put("/snapshot/load", &body)?.ok()?;
    second.wait_for_output("pages are prefetched", TIMEOUT)?;
    ensure!(is_consecutive(&wait_for_bytes(&serial, 10)?));
    body["mem_backend"]["backend_type"] = json!("Uffd");
    let (_third, mut api, _serial) = unconfigured()?;
    let refused = api.put("/snapshot/load", &body)?;
    ensure!(refused.status == 400 && refused.fault().contains("prefetch"), "{refused:?}");
    Ok(())
}

#[test]
fn a_load_after_boot_configuration_is_refused() -> Result<()> {
    let home = tempfile::tempdir()?;
    let (_vmm, mut api, _serial) = counting(&json!({}))?;
    pause(&mut api)?;
    api.put("/snapshot/create", &create(home.path(), "a", "Full"))?.ok()?;
    let body = load(home.path(), "a", "a");

    let (_clone, mut api, serial) = unconfigured()?;
    // A PUT that was refused configures nothing, and neither do these.
    ensure!(api.put("/machine-config", &json!({"vcpu_count": 0, "mem_size_mib": 1}))?.status == 400);
    api.put("/logger", &json!({"level": "Info"}))?.ok()?;
    api.put("/mmds", &json!({"a": 1}))?.ok()?;
    api.put("/snapshot/load", &body)?.ok()?;
    ensure!(is_consecutive(&wait_for_bytes(&serial, 3)?));

    let (_clone, mut api, _serial) = unconfigured()?;
    // The defaults: the configuration is unchanged.
    let defaults = api.get("/machine-config")?.ok()?.json()?;
    api.put("/machine-config", &defaults)?.ok()?;
    let refused = api.put("/snapshot/load", &body)?;
    ensure!(refused.status == 400 && refused.fault().contains("PUT /machine-config"), "{refused:?}");
    Ok(())
}
