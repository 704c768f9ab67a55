//! Debian packages: installing missing ones, and unpacking others without installing them.

use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use anyhow::{Context, Result, bail};

use crate::process::{ScratchDir, output, run, say};

/// Installs the packages of missing files. Each entry is (file, package).
pub(crate) fn ensure(files: &[(&str, &'static str)]) -> Result<()> {
    let mut missing: Vec<&str> =
        files.iter().filter(|(file, _)| find(file).is_none()).map(|(_, package)| *package).collect();
    missing.dedup();
    if missing.is_empty() {
        return Ok(());
    }
    say!("installing missing Debian packages: {}", missing.join(" "));
    let install = || {
        let mut command = as_root("apt-get");
        command
            .args(["install", "-y", "-qq", "--no-install-recommends"])
            .args(&missing)
            .env("DEBIAN_FRONTEND", "noninteractive")
            .stdin(Stdio::null());
        output(&mut command)
    };
    with_update(install).map(drop)?;
    match files.iter().find(|(file, _)| find(file).is_none()) {
        Some((file, package)) => bail!("package {package} is installed, but {file} is missing"),
        None => Ok(()),
    }
}

/// Finds a program: an absolute path, or a name in `PATH` and in the directories for
/// administrators.
pub(crate) fn find(program: &str) -> Option<PathBuf> {
    let path = std::env::var_os("PATH").unwrap_or_default();
    std::env::split_paths(&path)
        .chain(["/usr/sbin", "/usr/bin", "/sbin", "/bin"].map(PathBuf::from))
        .map(|dir| dir.join(program))
        .find(|file| file.is_file())
}

/// A command that runs as root, through `sudo` if necessary.
fn as_root(program: &str) -> Command {
    if rustix::process::geteuid().is_root() {
        return Command::new(program);
    }
    let mut command = Command::new("sudo");
    command.args(["--", program]);
    command
}

/// Tries twice, with new package lists for the second attempt: a fresh machine has no lists, an old
/// one stale ones.
fn with_update<T>(mut attempt: impl FnMut() -> Result<T>) -> Result<T> {
    attempt().or_else(|_| {
        say!("fetching Debian's package lists");
        output(as_root("apt-get").args(["update", "-qq"]).stdin(Stdio::null()))?;
        attempt()
    })
}

/// The package that a meta-package depends on: `linux-image-6.12-cloud-amd64` names the newest
/// build.
pub(crate) fn resolve_meta(meta: &str) -> Result<String> {
    with_update(|| {
        let depends = output(Command::new("apt-cache").args(["depends", meta]))?;
        let dependency = |line: &str| line.trim().strip_prefix("Depends: ").map(str::to_owned);
        let package =
            depends.lines().filter_map(dependency).find(|package| package.starts_with("linux-image-"));
        package.with_context(|| format!("Debian package {meta}: depends on no kernel"))
    })
}

/// Downloads a package and unpacks it into `target`, without installing it.
pub(crate) fn unpack(package: &str, target: &Path) -> Result<()> {
    unpack_all(&[package.to_owned()], target)
}

/// Downloads packages and unpacks them into `target`, without installing them.
pub(crate) fn unpack_all(packages: &[String], target: &Path) -> Result<()> {
    match packages {
        [package] => say!("fetching Debian package {package}"),
        several => say!("fetching {} Debian packages", several.len()),
    }
    let scratch = ScratchDir::new()?;
    with_update(|| {
        // apt's own unprivileged user cannot write to our directory.
        let mut command = Command::new("apt-get");
        command.args(["download", "-qq", "-o", "APT::Sandbox::User=root"]).args(packages);
        output(command.current_dir(scratch.path()).stdin(Stdio::null()))
    })?;
    let files = std::fs::read_dir(scratch.path())?.flatten().map(|entry| entry.path());
    let files: Vec<_> = files.filter(|path| path.extension().is_some_and(|kind| kind == "deb")).collect();
    if files.len() != packages.len() {
        bail!("apt-get downloaded {} files for {} packages", files.len(), packages.len());
    }
    for file in files {
        run(Command::new("dpkg-deb").arg("--extract").arg(file).arg(target))?;
    }
    Ok(())
}

/// These packages and all their dependencies, whatever is installed on this machine.
pub(crate) fn with_dependencies(packages: &[&str]) -> Result<Vec<String>> {
    with_update(|| {
        let mut command = Command::new("apt-get");
        command.args(["install", "--simulate", "-o", "Dir::State::status=/dev/null"]);
        command.args(["-o", "APT::Install-Recommends=false"]).args(packages);
        let plan = output(command.stdin(Stdio::null()))?;
        let installed = plan.lines().filter_map(|line| line.strip_prefix("Inst ")?.split(' ').next());
        Ok(installed.map(str::to_owned).collect())
    })
}
