//! A monitor that is killed while it saves: either the old snapshot or the new one is complete.

use std::fs;
use std::path::Path;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use serde_json::json;
use vesta_tests::api::read_response;
use vesta_tests::counting::{is_consecutive, restored, sweeping, wait_for_bytes};
use vesta_tests::host_devices::SmallFs;
use vesta_tests::pattern::mix;
use vesta_tests::snapshots::{Files, pause};
use vesta_tests::soak::rounds;

/// How many monitors are killed.
const ROUNDS: u64 = 60;

/// The first number of a guest that resumes after one that printed `bytes`.
fn next(bytes: &[u8]) -> Option<u8> {
    bytes.last().map(|last| last.wrapping_add(1))
}

/// The names in a directory, without temporary files.
fn names(dir: &Path) -> Result<Vec<String>> {
    let mut names = Vec::new();
    for entry in fs::read_dir(dir)? {
        let name = entry?.file_name().into_string().ok().context("the name is text")?;
        if !name.ends_with(".vesta-tmp") && !name.ends_with(".vesta-redo") {
            names.push(name);
        }
    }
    names.sort();
    Ok(names)
}

/// Kills monitors at times spread over the duration of a create. Each time the pair of files is
/// loaded, and must be the old or the new one; the restored guest is saved next.
fn killed_while_it_saves(kind: &str, machine: &serde_json::Value) -> Result<()> {
    let home = tempfile::tempdir()?;
    let files = Files::new(home.path(), "a");
    let (mut vmm, mut api, mut serial) = sweeping(machine)?;
    pause(&mut api)?;
    let begun = Instant::now();
    read_response(&mut api.begin_put("/snapshot/create", &files.create("Full"))?)?.ok()?;
    // The times are within this span. The duration of a create varies, so the span follows it.
    let mut span = begun.elapsed() * 3 / 2;
    let mut saved = next(&fs::read(&serial)?);
    api.patch("/vm", &json!({"state": "Resumed"}))?.ok()?;

    let (mut old, mut new) = (0, 0);
    for round in 0..rounds(ROUNDS) {
        wait_for_bytes(&serial, 2)?;
        pause(&mut api)?;
        let now = next(&fs::read(&serial)?);
        let connection = api.begin_put("/snapshot/create", &files.create(kind))?;
        let wait = span * u32::try_from(mix(round) % 1000).unwrap_or(0) / 1000;
        let begun = Instant::now();
        while begun.elapsed() < wait {
            std::hint::spin_loop();
        }
        drop(vmm);
        drop(connection);
        ensure!(names(home.path())? == ["a.memory", "a.state"], "{:?}", names(home.path())?);
        (vmm, api, serial) =
            restored(&files.load()).with_context(|| format!("round {round}, after {wait:?}"))?;
        let output = wait_for_bytes(&serial, 2)?;
        let first = output.first().copied();
        ensure!(
            is_consecutive(&output) && (first == saved || first == now),
            "{round}: {first:?}: {saved:?} {now:?}"
        );
        if first == now && now != saved {
            new += 1;
            saved = now;
            span = span * 7 / 8;
        } else {
            old += 1;
            span = span * 9 / 8;
        }
    }
    // Otherwise no monitor was killed during a create.
    ensure!(old > 0 && new > 0, "{old} old ones and {new} new ones");
    Ok(())
}

#[test]
fn a_killed_full_save_leaves_the_old_or_the_new_snapshot() -> Result<()> {
    killed_while_it_saves("Full", &json!({}))
}

#[test]
fn a_killed_diff_in_place_leaves_the_old_or_the_new_snapshot() -> Result<()> {
    killed_while_it_saves("Diff", &json!({}))
}

/// Only complete files have a name, so an unfinished first snapshot does not exist.
#[test]
fn a_killed_first_save_leaves_a_complete_snapshot_or_none() -> Result<()> {
    let home = tempfile::tempdir()?;
    for round in 0..20 {
        let dir = home.path().join(round.to_string());
        fs::create_dir(&dir)?;
        let files = Files::new(&dir, "a");
        let (vmm, mut api, _serial) = sweeping(&json!({}))?;
        pause(&mut api)?;
        let connection = api.begin_put("/snapshot/create", &files.create("Full"))?;
        let begun = Instant::now();
        while begun.elapsed() < Duration::from_micros(mix(round) % 20_000) {
            std::hint::spin_loop();
        }
        drop((vmm, connection));
        // The state file is the last to get its name.
        if files.state.exists() {
            let (_vmm, _api, serial) = restored(&files.load())?;
            ensure!(is_consecutive(&wait_for_bytes(&serial, 2)?), "round {round}");
        } else {
            ensure!(!files.memory.exists(), "round {round}: there is memory without a state");
        }
    }
    Ok(())
}

#[test]
fn a_snapshot_without_space_leaves_no_file_and_can_be_retried() -> Result<()> {
    let (_vmm, mut api, serial) = sweeping(&json!({}))?;
    // Half of what the guest has written.
    let small = SmallFs::new(2 << 20)?;
    let files = Files::new(&small.path(), "a");
    pause(&mut api)?;
    let refused = api.put("/snapshot/create", &files.create("Full"))?;
    ensure!(
        refused.status == 400
            && refused.fault().contains("a.memory")
            && refused.fault().contains("No space left"),
        "{refused:?}"
    );
    ensure!(fs::read_dir(small.path())?.next().is_none(), "a file was left behind");
    api.patch("/vm", &json!({"state": "Resumed"}))?.ok()?;
    ensure!(is_consecutive(&wait_for_bytes(&serial, 10)?));
    pause(&mut api)?;
    small.resize(16 << 20)?;
    let saved = next(&fs::read(&serial)?);
    api.put("/snapshot/create", &files.create("Full"))?.ok()?;
    let (_clone, mut clone, clone_serial) = restored(&files.load())?;
    let output = wait_for_bytes(&clone_serial, 2)?;
    ensure!(is_consecutive(&output) && output.first().copied() == saved, "{output:?} after {saved:?}");
    // A Diff without space also keeps its pages for the next one.
    pause(&mut clone)?;
    let output = next(&fs::read(&clone_serial)?);
    small.resize(5 << 20)?;
    let refused = clone.put("/snapshot/create", &Files::new(&small.path(), "b").create("Diff"))?;
    ensure!(refused.status == 400 && refused.fault().contains("No space left"), "{refused:?}");
    small.resize(16 << 20)?;
    clone.put("/snapshot/create", &files.create("Diff"))?.ok()?;
    let (_third, _api, serial) = restored(&files.load())?;
    ensure!(wait_for_bytes(&serial, 2)?.first().copied() == output, "the Diff lacks something");
    Ok(())
}
