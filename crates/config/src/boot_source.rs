//! `/boot-source`: kernel, initial RAM disk and command line.

use std::path::PathBuf;

use serde::{Deserialize, Serialize};

use crate::ConfigError;

/// Longest kernel command line in bytes, the closing NUL included.
pub const MAX_BOOT_ARGS_LEN: usize = 2048;

/// The kernel command line where the user gives none.
pub const DEFAULT_BOOT_ARGS: &str =
    "reboot=k panic=1 nomodule 8250.nr_uarts=0 i8042.noaux i8042.nomux i8042.dumbkbd swiotlb=noforce";

/// What to boot.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct BootSource {
    /// The kernel: an ELF `vmlinux` or a `bzImage`.
    pub kernel_image_path: PathBuf,
    /// The initial RAM disk, if any.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub initrd_path: Option<PathBuf>,
    /// The kernel command line; [`DEFAULT_BOOT_ARGS`] where absent. At most [`MAX_BOOT_ARGS_LEN`] bytes.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub boot_args: Option<String>,
}

impl BootSource {
    /// Checks bounds.
    pub fn check(&self) -> Result<(), ConfigError> {
        let Some(args) = &self.boot_args else { return Ok(()) };
        if args.len() >= MAX_BOOT_ARGS_LEN {
            return Err(ConfigError::BootArgsTooLong { len: args.len() });
        }
        match args.find('\0') {
            Some(offset) => Err(ConfigError::BootArgsHaveNul { offset }),
            None => Ok(()),
        }
    }

    /// The command line to boot with, before devices add theirs.
    pub fn boot_args(&self) -> &str {
        self.boot_args.as_deref().unwrap_or(DEFAULT_BOOT_ARGS)
    }
}
