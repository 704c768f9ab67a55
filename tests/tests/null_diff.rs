//! Diffs onto an existing memory file, which may have other users.

use std::path::Path;

use anyhow::{Result, ensure};
use rustix::process::Signal;
use serde_json::json;
use vesta_tests::api::ApiClient;
use vesta_tests::counting::{is_consecutive, restored, sweeping, wait_for_bytes};
use vesta_tests::guest::TIMEOUT;
use vesta_tests::process::Orphans;
use vesta_tests::snapshots::{Files, pause, resume};

/// A guest that finds one of its 1024 pages changed repeats a number instead of counting.
fn ensure_it_counts_on(serial: &Path) -> Result<()> {
    ensure!(is_consecutive(&wait_for_bytes(serial, 3)?), "a page of it was changed");
    Ok(())
}

fn diff(api: &mut ApiClient, files: &Files) -> Result<()> {
    pause(api)?;
    api.put("/snapshot/create", &files.create("Diff"))?.ok()?;
    resume(api)
}

#[test]
fn a_diff_onto_its_base_never_changes_a_running_clone() -> Result<()> {
    let home = tempfile::tempdir()?;
    let files = Files::new(home.path(), "a");
    let (_parent, mut parent, output) = sweeping(&json!({}))?;
    wait_for_bytes(&output, 2)?;
    pause(&mut parent)?;
    parent.put("/snapshot/create", &files.create("Full"))?.ok()?;
    resume(&mut parent)?;
    let mut clones = Vec::new();
    for _ in 0..3 {
        ensure_it_counts_on(&output)?;
        diff(&mut parent, &files)?;
        clones.push(restored(&files.load())?);
    }
    for (_, api, serial) in &mut clones {
        // One that others use, and one that the clone itself was restored from.
        diff(api, &files)?;
        ensure_it_counts_on(serial)?;
    }
    for (_, _, serial) in &clones {
        ensure_it_counts_on(serial)?;
    }
    ensure_it_counts_on(&output)
}

#[test]
fn a_diff_onto_its_base_never_changes_a_forks_child() -> Result<()> {
    let home = tempfile::tempdir()?;
    let files = Files::new(home.path(), "a");
    {
        let (_vmm, mut api, _said) = sweeping(&json!({}))?;
        pause(&mut api)?;
        api.put("/snapshot/create", &files.create("Full"))?.ok()?;
    }
    let (_parent, mut parent, output) = restored(&files.load())?;
    wait_for_bytes(&output, 2)?;
    // In place, first without and then with a child.
    diff(&mut parent, &files)?;
    let child = home.path().join("child");
    let socket = home.path().join("child.sock");
    let fork =
        json!({"children": [{"id": "child", "api_socket": socket, "serial": {"serial_out_path": child}}]});
    let orphans = Orphans::of_fork(&parent.put("/fork", &fork)?.ok()?.json()?)?;
    ensure_it_counts_on(&output)?;
    diff(&mut parent, &files)?;
    ensure_it_counts_on(&child)?;
    diff(&mut ApiClient::new(&socket), &Files { state: home.path().join("c"), ..files.clone() })?;
    ensure_it_counts_on(&child)?;
    ensure_it_counts_on(&output)?;
    orphans.signal(Signal::TERM)?;
    orphans.wait(TIMEOUT)
}
