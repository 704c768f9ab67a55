//! The disks that are measured, as the host sees them.
//!
//! - `file`: a file that is wholly in the page cache, so that only the path to it is measured. On
//!   an emulated host it is on ext4 on a disk in memory, because the root file system there (FUSE)
//!   and tmpfs serve `io_uring` through threads only.
//! - `slow`: the kernel's `null_blk` with a delay for each transfer, where this user may make one.
//!   It shows the effect of many requests in flight.
//! - With `--disk`, that file or device instead of both.

use std::any::Any;
use std::fs::File;
use std::io::Write;
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context, Result};
use rustix::fs::{Advice, SeekFrom, fadvise};
use rustix::mount::{MountFlags, UnmountFlags, mount, unmount};
use serde::{Deserialize, Serialize};

use crate::process::{ScratchDir, run, say};

const FILE_BYTES: u64 = 128 << 20;
/// Large enough that random sectors are hardly ever in the page cache.
const SLOW_MIB: u64 = 64 << 10;
/// Where the kernel makes `null_blk` devices.
const CONFIGFS: &str = "/sys/kernel/config";
/// Labels of disks.
const FILE: &str = "file";
pub(super) const SLOW: &str = "slow";
/// The beginning of our devices' names.
const PREFIX: &str = "vesta-bench";

/// Which disks to make.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub(super) struct DiskPlan {
    pub(super) emulated: bool,
    pub(super) given: Option<PathBuf>,
    /// A directory for the file, where the host is this machine.
    pub(super) dir: PathBuf,
}

/// One disk. Guests find it by its size.
#[derive(Debug, Clone)]
pub(super) struct Disk {
    pub(super) label: String,
    pub(super) path: PathBuf,
    pub(super) bytes: u64,
    /// Its description, for the table.
    pub(super) what: String,
}

/// All disks. They are removed when this is dropped.
pub(super) struct Disks {
    list: Vec<Disk>,
    /// A directory on the same file system as the file, for overlays.
    dir: PathBuf,
    /// What dropping removes, in this order.
    held: Vec<Box<dyn Any>>,
    scratch: ScratchDir,
}

impl Disks {
    pub(super) fn make(plan: &DiskPlan) -> Result<Disks> {
        let scratch = ScratchDir::new()?;
        let mut disks = Disks { list: Vec::new(), dir: plan.dir.clone(), held: Vec::new(), scratch };
        if let Some(path) = &plan.given {
            let bytes = size(path)?;
            let what = format!("`{}` ({} MiB), buffered", path.display(), bytes >> 20);
            disks.list.push(Disk { label: "disk".to_owned(), path: path.clone(), bytes, what });
            return Ok(disks);
        }
        let mut place = "the build directory's file system";
        if plan.emulated {
            // Its kernel has these file systems and does not mount them.
            mount_at("configfs", Path::new(CONFIGFS))?;
            mount_at("debugfs", Path::new("/sys/kernel/debug"))?;
            let memory = NullDisk::make("memory", &[("size", "512"), ("memory_backed", "1")])?;
            run(Command::new("mkfs.ext4").args(["-q", "-m", "0"]).arg(&memory.node))?;
            let dir = disks.scratch.path().join("ext4");
            std::fs::create_dir(&dir)?;
            mount(&memory.node, &dir, "ext4", MountFlags::NOATIME, None).context("cannot mount ext4")?;
            disks.held.push(Box::new(Mounted(dir.clone())));
            disks.held.push(Box::new(memory));
            disks.dir = dir;
            place = "ext4 on a disk in memory";
        }
        let path = disks.dir.join("disk");
        write_file(&path)?;
        disks.held.push(Box::new(Remove(path.clone())));
        let what = format!("a file of {} MiB in the page cache ({place})", FILE_BYTES >> 20);
        disks.list.push(Disk { label: FILE.to_owned(), path, bytes: FILE_BYTES, what });
        // Like an NVMe disk; slower in proportion where processors are emulated.
        let micros = if plan.emulated { 1000 } else { 80 };
        match slow_disk(micros) {
            Ok(slow) => {
                let what =
                    format!("a simulated disk (`null_blk`) of {micros} us for each transfer, buffered");
                let bytes = size(&slow.node)?;
                disks.list.push(Disk { label: SLOW.to_owned(), path: slow.node.clone(), bytes, what });
                disks.held.push(Box::new(slow));
            }
            Err(error) => say!("no simulated slow disk here: {error:#}"),
        }
        Ok(disks)
    }

    pub(super) fn list(&self) -> &[Disk] {
        &self.list
    }

    /// The directory for overlays.
    pub(super) fn dir(&self) -> &Path {
        &self.dir
    }

    /// Drops the pages of all disks but `file` from the page cache.
    pub(super) fn forget(&self) -> Result<()> {
        for disk in self.list.iter().filter(|disk| disk.label != FILE) {
            let file = File::options().read(true).write(true).open(&disk.path)?;
            file.sync_all()?;
            fadvise(&file, 0, None, Advice::DontNeed)?;
        }
        Ok(())
    }
}

fn slow_disk(micros: u64) -> Result<NullDisk> {
    if !Path::new(CONFIGFS).join("nullb").is_dir() {
        run(Command::new("modprobe").args(["null_blk", "nr_devices=0"]))?;
    }
    let (nanos, size) = ((micros * 1000).to_string(), SLOW_MIB.to_string());
    NullDisk::make(
        "slow",
        &[("size", &size), ("irqmode", "2"), ("completion_nsec", &nanos), ("blocksize", "512")],
    )
}

fn size(path: &Path) -> Result<u64> {
    let file = File::open(path).with_context(|| path.display().to_string())?;
    Ok(rustix::fs::seek(&file, SeekFrom::End(0))?)
}

fn write_file(path: &Path) -> Result<()> {
    let mut file = File::create(path).with_context(|| path.display().to_string())?;
    let chunk = vec![0x5a; 1 << 20];
    for _ in 0..FILE_BYTES >> 20 {
        file.write_all(&chunk)?;
    }
    Ok(file.sync_all()?)
}

fn mount_at(kind: &str, target: &Path) -> Result<()> {
    mount("none", target, kind, MountFlags::empty(), None)
        .with_context(|| format!("cannot mount {kind} on {}", target.display()))
}

/// A mounted file system, unmounted when this is dropped.
struct Mounted(PathBuf);

impl Drop for Mounted {
    fn drop(&mut self) {
        let _ = unmount(&self.0, UnmountFlags::DETACH);
    }
}

/// A file, removed when this is dropped.
struct Remove(PathBuf);

impl Drop for Remove {
    fn drop(&mut self) {
        let _ = std::fs::remove_file(&self.0);
    }
}

/// A `null_blk` device, removed when this is dropped.
struct NullDisk {
    config: PathBuf,
    node: PathBuf,
}

impl NullDisk {
    fn make(name: &str, attributes: &[(&str, &str)]) -> Result<NullDisk> {
        let config = Path::new(CONFIGFS).join("nullb").join(format!("{PREFIX}-{name}"));
        if config.exists() {
            // One that was killed left it.
            remove_null(&config);
        }
        std::fs::create_dir(&config).with_context(|| config.display().to_string())?;
        let mut disk = NullDisk { node: PathBuf::new(), config };
        for (attribute, value) in attributes.iter().chain(&[("power", "1")]) {
            let file = disk.config.join(attribute);
            std::fs::write(&file, value).with_context(|| format!("{} to {value}", file.display()))?;
        }
        let index = std::fs::read_to_string(disk.config.join("index"))?;
        disk.node = format!("/dev/nullb{}", index.trim()).into();
        // Newer kernels use the name of its configfs directory.
        let named = Path::new("/dev").join(format!("{PREFIX}-{name}"));
        if named.exists() {
            disk.node = named;
        }
        Ok(disk)
    }
}

impl Drop for NullDisk {
    fn drop(&mut self) {
        remove_null(&self.config);
    }
}

fn remove_null(config: &Path) {
    let _ = std::fs::write(config.join("power"), "0");
    let _ = std::fs::remove_dir(config);
}
