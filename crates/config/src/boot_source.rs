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

#[cfg(test)]
mod tests {
    use super::*;

    fn with_args(boot_args: String) -> BootSource {
        BootSource { kernel_image_path: "vmlinux".into(), initrd_path: None, boot_args: Some(boot_args) }
    }

    #[test]
    fn the_longest_command_line_leaves_room_for_the_nul() {
        assert_eq!(with_args("x".repeat(MAX_BOOT_ARGS_LEN - 1)).check(), Ok(()));
        assert_eq!(
            with_args("x".repeat(MAX_BOOT_ARGS_LEN)).check(),
            Err(ConfigError::BootArgsTooLong { len: MAX_BOOT_ARGS_LEN })
        );
    }

    #[test]
    fn a_nul_in_the_command_line_is_found() {
        assert_eq!(with_args("ro\0rw".into()).check(), Err(ConfigError::BootArgsHaveNul { offset: 2 }));
    }

    #[test]
    fn an_absent_command_line_is_the_default_and_an_empty_one_is_empty() {
        let absent: BootSource =
            serde_json::from_str(r#"{"kernel_image_path":"k","boot_args":null}"#).unwrap();
        assert_eq!(absent.boot_args(), DEFAULT_BOOT_ARGS);
        assert_eq!(with_args(String::new()).boot_args(), "");
    }

    #[test]
    fn the_kernel_is_needed_and_unknown_fields_are_named() {
        for (json, named) in
            [("{}", "`kernel_image_path`"), (r#"{"kernel_image_path":"k","root":"x"}"#, "`root`")]
        {
            let error = serde_json::from_str::<BootSource>(json).unwrap_err().to_string();
            assert!(error.contains(named), "{error}");
        }
    }
}
