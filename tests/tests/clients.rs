//! Clients from package registries drive real guests, unchanged, with `vesta-vmm` in the place of
//! `firecracker`. `tests/clients` has the programs, which use them as their users do.

use std::os::unix::fs::symlink;
use std::path::PathBuf;
use std::process::{Command, Stdio};

use anyhow::{Context, Result, ensure};
use tempfile::TempDir;
use vesta_tests::guest::{Guest, Kernel, env, ignore, vmm_path};
use vesta_tests::host_net::HostNet;

/// The directory of the programs.
const CLIENTS: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/clients");
/// The guest prints a line now and then, so that each program sees it run.
const SCRIPT: &str = "n=1; while :; do echo GUEST $n; n=$((n+1)); sleep 0.2; done";

/// The path of a client; the test is ignored if the client cannot be fetched here.
fn client(variable: &str, name: &str) -> PathBuf {
    match std::env::var_os(variable) {
        Some(path) => path.into(),
        None => ignore(&format!("{name} cannot be fetched here")),
    }
}

/// A guest, with its files in a directory.
fn guest() -> Result<(TempDir, Guest, PathBuf)> {
    let dir = tempfile::tempdir()?;
    let guest = Guest::linux(Kernel::quickest(), SCRIPT, dir.path())?;
    let initrd = guest.initrd.clone().context("it has an initramfs")?;
    Ok((dir, guest, initrd))
}

/// Runs the program, which must print these steps and succeed.
fn run(command: &mut Command, steps: &[&str]) -> Result<()> {
    let output = command.stdin(Stdio::null()).output()?;
    let (printed, errors) =
        (String::from_utf8_lossy(&output.stdout), String::from_utf8_lossy(&output.stderr));
    ensure!(output.status.success(), "{}:\n{printed}\n{errors}", output.status);
    let done: Vec<&str> = printed.lines().filter_map(|line| line.strip_prefix("STEP ")).collect();
    ensure!(done == steps, "{done:?}; expected {steps:?}:\n{printed}\n{errors}");
    Ok(())
}

#[test]
fn firecracker_rs_sdk_boots_saves_and_restores() -> Result<()> {
    let program = client(env::RUST_SDK, "firecracker-rs-sdk");
    let (dir, guest, initrd) = guest()?;
    let firecracker = dir.path().join("firecracker");
    symlink(vmm_path(), &firecracker)?;
    let mut command = Command::new(program);
    command.arg(firecracker).arg(&guest.kernel).arg(initrd).arg(dir.path());
    run(&mut command, &["started", "paused", "saved", "ended", "restored"])
}

#[test]
fn firecracker_python_boots_pauses_and_saves() -> Result<()> {
    let package = client(env::PYTHON_SDK, "firecracker-python");
    let (dir, guest, initrd) = guest()?;
    // The package looks for the interface of the default route.
    let host = HostNet::new()?;
    host.tap("eth9", "192.0.2.2/24", "")?;
    host.ip("route add default dev eth9")?;
    let disk = dir.path().join("disk.img");
    std::fs::File::create(&disk)?.set_len(1 << 20)?;
    // Its paths are fixed: the monitor's, and that of its own files. Here they are of this process
    // and its children only.
    let script = r#"
        mount -t tmpfs tmpfs /var/lib && mkdir /var/lib/firecracker &&
        mount -t tmpfs tmpfs /usr/local/bin && ln -s "$VESTA_VMM" /usr/local/bin/firecracker &&
        exec python3 "$@""#;
    let mut command = Command::new("unshare");
    command.args(["--mount", "sh", "-c", script, "sh"]);
    command.arg(PathBuf::from(CLIENTS).join("firecracker-python/drive.py"));
    command.arg(&guest.kernel).arg(initrd).arg(disk);
    command.env("PYTHONPATH", package).env("PYTHONDONTWRITEBYTECODE", "1");
    run(&mut command, &["created", "described", "refused", "paused", "resumed", "saved", "deleted"])
}
