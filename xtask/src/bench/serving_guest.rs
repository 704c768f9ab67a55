//! A Linux guest that answers through vsock (`guest-vsock serve`), with whatever kernel there is.

use std::path::{Path, PathBuf};

use anyhow::Result;
use serde::{Deserialize, Serialize};
use vesta_tests::guest::{BOOT_ARGS, Guest};
use vesta_tests::initramfs::Initramfs;

use crate::kernels;
use crate::test::build_guest_program;

/// What it says when it answers.
pub(super) const SERVING: &str = "SERVING";

/// Its files.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub(super) struct ServingGuest {
    /// What people call its kernel.
    pub(super) kernel_name: String,
    kernel: PathBuf,
    initrd: PathBuf,
}

impl ServingGuest {
    /// One whose first process is a shell with this script, in which `guest-vsock` is a program.
    pub(super) fn make(dir: &Path, script: &str) -> Result<ServingGuest> {
        let (kernel, name) = match kernels::tuned()? {
            Some(kernel) => (kernel, "the tuned 6.12 kernel"),
            None => (kernels::debian(kernels::DEBIAN_6_12)?, "Debian's 6.12 cloud kernel"),
        };
        let mut initramfs = Initramfs::new(&kernels::busybox()?)?;
        if let Some(modules) = &kernel.modules {
            initramfs.modules(modules, &["virtio_mmio", "virtio_blk", "vmw_vsock_virtio_transport"])?;
        }
        initramfs.file("bin/guest-vsock", 0o755, &std::fs::read(build_guest_program()?)?);
        let initrd = dir.join("serving-initramfs");
        std::fs::write(&initrd, initramfs.finish(script))?;
        Ok(ServingGuest { kernel_name: name.to_owned(), kernel: kernel.image, initrd })
    }

    /// The guest, of one vCPU and 128 MiB.
    pub(super) fn guest(&self) -> Guest {
        let mut guest = Guest::bare(&self.kernel).boot_args(BOOT_ARGS);
        guest.initrd = Some(self.initrd.clone());
        guest
    }
}
