//! The configuration of guests, and the kernels that the test runner provides.

use std::path::{Path, PathBuf};

use anyhow::{Context, Result};
use serde_json::{Value, json};

use crate::api::ApiClient;
use crate::initramfs::Initramfs;
use crate::modules::Modules;
use crate::vmm::{Vmm, VmmBuilder};

/// Environment variables that the test runner sets.
pub mod env {
    /// The monitor under test.
    pub const VMM: &str = "VESTA_VMM";
    /// The tuned kernel; not set if there is none.
    pub const TUNED: &str = "VESTA_KERNEL_TUNED";
    /// Debian's 6.1 cloud kernel; its modules are in `modules` beside it.
    pub const DEBIAN_6_1: &str = "VESTA_KERNEL_DEBIAN_6_1";
    /// Debian's 6.12 cloud kernel; its modules are in `modules` beside it.
    pub const DEBIAN_6_12: &str = "VESTA_KERNEL_DEBIAN_6_12";
    /// Busybox, static.
    pub const BUSYBOX: &str = "VESTA_BUSYBOX";
    /// Debian's memtest86+ for x86_64, a `bzImage`; set if a selected test needs it.
    pub const MEMTEST: &str = "VESTA_MEMTEST";
    /// An ext4 image with curl, Python, the AWS SDK and cloud-init; set if a selected test needs
    /// it.
    pub const PYTHON_DISK: &str = "VESTA_PYTHON_DISK";
    /// A directory of Python packages, schemathesis among them; set if a selected test needs it.
    pub const SCHEMATHESIS: &str = "VESTA_SCHEMATHESIS";
    /// The example in Rust; set if a selected test needs it.
    pub const EXAMPLE: &str = "VESTA_EXAMPLE";
    /// The directory of the Python package firecracker-python; not set if it cannot be fetched.
    pub const PYTHON_SDK: &str = "VESTA_PYTHON_SDK";
    /// The program with the crate firecracker-rs-sdk; not set if that cannot be fetched.
    pub const RUST_SDK: &str = "VESTA_RUST_SDK";
    /// Set by the runner, which runs each test in its own process and knows
    /// [`IGNORED_STATUS`](super::IGNORED_STATUS).
    pub const RUNNER: &str = "VESTA_TEST_RUNNER";
}

/// The exit status of an ignored test. Its last line on standard error has the reason.
pub const IGNORED_STATUS: u8 = 86;
/// The beginning of that line.
pub const IGNORED_MARK: &str = "vesta-test-ignored: ";

/// Ends this test as one that cannot run here. The runner counts it and shows the reason.
///
/// # Panics
///
/// Panics without the runner, because the test would seem to pass.
pub fn ignore(reason: &str) -> ! {
    assert!(std::env::var_os(env::RUNNER).is_some(), "this test cannot run here: {reason}");
    eprintln!("{IGNORED_MARK}{reason}");
    std::process::exit(IGNORED_STATUS.into());
}

/// The path in an environment variable of the runner.
///
/// # Panics
///
/// Panics if it is not set: whole-system tests need the runner.
pub fn required_path(name: &str) -> PathBuf {
    std::env::var_os(name)
        .unwrap_or_else(|| panic!("{name} is not set: run this through `cargo xtask test`"))
        .into()
}

/// The monitor under test.
pub fn vmm_path() -> PathBuf {
    required_path(env::VMM)
}

/// Busybox, linked statically.
pub fn busybox() -> PathBuf {
    required_path(env::BUSYBOX)
}

/// The guest kernels.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Kernel {
    /// The project's own kernel: an ELF `vmlinux` without modules, which also boots with
    /// `acpi=off`.
    Tuned,
    /// Debian 12's 6.1 cloud kernel: a `bzImage`.
    Debian6_1,
    /// Debian's 6.12 cloud kernel: a `bzImage`.
    Debian6_12,
}

impl Kernel {
    /// The kernel image. A test that needs the tuned kernel is ignored if there is none.
    pub fn image(self) -> PathBuf {
        match self {
            Kernel::Tuned if std::env::var_os(env::TUNED).is_none() => {
                ignore("there is no tuned kernel here")
            }
            Kernel::Tuned => required_path(env::TUNED),
            Kernel::Debian6_1 => required_path(env::DEBIAN_6_1),
            Kernel::Debian6_12 => required_path(env::DEBIAN_6_12),
        }
    }

    /// Its modules, if it has any.
    pub fn modules(self) -> Option<Modules> {
        match self {
            Kernel::Tuned => None,
            Kernel::Debian6_1 | Kernel::Debian6_12 => {
                Some(Modules::new(self.image().with_file_name("modules")))
            }
        }
    }

    /// The fastest available kernel: the tuned one, else Debian's 6.12.
    pub fn quickest() -> Kernel {
        if std::env::var_os(env::TUNED).is_some() { Kernel::Tuned } else { Kernel::Debian6_12 }
    }
}

/// How devices are attached to a guest.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Transport {
    /// virtio-mmio, the default.
    Mmio,
    /// virtio-pci.
    Pci,
}

impl Transport {
    /// The monitor's arguments.
    pub fn args(self) -> &'static [&'static str] {
        match self {
            Transport::Mmio => &[],
            Transport::Pci => &["--enable-pci"],
        }
    }
}

/// A kernel command line with the console on the serial port and few kernel messages. A panic ends
/// the monitor.
pub const BOOT_ARGS: &str = "console=ttyS0 quiet panic=-1 reboot=k";

/// The configuration of a guest, for a configuration file or API calls.
#[derive(Debug, Clone)]
pub struct Guest {
    /// The kernel image.
    pub kernel: PathBuf,
    /// The initramfs.
    pub initrd: Option<PathBuf>,
    /// The command line.
    pub boot_args: Option<String>,
    /// The number of vCPUs.
    pub vcpus: u32,
    /// The size of memory in MiB.
    pub mem_mib: u32,
    /// More fields of `machine-config`.
    pub machine: Value,
}

impl Guest {
    /// A guest with this kernel image, one vCPU and 128 MiB.
    pub fn bare(kernel: &Path) -> Guest {
        let kernel = kernel.to_owned();
        Guest { kernel, initrd: None, boot_args: None, vcpus: 1, mem_mib: 128, machine: json!({}) }
    }

    /// A guest whose first process is busybox's shell with this script. Its initramfs is written to
    /// `dir`.
    pub fn linux(kernel: Kernel, script: &str, dir: &Path) -> Result<Guest> {
        Guest::with_initramfs(kernel, Initramfs::new(&busybox())?, script, dir)
    }

    /// The same, with an initramfs to which files were added.
    pub fn with_initramfs(kernel: Kernel, disk: Initramfs, script: &str, dir: &Path) -> Result<Guest> {
        let disk = disk.finish(script);
        let initrd = dir.join("initramfs");
        std::fs::write(&initrd, disk).with_context(|| initrd.display().to_string())?;
        let boot_args = Some(BOOT_ARGS.to_owned());
        Ok(Guest { initrd: Some(initrd), boot_args, ..Guest::bare(&kernel.image()) })
    }

    /// Sets the number of vCPUs.
    #[must_use]
    pub fn vcpus(self, vcpus: u32) -> Guest {
        Guest { vcpus, ..self }
    }

    /// Sets the size of memory.
    #[must_use]
    pub fn mem_mib(self, mem_mib: u32) -> Guest {
        Guest { mem_mib, ..self }
    }

    /// Sets the kernel command line.
    #[must_use]
    pub fn boot_args(self, boot_args: &str) -> Guest {
        Guest { boot_args: Some(boot_args.to_owned()), ..self }
    }

    /// The body of `PUT /boot-source`.
    pub fn boot_source(&self) -> Value {
        let mut body = json!({"kernel_image_path": self.kernel});
        if let Some(initrd) = &self.initrd {
            body["initrd_path"] = json!(initrd);
        }
        if let Some(boot_args) = &self.boot_args {
            body["boot_args"] = json!(boot_args);
        }
        body
    }

    /// The body of `PUT /machine-config`.
    pub fn machine_config(&self) -> Value {
        let mut body = json!({"vcpu_count": self.vcpus, "mem_size_mib": self.mem_mib});
        for (key, value) in self.machine.as_object().into_iter().flatten() {
            body[key] = value.clone();
        }
        body
    }

    /// The content of a configuration file.
    pub fn config(&self) -> Value {
        json!({"boot-source": self.boot_source(), "machine-config": self.machine_config(), "drives": []})
    }

    /// Configures it through the API.
    pub fn put(&self, api: &mut ApiClient) -> Result<()> {
        api.put("/machine-config", &self.machine_config())?.ok()?;
        api.put("/boot-source", &self.boot_source())?.ok()?;
        Ok(())
    }
}

/// Starts the configured guest.
pub fn start(api: &mut ApiClient) -> Result<()> {
    api.put("/actions", &json!({"action_type": "InstanceStart"}))?.ok().map(drop)
}

/// Enough time for a Linux guest to boot and do something small, on a busy emulated host.
pub const BOOT_TIMEOUT: std::time::Duration = std::time::Duration::from_mins(2);
/// Enough time for anything without a Linux guest.
pub const TIMEOUT: std::time::Duration = std::time::Duration::from_secs(30);

/// Starts a monitor, and waits for its API.
pub fn vmm_with_api(args: &[&str]) -> Result<(Vmm, ApiClient)> {
    let builder = args.iter().fold(VmmBuilder::new(&vmm_path())?.with_api(), VmmBuilder::arg);
    let vmm = builder.spawn()?;
    let api = vmm.ready_client(TIMEOUT)?;
    Ok((vmm, api))
}

/// Makes tests of each function here, one for each kernel.
#[macro_export]
macro_rules! on_each_kernel {
    ($($(#[doc = $doc:literal])* fn $name:ident($kernel:ident) $body:block)*) => {$(
        $(#[doc = $doc])*
        mod $name {
            use super::*;

            fn run($kernel: $crate::guest::Kernel) -> anyhow::Result<()> $body

            #[test]
            fn tuned() -> anyhow::Result<()> {
                run($crate::guest::Kernel::Tuned)
            }

            #[test]
            fn debian_6_1() -> anyhow::Result<()> {
                run($crate::guest::Kernel::Debian6_1)
            }

            #[test]
            fn debian_6_12() -> anyhow::Result<()> {
                run($crate::guest::Kernel::Debian6_12)
            }
        }
    )*};
}

/// Makes tests of each function here, one for each transport.
#[macro_export]
macro_rules! on_each_transport {
    ($($(#[doc = $doc:literal])* fn $name:ident($transport:ident) $body:block)*) => {$(
        $(#[doc = $doc])*
        mod $name {
            use super::*;

            fn run($transport: $crate::guest::Transport) -> anyhow::Result<()> $body

            #[test]
            fn mmio() -> anyhow::Result<()> {
                run($crate::guest::Transport::Mmio)
            }

            #[test]
            fn pci() -> anyhow::Result<()> {
                run($crate::guest::Transport::Pci)
            }
        }
    )*};
}
