//! `cargo xtask kernel`: builds the guest kernel of `guest/micro.config` from Debian's sources.

use std::path::Path;
use std::process::{Command, ExitCode};

use anyhow::{Context, Result};

use crate::apt;
use crate::kernels;
use crate::process::{cache_dir, root, run, say};

/// The package with the sources, and the archive in it.
const SOURCE_PACKAGE: &str = "linux-source-6.12";
const TARBALL: &str = "usr/src/linux-source-6.12.tar.xz";

pub(crate) fn command(parser: &mut lexopt::Parser) -> Result<ExitCode> {
    if let Some(arg) = parser.next()? {
        return Err(arg.unexpected().into());
    }
    apt::ensure(&[
        ("make", "make"),
        ("gcc", "gcc"),
        ("flex", "flex"),
        ("bison", "bison"),
        ("bc", "bc"),
        ("xz", "xz-utils"),
        ("../include/libelf.h", "libelf-dev"),
        ("../include/openssl/ssl.h", "libssl-dev"),
    ])?;
    let image = kernels::built()?;
    let dir = cache_dir()?.join("kernel-build");
    let source = unpack(&dir)?;
    configure(&source)?;
    let jobs = std::thread::available_parallelism()?;
    say!("building vmlinux with {jobs} jobs (about ten minutes on two processors)");
    run(make(&source).arg(format!("-j{jobs}")).arg("vmlinux"))?;
    let part = image.with_extension("part");
    std::fs::create_dir_all(image.parent().context("it is in a directory")?)?;
    run(Command::new("strip").arg("--strip-debug").arg("-o").arg(&part).arg(source.join("vmlinux")))?;
    std::fs::rename(&part, &image)?;
    say!("the tuned kernel is {}; tests, demo and benchmarks use it from now on", image.display());
    Ok(ExitCode::SUCCESS)
}

/// Unpacks Debian's newest source tree into `dir`, and removes what an earlier build left there.
fn unpack(dir: &Path) -> Result<std::path::PathBuf> {
    if dir.exists() {
        std::fs::remove_dir_all(dir)?;
    }
    std::fs::create_dir_all(dir)?;
    let package = dir.join("package");
    apt::unpack(SOURCE_PACKAGE, &package)?;
    let source = dir.join("source");
    std::fs::create_dir(&source)?;
    say!("unpacking the sources");
    run(Command::new("tar")
        .args(["--strip-components=1", "-xJf"])
        .arg(package.join(TARBALL))
        .arg("-C")
        .arg(&source))?;
    std::fs::remove_dir_all(&package)?;
    Ok(source)
}

/// Writes the kernel's smallest configuration with our options added.
fn configure(source: &Path) -> Result<()> {
    let fragment = root().join("guest/micro.config");
    run(make(source).arg("tinyconfig"))?;
    let mut merge = Command::new("scripts/kconfig/merge_config.sh");
    run(merge.args(["-m", ".config"]).arg(fragment).current_dir(source))?;
    run(make(source).arg("olddefconfig"))
}

fn make(source: &Path) -> Command {
    let mut command = Command::new("make");
    command.arg("--quiet").current_dir(source);
    command
}
