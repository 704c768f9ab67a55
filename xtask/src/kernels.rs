//! Guest and host kernels, each fetched or unpacked once and kept in the cache.
//!
//! A kernel is a directory that is written under a temporary name and renamed when it is complete.

use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context, Result, bail};
use vesta_tests::modules::{Modules, normal_name};

use crate::apt;
use crate::process::{cache_dir, once_in, output, root, run};

/// A kernel image on disk.
#[derive(Debug, Clone)]
pub(crate) struct Kernel {
    /// An ELF `vmlinux` or a `bzImage`.
    pub(crate) image: PathBuf,
    /// Its modules, where it has any.
    pub(crate) modules: Option<Modules>,
}

/// Debian 12's kernel for virtual machines.
pub(crate) const DEBIAN_6_1: &str = "linux-image-cloud-amd64";
/// The kernel for virtual machines that Debian 12 takes from Debian 13.
pub(crate) const DEBIAN_6_12: &str = "linux-image-6.12-cloud-amd64";

/// A Debian kernel, by its meta-package.
pub(crate) fn debian(meta: &str) -> Result<Kernel> {
    let dir = once(meta, |dir| {
        apt::ensure(&[("xz", "xz-utils")])?;
        let package = apt::resolve_meta(meta)?;
        let tree = dir.join("tree");
        apt::unpack(&package, &tree)?;
        let release = package.trim_start_matches("linux-image-");
        std::fs::rename(tree.join(format!("boot/vmlinuz-{release}")), dir.join("vmlinuz"))
            .with_context(|| format!("package {package} has no boot/vmlinuz-{release}"))?;
        std::fs::rename(tree.join(format!("boot/config-{release}")), dir.join("config"))?;
        let modules = dir.join("modules");
        std::fs::create_dir(&modules)?;
        flatten(&tree.join("lib/modules"), &modules)?;
        decompress_all(&modules)?;
        std::fs::remove_dir_all(&tree)?;
        let aliases: Vec<String> = Modules::new(&modules)
            .read_aliases()?
            .into_iter()
            .map(|(alias, module)| format!("{alias} {module}\n"))
            .collect();
        std::fs::write(dir.join("aliases"), aliases.concat())?;
        std::fs::write(dir.join("release"), release)?;
        Ok(())
    })?;
    Ok(Kernel { image: dir.join("vmlinuz"), modules: Some(Modules::new(dir.join("modules"))) })
}

/// The project's own kernel (guest/): from `VESTA_TUNED_KERNEL`, from a `shared` directory beside
/// the repository, or as `cargo xtask kernel` built it. It is optional.
pub(crate) fn tuned() -> Result<Option<Kernel>> {
    let source = match std::env::var_os("VESTA_TUNED_KERNEL").map(PathBuf::from) {
        Some(path) if path.is_file() => Some(path),
        Some(path) => bail!("VESTA_TUNED_KERNEL is {}: no such file", path.display()),
        None => tuned_places()?.into_iter().find(|path| path.is_file()),
    };
    let Some(source) = source else { return Ok(None) };
    if source.extension().is_none_or(|kind| kind != "zst") {
        return Ok(Some(Kernel { image: source, modules: None }));
    }
    let stat = rustix::fs::stat(&source)?;
    let dir = once(&format!("tuned-{}-{}", stat.st_size, stat.st_mtime), |dir| {
        apt::ensure(&[("zstd", "zstd")])?;
        run(Command::new("zstd").args(["-dq", "-o"]).arg(dir.join("vmlinux")).arg(&source))
    })?;
    Ok(Some(Kernel { image: dir.join("vmlinux"), modules: None }))
}

/// The tuned kernel where there is one, else Debian's 6.12 kernel; with its description.
pub(crate) fn preferred() -> Result<(Kernel, &'static str)> {
    Ok(match tuned()? {
        Some(kernel) => (kernel, "the tuned 6.12 kernel"),
        None => (debian(DEBIAN_6_12)?, "Debian's 6.12 cloud kernel"),
    })
}

/// Where `cargo xtask kernel` puts the kernel.
pub(crate) fn built() -> Result<PathBuf> {
    Ok(cache_dir()?.join("kernels/built/vmlinux"))
}

fn tuned_places() -> Result<Vec<PathBuf>> {
    let mut checkouts = vec![root().to_owned()];
    // In a worktree, the directory beside the main checkout is searched too.
    let git = output(
        Command::new("git")
            .args(["rev-parse", "--path-format=absolute", "--git-common-dir"])
            .current_dir(root()),
    );
    checkouts.extend(git.ok().and_then(|dir| Some(Path::new(dir.trim()).parent()?.to_owned())));
    let beside =
        checkouts.iter().filter_map(|dir| Some(dir.parent()?.join("shared/guest/vmlinux-6.12-micro.zst")));
    Ok(std::iter::once(built()?).chain(beside).collect())
}

/// Busybox, linked statically: the programs of a guest's initramfs.
pub(crate) fn busybox() -> Result<PathBuf> {
    let dir = once("busybox", |dir| {
        let tree = dir.join("tree");
        apt::unpack("busybox-static", &tree)?;
        std::fs::rename(tree.join("bin/busybox"), dir.join("busybox"))
            .context("busybox-static has no bin/busybox")?;
        std::fs::remove_dir_all(&tree)?;
        Ok(())
    })?;
    Ok(dir.join("busybox"))
}

/// Debian's memtest86+: a guest that is not Linux, as a `bzImage`.
pub(crate) fn memtest() -> Result<PathBuf> {
    let dir = once("memtest86", |dir| {
        let tree = dir.join("tree");
        apt::unpack("memtest86+", &tree)?;
        std::fs::rename(tree.join("boot/memtest86+x64.bin"), dir.join("memtest"))
            .context("memtest86+ has no boot/memtest86+x64.bin")?;
        std::fs::remove_dir_all(&tree)?;
        Ok(())
    })?;
    Ok(dir.join("memtest"))
}

/// The directory `kernels/NAME` of the cache: see [`once_in`].
pub(crate) fn once(name: &str, make: impl FnOnce(&Path) -> Result<()>) -> Result<PathBuf> {
    once_in("kernels", name, make)
}

/// Moves every module under `from` into `to`, by its normal name.
fn flatten(from: &Path, to: &Path) -> Result<()> {
    for entry in std::fs::read_dir(from).with_context(|| from.display().to_string())? {
        let path = entry?.path();
        if path.is_dir() {
            flatten(&path, to)?;
        } else if let Some((name, kind)) = path.file_name().and_then(|name| name.to_str()?.split_once(".ko"))
        {
            std::fs::rename(&path, to.join(format!("{}.ko{kind}", normal_name(name))))?;
        }
    }
    Ok(())
}

fn decompress_all(dir: &Path) -> Result<()> {
    let mut files = Vec::new();
    for entry in std::fs::read_dir(dir)? {
        let path = entry?.path();
        if path.extension().is_some_and(|kind| kind == "xz") {
            files.push(path);
        }
    }
    for chunk in files.chunks(256) {
        run(Command::new("xz").args(["-d", "-T0", "--"]).args(chunk))?;
    }
    Ok(())
}
