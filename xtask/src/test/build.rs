//! Builds what tests and benchmarks need, and returns the paths.

use std::path::PathBuf;
use std::process::{Command, Stdio};

use anyhow::{Context, Result, bail};
use serde::Deserialize;

use super::record::Test;
use crate::process::{cargo, output, root};

/// A line of `cargo --message-format=json`, as far as it is used.
#[derive(Deserialize)]
struct Message {
    #[serde(default)]
    target: Option<Target>,
    #[serde(default)]
    executable: Option<PathBuf>,
    #[serde(default)]
    manifest_path: PathBuf,
}

#[derive(Deserialize)]
struct Target {
    name: String,
    kind: Vec<String>,
}

/// Builds the monitor; returns its path.
pub(crate) fn vmm(release: bool) -> Result<PathBuf> {
    program("vesta-vmm", "vesta-vmm", release)
}

/// Builds the benchmarks' load generator; returns its path.
pub(crate) fn load() -> Result<PathBuf> {
    program("vesta-tests", "vesta-load", true)
}

/// Builds the program that uses vsock in guests; returns its path.
pub(crate) fn guest_program() -> Result<PathBuf> {
    program("vesta-tests", "guest-vsock", false)
}

/// Builds the network tests' and benchmarks' tool for guests; returns its path.
pub(crate) fn net_tool() -> Result<PathBuf> {
    program("vesta-tests", "net-tool", true)
}

/// Builds the example in Rust; returns its path.
pub(crate) fn example() -> Result<PathBuf> {
    program("vesta-examples", "boot-and-fork", false)
}

fn program(package: &str, name: &str, release: bool) -> Result<PathBuf> {
    let mut command = cargo();
    command.args(["build", "--package", package, "--bin", name]);
    if release {
        command.arg("--release");
    }
    let built = messages(&mut command)?;
    let executable = built
        .into_iter()
        .find_map(|message| (message.target?.name == name).then_some(message.executable).flatten());
    executable.with_context(|| format!("cargo named no binary for {name}"))
}

/// Builds all test binaries of the workspace, and lists the whole-system tests among them.
pub(crate) fn system_tests() -> Result<Vec<Test>> {
    let built = messages(cargo().args(["test", "--workspace", "--no-run"]))?;
    let mut tests = Vec::new();
    for message in built {
        let (Some(target), Some(binary)) = (message.target, message.executable) else { continue };
        if message.manifest_path != root().join("tests/Cargo.toml") || target.kind != ["test"] {
            continue;
        }
        let listing = output(Command::new(&binary).args(["--list", "--format", "terse"]))?;
        for name in listing.lines().filter_map(|line| line.strip_suffix(": test")) {
            tests.push(Test { suite: target.name.clone(), name: name.to_owned(), binary: binary.clone() });
        }
    }
    if tests.is_empty() {
        bail!("{} has no whole-system tests", root().join("tests/tests").display());
    }
    tests.sort();
    Ok(tests)
}

/// Runs cargo with its diagnostics on standard error, and returns what it built.
fn messages(command: &mut Command) -> Result<Vec<Message>> {
    command.args(["--message-format", "json-render-diagnostics", "--quiet"]).stderr(Stdio::inherit());
    let lines = output(command)?;
    lines
        .lines()
        .filter(|line| line.contains("\"reason\":\"compiler-artifact\""))
        .map(|line| serde_json::from_str(line).context("cargo's messages"))
        .collect()
}
