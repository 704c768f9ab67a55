//! The lints, each as a test.

use std::process::{Command, Stdio};

use anyhow::Result;

use super::deny;
use super::record::Verdict;
use super::tally::Tally;
use crate::lint::{LINTS, Sources, report};
use crate::openapi;
use crate::process::{cargo, root, say};

/// Runs the lints whose name has the filter in it.
pub(super) fn run(filter: &str) -> Tally {
    let passed = |check: Result<bool>| {
        check
            .map(|passed| if passed { Verdict::Passed } else { Verdict::Failed("see its output".to_owned()) })
    };
    let mut tally = Tally::default();
    let mut lint = |name: &str, run: &dyn Fn() -> Result<Verdict>| {
        let name = format!("lint::{name}");
        if !name.contains(filter) {
            tally.filtered_out += 1;
            return;
        }
        say!("{name}");
        tally.count(&name, &run().unwrap_or_else(|error| Verdict::Failed(format!("{error:#}"))));
    };
    lint("fmt", &|| passed(succeeds(&["fmt", "--all", "--check"])));
    for sources in &LINTS {
        lint(sources.name, &|| passed(Ok(report(sources, &Sources::find(root(), &[])?)? == 0)));
    }
    lint("openapi", &|| openapi::check().map(|()| Verdict::Passed));
    lint("deny", &|| passed(deny::dependencies()));
    lint("advisories", &deny::advisories);
    let clippy = ["clippy", "--quiet", "--workspace", "--all-targets", "--", "--deny", "warnings"];
    lint("clippy", &|| passed(succeeds(&clippy)));
    lint("fuzz", &|| passed(fuzz_targets_compile()));
    tally
}

fn succeeds(args: &[&str]) -> Result<bool> {
    say!("cargo {}", args.join(" "));
    Ok(cargo().args(args).status()?.success())
}

/// Checks that the targets in `fuzz/` compile.
fn fuzz_targets_compile() -> Result<bool> {
    // Its dependencies are the workspace's, so it usually needs no network.
    let mut offline = fuzz_command("check")?;
    if offline.arg("--offline").stderr(Stdio::null()).status()?.success() {
        return Ok(true);
    }
    Ok(fuzz_command("check")?.status()?.success())
}

/// `cargo COMMAND` for `fuzz/`, a workspace of its own, with a stand-in for the fuzzer's runtime.
pub(crate) fn fuzz_command(command: &str) -> Result<Command> {
    let (fuzz, lock) = (root().join("fuzz"), root().join("fuzz/Cargo.lock"));
    if !lock.exists() {
        // The same versions as in the workspace.
        std::fs::copy(root().join("Cargo.lock"), &lock)?;
    }
    let stand_in = format!("patch.crates-io.libfuzzer-sys.path='{}'", fuzz.join("stand-in").display());
    let mut cargo = cargo();
    cargo.args([command, "--quiet", "--config", &stand_in, "--config", "profile.dev.debug=false"]);
    cargo.arg("--manifest-path").arg(fuzz.join("Cargo.toml"));
    cargo.arg("--target-dir").arg(root().join("target/fuzz"));
    Ok(cargo)
}
