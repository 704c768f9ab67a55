//! `/boot-source`: kernel, initrd and kernel command line.

use std::path::PathBuf;

use serde::{Deserialize, Serialize};

use crate::checks;
use crate::error::ConfigError;
use crate::limits::MAX_BOOT_ARGS_LEN;

/// Default kernel command line.
pub const DEFAULT_BOOT_ARGS: &str =
    "reboot=k panic=1 nomodule 8250.nr_uarts=0 i8042.noaux i8042.nomux i8042.dumbkbd swiotlb=noforce";

/// What to boot.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[cfg_attr(feature = "schema", derive(schemars::JsonSchema))]
#[serde(deny_unknown_fields)]
pub struct BootSource {
    /// The kernel: an ELF `vmlinux` or a `bzImage`.
    #[cfg_attr(feature = "schema", schemars(regex(pattern = crate::schema::PATH)))]
    pub kernel_image_path: PathBuf,
    /// The initrd, if any.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[cfg_attr(feature = "schema", schemars(regex(pattern = crate::schema::PATH)))]
    pub initrd_path: Option<PathBuf>,
    /// Kernel command line; [`DEFAULT_BOOT_ARGS`] if absent. With a final NUL at most
    /// [`MAX_BOOT_ARGS_LEN`] bytes.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[cfg_attr(feature = "schema", schemars(length(max = MAX_BOOT_ARGS_LEN - 1), regex(pattern = crate::schema::NO_NUL), extend("default" = DEFAULT_BOOT_ARGS)))]
    pub boot_args: Option<String>,
}

impl BootSource {
    /// A kernel with the default command line and no initrd.
    pub fn new(kernel_image_path: impl Into<PathBuf>) -> BootSource {
        BootSource { kernel_image_path: kernel_image_path.into(), initrd_path: None, boot_args: None }
    }

    /// Checks bounds.
    pub fn check(&self) -> Result<(), ConfigError> {
        checks::path("kernel_image_path", &self.kernel_image_path)?;
        self.initrd_path.iter().try_for_each(|path| checks::path("initrd_path", path))?;
        let Some(args) = &self.boot_args else { return Ok(()) };
        if args.len() >= MAX_BOOT_ARGS_LEN {
            return Err(ConfigError::BootArgsTooLong { len: args.len() });
        }
        match args.find('\0') {
            Some(offset) => Err(ConfigError::BootArgsHaveNul { offset }),
            None => Ok(()),
        }
    }

    /// Kernel command line, without the parameters that devices add.
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
    fn longest_command_line_has_space_for_its_nul() {
        assert_eq!(with_args("x".repeat(MAX_BOOT_ARGS_LEN - 1)).check(), Ok(()));
        assert_eq!(
            with_args("x".repeat(MAX_BOOT_ARGS_LEN)).check(),
            Err(ConfigError::BootArgsTooLong { len: MAX_BOOT_ARGS_LEN })
        );
    }

    #[test]
    fn nul_in_the_command_line_is_refused() {
        assert_eq!(with_args("ro\0rw".into()).check(), Err(ConfigError::BootArgsHaveNul { offset: 2 }));
    }

    #[test]
    fn absent_command_line_is_the_default_and_empty_is_empty() {
        let absent: BootSource =
            serde_json::from_str(r#"{"kernel_image_path":"k","boot_args":null}"#).unwrap();
        assert_eq!(absent.boot_args(), DEFAULT_BOOT_ARGS);
        assert_eq!(with_args(String::new()).boot_args(), "");
    }

    #[test]
    fn missing_kernel_and_unknown_fields_are_named() {
        for (json, named) in
            [("{}", "`kernel_image_path`"), (r#"{"kernel_image_path":"k","root":"x"}"#, "`root`")]
        {
            let error = serde_json::from_str::<BootSource>(json).unwrap_err().to_string();
            assert!(error.contains(named), "{error}");
        }
    }
}
