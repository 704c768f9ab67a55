//! A Linux guest that serves vsock connections (`guest-vsock serve`), with the preferred kernel.

use std::path::{Path, PathBuf};

use anyhow::Result;
use serde::{Deserialize, Serialize};
use vesta_tests::guest::{BOOT_ARGS, Guest};
use vesta_tests::initramfs::Initramfs;

use crate::kernels;
use crate::test::build_guest_program;

/// What it prints once it serves.
pub(super) const SERVING: &str = "SERVING";

/// The files of the guest.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub(super) struct ServingGuest {
    /// A description of its kernel.
    pub(super) kernel_name: String,
    kernel: PathBuf,
    initrd: PathBuf,
}

impl ServingGuest {
    /// Makes the files. The first process is a shell with this script, which may run `guest-vsock`.
    pub(super) fn make(dir: &Path, script: &str) -> Result<ServingGuest> {
        let (kernel, name) = kernels::preferred()?;
        let mut initramfs = Initramfs::new(&kernels::busybox()?)?;
        if let Some(modules) = &kernel.modules {
            initramfs.modules(modules, &["virtio_mmio", "virtio_blk", "vmw_vsock_virtio_transport"])?;
        }
        initramfs.file("bin/guest-vsock", 0o755, &std::fs::read(build_guest_program()?)?);
        let initrd = dir.join("serving-initramfs");
        std::fs::write(&initrd, initramfs.finish(script))?;
        Ok(ServingGuest { kernel_name: name.to_owned(), kernel: kernel.image, initrd })
    }

    /// The guest, with one vCPU and 128 MiB.
    pub(super) fn guest(&self) -> Guest {
        let mut guest = Guest::bare(&self.kernel).boot_args(BOOT_ARGS);
        guest.initrd = Some(self.initrd.clone());
        guest
    }
}
