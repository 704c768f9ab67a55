//! Restoring by command line options, and the tools that describe, check and merge snapshots, under
//! all their names.

use std::fs;
use std::path::Path;

use anyhow::{Context, Result, ensure};
use serde_json::{Value, json};
use vesta_tests::counting::{counting, is_consecutive, wait_for_bytes};
use vesta_tests::guest::{TIMEOUT, Transport, vmm_path};
use vesta_tests::snapshots::{Files, pause, resume, unconfigured};
use vesta_tests::vmm::VmmBuilder;

/// Runs the monitor's binary under a name. Returns its exit code and its output.
fn tool(name: &str, args: &[&str]) -> Result<(i32, String)> {
    let builder = VmmBuilder::new(&vmm_path())?.with_name(name).quiet();
    args.iter().fold(builder, VmmBuilder::arg).spawn()?.finish(TIMEOUT)
}

/// The same, which must succeed.
fn good(name: &str, args: &[&str]) -> Result<String> {
    let (code, output) = tool(name, args)?;
    ensure!(code == 0, "{name} {args:?}: {code} {output}");
    Ok(output)
}

fn text(path: &Path) -> Result<&str> {
    path.to_str().context("a path that is text")
}

/// Snapshot `a` of a counting guest, and `b`, a Diff in a file of its own. Returns also the next
/// number of the guest.
fn base_and_diff(dir: &Path) -> Result<(Files, Files, Option<u8>)> {
    let (_vmm, mut api, serial) = counting(&json!({"track_dirty_pages": true}))?;
    let (base, diff) = (Files::new(dir, "a"), Files::new(dir, "b"));
    pause(&mut api)?;
    api.put("/snapshot/create", &base.create("Full"))?.ok()?;
    resume(&mut api)?;
    wait_for_bytes(&serial, 10)?;
    pause(&mut api)?;
    let next = wait_for_bytes(&serial, 0)?.last().map(|last| last.wrapping_add(1));
    api.put("/snapshot/create", &diff.create("Diff"))?.ok()?;
    Ok((base, diff, next))
}

/// Checks that a monitor with only these options resumes the guest at `next`.
fn check_resumes(state: &Path, memory: &Path, more: &[&str], next: Option<u8>) -> Result<()> {
    let builder = VmmBuilder::new(&vmm_path())?;
    let serial = builder.dir().join("serial");
    let args = ["--no-api", "--restore", text(state)?, "--memory", text(memory)?, "--serial", text(&serial)?];
    let _vmm = args.iter().chain(more).fold(builder, VmmBuilder::arg).spawn()?;
    let output = wait_for_bytes(&serial, 10)?;
    ensure!(is_consecutive(&output) && output.first().copied() == next, "{output:?}, and not from {next:?}");
    Ok(())
}

#[test]
fn a_merged_diff_is_restored_by_command_line_options() -> Result<()> {
    let home = tempfile::tempdir()?;
    let (base, diff, next) = base_and_diff(home.path())?;
    let [whole, state, alone] = [&base.memory, &diff.state, &diff.memory].map(|path| text(path));
    let (whole, state, alone) = (whole?, state?, alone?);

    let output = good("vesta-vmm", &["snapshot", "verify", state, alone])?;
    ensure!(output.contains("to be merged"), "{output}");
    let (_vmm, mut api) = unconfigured(Transport::Mmio)?;
    let refused = api.put("/snapshot/load", &diff.load())?;
    ensure!(refused.status == 400 && refused.fault().contains("not merged"), "{refused:?}");

    let merged = home.path().join("merged");
    let out = text(&merged)?;
    good("vesta-vmm", &["snapshot", "merge", "--base", whole, "--diff", alone, "--out", out])?;
    let output = good("vesta-vmm", &["snapshot", "verify", state, out])?;
    ensure!(output.contains("sections are good") && !output.contains("to be merged"), "{output}");
    check_resumes(&diff.state, &merged, &[], next)?;
    let overrides = r#"{"huge_pages":"Transparent","clock_realtime":false}"#;
    check_resumes(&diff.state, &merged, &["--prefetch", "--overrides", overrides], next)?;

    for (name, args) in [
        ("rebase-snap", vec!["--base-file", whole, "--diff-file", alone]),
        ("snapshot-editor", vec!["edit-memory", "rebase", "--memory-path", whole, "--diff-path", alone]),
    ] {
        good(name, &args)?;
        ensure!(fs::read(&base.memory)? == fs::read(&merged)?, "{name}");
    }
    Ok(())
}

#[test]
fn a_snapshot_is_described_under_each_tool_name() -> Result<()> {
    let home = tempfile::tempdir()?;
    let (base, ..) = base_and_diff(home.path())?;
    let (state, memory) = (text(&base.state)?, text(&base.memory)?);
    let output = good("vesta-vmm", &["snapshot", "info", state, memory])?;
    ensure!(
        output.contains("memory          16 MiB, Full") && output.contains("id              parent"),
        "{output}"
    );
    let json: Value = serde_json::from_str(&good("vesta-vmm", &["snapshot", "info", state, "--json"])?)?;
    ensure!(json["microvm"]["memory"]["ram_size"] == json!(16 << 20), "{json}");
    let output = good("vesta-vmm", &["--describe-snapshot", state])?;
    ensure!(output.starts_with("v1.0.0\n") && output.contains("section         machine"), "{output}");
    ensure!(good("firecracker", &["--describe-snapshot", state])? == "v1.0.0\n");
    ensure!(good("snapshot-editor", &["info-vmstate", "version", "--vmstate-path", state])? == "v1.0.0\n");
    for (command, word) in [("vcpu-states", "rip"), ("vm-state", "SerialPort")] {
        let output = good("snapshot-editor", &["info-vmstate", command, "--vmstate-path", state])?;
        ensure!(output.contains(word), "{command}: {output}");
    }
    Ok(())
}

#[test]
fn tools_print_the_versions_of_their_names() -> Result<()> {
    ensure!(good("snapshot-editor", &["--version"])? == "snapshot-editor v1.17.0\n");
    ensure!(good("rebase-snap", &["--version"])? == "Rebase_snap v1.17.0\n\n");
    for (name, args, code) in [
        ("snapshot-editor", &["info-vmstate", "version"][..], 2),
        ("snapshot-editor", &["info-vmstate", "version", "--vmstate-path", "/nowhere/s"], 1),
        ("rebase-snap", &["--base-file", "/nowhere/b"], 1),
    ] {
        let (found, output) = tool(name, args)?;
        ensure!(found == code && output.starts_with("Error: "), "{name} {args:?}: {found} {output}");
    }
    Ok(())
}

#[test]
fn an_invalid_snapshot_gives_an_exit_code_and_a_reason() -> Result<()> {
    let home = tempfile::tempdir()?;
    let (base, ..) = base_and_diff(home.path())?;
    let (state, memory) = (text(&base.state)?, text(&base.memory)?);
    let tap = ["--no-api", "--restore", state, "--memory", memory, "--tap", "eth0=none"];
    let cut = home.path().join("cut");
    fs::write(&cut, &fs::read(&base.state)?[..1000])?;
    let cut = text(&cut)?;
    for (args, code, reason) in [
        (&tap[..], 152, "eth0"),
        (&["--no-api", "--restore", state, "--memory", "/nowhere/m"], 152, "/nowhere/m"),
        (&["--no-api", "--restore", cut, "--memory", memory], 152, "cut"),
        (&["--no-api", "--restore", state], 153, "--memory"),
        (&["snapshot", "verify", cut], 1, "cut"),
        (&["snapshot", "info", "/nowhere/s"], 1, "/nowhere/s"),
        (&["snapshot", "merge", "--base", memory, "--diff", memory], 1, "both base and diff"),
        (&["--describe-snapshot", cut], 1, "cut"),
    ] {
        let (found, output) = tool("vesta-vmm", args)?;
        ensure!(found == code && output.contains(reason), "{args:?}: {found} {output}");
    }
    Ok(())
}
