//! The guest that every contestant boots, and the arguments of its load generator.

use std::fmt::Write as _;
use std::path::{Path, PathBuf};
use std::time::Duration;

use anyhow::{Context, Result};
use serde::{Deserialize, Serialize};
use vesta_tests::guest::{BOOT_ARGS, Guest};
use vesta_tests::initramfs::Initramfs;
use vesta_tests::load::Workload;
use vesta_tests::modules::Modules;

use super::disks::Disks;
use crate::process::ScratchDir;

/// Longest wait for a guest or a workload, in addition to the workload's own time.
pub(super) const TIMEOUT: Duration = Duration::from_mins(1);

/// The files of the guest.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub(super) struct GuestParts {
    pub(super) kernel: PathBuf,
    pub(super) modules: Option<PathBuf>,
    pub(super) busybox: PathBuf,
    /// The load generator.
    pub(super) load: PathBuf,
}

/// What all contestants share.
pub(super) struct Setup<'a> {
    pub(super) guest: Guest,
    pub(super) disks: &'a Disks,
    /// The load generator's arguments on the host.
    pub(super) load_args: Vec<String>,
    pub(super) workloads: &'a [Workload],
    pub(super) time: Duration,
    _scratch: ScratchDir,
}

impl<'a> Setup<'a> {
    pub(super) fn new(
        parts: &GuestParts,
        disks: &'a Disks,
        workloads: &'a [Workload],
        seconds: f64,
    ) -> Result<Self> {
        let scratch = ScratchDir::new()?;
        let list: Vec<String> = workloads.iter().map(Workload::to_string).collect();
        let args = format!("--seconds {seconds} {}", list.join(" "));
        let sizes: Vec<(String, u64)> =
            disks.list().iter().map(|disk| (disk.label.clone(), disk.bytes)).collect();
        let guest = guest(parts, &sizes, &args, scratch.path())?;
        let mut load_args: Vec<String> = args.split(' ').map(str::to_owned).collect();
        load_args.extend(disks.list().iter().map(|disk| format!("{}={}", disk.label, disk.path.display())));
        let time = Duration::try_from_secs_f64(seconds)?;
        Ok(Setup { guest, disks, load_args, workloads, time, _scratch: scratch })
    }
}

/// Makes the guest. It tells its disks apart by their sizes.
fn guest(parts: &GuestParts, setup: &[(String, u64)], load_args: &str, dir: &Path) -> Result<Guest> {
    let mut disk = Initramfs::new(&parts.busybox)?;
    if let Some(modules) = &parts.modules {
        disk.modules(&Modules::new(modules), &["virtio_mmio", "virtio_pci", "virtio_blk"])?;
    }
    let load = std::fs::read(&parts.load).with_context(|| parts.load.display().to_string())?;
    disk.file("bin/vesta-load", 0o755, &load);
    let mut cases = String::new();
    for (label, bytes) in setup {
        // Infallible: it writes to a String.
        let _ = write!(cases, "{}) disks=\"$disks {label}=/dev/${{d##*/}}\" ;; ", bytes / 512);
    }
    let script = format!(
        "for d in /sys/block/vd*; do case $(cat $d/size) in {cases} esac; done\n\
         vesta-load --direct {load_args} $disks || echo vesta-load: failed\nsleep 1000"
    );
    let initrd = dir.join("initramfs");
    std::fs::write(&initrd, disk.finish(&script))?;
    let mut guest = Guest::bare(&parts.kernel).boot_args(BOOT_ARGS);
    guest.initrd = Some(initrd);
    Ok(guest)
}
