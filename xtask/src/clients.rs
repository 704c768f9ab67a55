//! Clients of Firecracker from package registries, which the tests called `clients` run. None is a
//! dependency of the project.

use std::path::PathBuf;

use anyhow::Result;

use crate::pip;
use crate::process::{cargo, once_in, root, run};

/// The directory in the cache. The number counts changes of its requirements.
const PYTHON: &str = "firecracker-python-0.0.5-1";

/// The directory with the package firecracker-python and what it needs, for `PYTHONPATH`.
pub(crate) fn python() -> Result<PathBuf> {
    let requirements = root().join("tests/clients/firecracker-python/requirements.txt");
    once_in("clients", PYTHON, |dir| pip::install(&requirements, dir))
}

/// Fetches the crate firecracker-rs-sdk and what it needs.
pub(crate) fn fetch_rust() -> Result<()> {
    run(cargo().args(["fetch", "--quiet", "--locked", "--manifest-path"]).arg(rust_manifest()))
}

/// Builds the program with the crate firecracker-rs-sdk, once that is fetched; returns its path.
pub(crate) fn rust() -> Result<PathBuf> {
    let target = root().join("target/clients");
    run(cargo()
        .args(["build", "--quiet", "--locked", "--offline", "--manifest-path"])
        .arg(rust_manifest())
        .arg("--target-dir")
        .arg(&target))?;
    Ok(target.join("x86_64-unknown-linux-gnu/debug/vesta-rs-sdk-client"))
}

fn rust_manifest() -> PathBuf {
    root().join("tests/clients/rs-sdk/Cargo.toml")
}
