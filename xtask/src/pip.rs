//! Python packages: files from them, because some programs are published as such, and libraries.

use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use anyhow::{Context, Result};

use crate::apt;
use crate::process::{ScratchDir, once_in, output, root};

/// What to install for [`schemathesis`]: exact versions, each with the digests of its files.
const SCHEMATHESIS: &str = "tests/schemathesis/requirements.txt";

/// A directory with schemathesis and all that it needs, for `PYTHONPATH`. It is named after the
/// version of schemathesis and Python's.
pub(crate) fn schemathesis() -> Result<PathBuf> {
    apt::ensure(&[("pip3", "python3-pip")])?;
    let requirements = root().join(SCHEMATHESIS);
    let listed = std::fs::read_to_string(&requirements).context(SCHEMATHESIS)?;
    let release = listed.lines().find_map(|line| line.strip_prefix("schemathesis=="));
    let release = release.and_then(|rest| rest.split_whitespace().next()).context(SCHEMATHESIS)?;
    let version = "import sys; print('%d.%d' % sys.version_info[:2])";
    let python = output(Command::new("python3").args(["-c", version]))?;
    once_in("tools", &format!("schemathesis-{release}-python-{}", python.trim()), |directory| {
        let mut pip = Command::new("python3");
        pip.args(["-m", "pip", "install", "--quiet", "--disable-pip-version-check", "--no-deps"]);
        pip.args(["--require-hashes", "--only-binary=:all:", "--target"]).arg(directory);
        pip.arg("--requirement").arg(&requirements).stdin(Stdio::null());
        output(&mut pip).map(drop)
    })
}

/// A release of a package, and the SHA-256 of its wheel.
pub(crate) struct Wheel {
    pub(crate) name: &'static str,
    pub(crate) version: &'static str,
    pub(crate) sha256: &'static str,
}

impl Wheel {
    /// Downloads the wheel and unpacks it into `target`, which must not exist. pip checks the
    /// digest. Nothing of it is run or installed.
    pub(crate) fn unpack(&self, target: &Path) -> Result<()> {
        apt::ensure(&[("pip3", "python3-pip")])?;
        let scratch = ScratchDir::new()?;
        let requirements = scratch.path().join("requirements");
        let Wheel { name, version, sha256 } = self;
        std::fs::write(&requirements, format!("{name}=={version} --hash=sha256:{sha256}\n"))?;
        let mut pip = Command::new("pip3");
        pip.args(["download", "--quiet", "--disable-pip-version-check", "--no-deps", "--require-hashes"]);
        // A package may ask for a newer Python than is installed.
        pip.args(["--python-version", "3.13", "--only-binary=:all:", "--dest"]).arg(scratch.path());
        output(pip.arg("--requirement").arg(&requirements).stdin(Stdio::null()))?;
        let wheel = std::fs::read_dir(scratch.path())?
            .flatten()
            .map(|entry| entry.path())
            .find(|path| path.extension().is_some_and(|extension| extension == "whl"))
            .context("pip downloaded no wheel")?;
        output(Command::new("python3").args(["-m", "zipfile", "-e"]).arg(&wheel).arg(target)).map(drop)
    }
}

/// Installs packages into `target`, for Python's `PYTHONPATH`. `requirements` names each with its
/// version and the SHA-256 of its wheels, which pip checks.
pub(crate) fn install(requirements: &Path, target: &Path) -> Result<()> {
    apt::ensure(&[("pip3", "python3-pip")])?;
    let mut pip = Command::new("pip3");
    pip.args(["install", "--quiet", "--disable-pip-version-check", "--no-deps", "--require-hashes"]);
    pip.args(["--only-binary=:all:", "--root-user-action=ignore", "--target"]).arg(target);
    output(pip.arg("--requirement").arg(requirements).stdin(Stdio::null())).map(drop)
}
