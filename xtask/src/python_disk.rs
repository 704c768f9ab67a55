//! A guest's disk with clients of metadata services: Python with the AWS SDK, cloud-init and curl.
//!
//! It is an ext4 image, made once of Debian packages and kept in the cache; that needs no root.
//! Python's byte code is compiled here: a guest on an emulated host would need a minute for it at
//! every start.

use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context, Result};

use crate::apt;
use crate::kernels::once;
use crate::process::run;

/// Packages that are unpacked with their dependencies.
const PACKAGES: [&str; 10] = [
    "curl",
    "python3-boto3",
    // Needed by the parts of cloud-init that are used.
    "python3-configobj",
    "python3-jinja2",
    "python3-jsonpatch",
    "python3-jsonschema",
    "python3-netifaces",
    "python3-oauthlib",
    "python3-requests",
    "python3-yaml",
];

/// A package that is unpacked without its dependencies, which are most of a system.
const ALONE: &str = "cloud-init";

/// The size of the file system, in 4 KiB blocks.
const BLOCKS: &str = "65536";

/// The path of the image.
pub(crate) fn image() -> Result<PathBuf> {
    let dir = once("python-disk-1", |dir| {
        apt::ensure(&[("mke2fs", "e2fsprogs")])?;
        let tree = dir.join("tree");
        std::fs::create_dir(&tree)?;
        let mut packages = apt::with_dependencies(&PACKAGES)?;
        packages.push(ALONE.to_owned());
        apt::unpack_all(&packages, &tree)?;
        thin(&tree)?;
        compile(&tree)?;
        let image = dir.join("disk.ext4");
        run(Command::new("/sbin/mke2fs")
            .args(["-q", "-t", "ext4", "-O", "^has_journal", "-b", "4096", "-d"])
            .arg(&tree)
            .arg(&image)
            .arg(BLOCKS))?;
        std::fs::remove_dir_all(&tree)?;
        Ok(())
    })?;
    Ok(dir.join("disk.ext4"))
}

/// Removes files that no guest reads, most of them descriptions of AWS services.
fn thin(tree: &Path) -> Result<()> {
    for name in ["doc", "man", "locale", "zoneinfo", "info", "lintian"] {
        let path = tree.join("usr/share").join(name);
        if path.exists() {
            std::fs::remove_dir_all(path)?;
        }
    }
    let services = tree.join("usr/lib/python3/dist-packages/botocore/data");
    for entry in std::fs::read_dir(&services).with_context(|| services.display().to_string())? {
        let path = entry?.path();
        if path.is_dir() && !path.ends_with("sts") {
            std::fs::remove_dir_all(path)?;
        }
    }
    for name in ["proc", "sys", "dev", "tmp", "run"] {
        std::fs::create_dir_all(tree.join(name))?;
    }
    Ok(())
}

/// Compiles Python's libraries with the Python in the tree.
fn compile(tree: &Path) -> Result<()> {
    let libraries = tree.join("lib/x86_64-linux-gnu");
    let search = [libraries.clone(), tree.join("usr/lib/x86_64-linux-gnu")];
    let search = std::env::join_paths(search)?;
    let python = tree.join("usr/bin/python3").canonicalize()?;
    let version = python.file_name().context("a program has a name")?;
    run(Command::new(libraries.join("ld-linux-x86-64.so.2"))
        .arg("--library-path")
        .arg(search)
        .arg(&python)
        .args(["-m", "compileall", "-q", "--invalidation-mode", "unchecked-hash"])
        .arg(tree.join("usr/lib").join(version))
        .arg(tree.join("usr/lib/python3"))
        .env("PYTHONHOME", tree.join("usr")))
}
