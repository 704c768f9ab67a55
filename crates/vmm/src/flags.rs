//! What all command lines need: [`ArgsError`], and flags that may be given once.

use std::ffi::OsString;

/// Why a command line is invalid.
#[derive(Debug, thiserror::Error)]
pub(crate) enum ArgsError {
    #[error(transparent)]
    Parse(#[from] lexopt::Error),
    #[error("--{0} is given twice")]
    Duplicate(&'static str),
    #[error("--{name} is \"{value}\": {reason}")]
    Value { name: &'static str, value: String, reason: String },
    #[error("--no-api needs --config-file or --restore: without them there is nothing to run")]
    NoApiWithoutConfig,
    #[error("--config-file cannot be combined with --restore")]
    TwoStarts,
    #[error("--{0} needs --restore")]
    OnlyWithRestore(&'static str),
    #[error("{0} is missing")]
    Missing(&'static str),
    #[error("--{0} is Firecracker's and not supported by this version")]
    NotSupported(&'static str),
}

/// Stores the value of the flag `name`, which may be given once.
pub(crate) fn once<T>(slot: &mut Option<T>, name: &'static str, value: T) -> Result<(), ArgsError> {
    match slot.replace(value) {
        None => Ok(()),
        Some(_) => Err(ArgsError::Duplicate(name)),
    }
}

/// The value of the flag `name` as UTF-8.
pub(crate) fn text(name: &'static str, value: OsString) -> Result<String, ArgsError> {
    value.into_string().map_err(|value| ArgsError::Value {
        name,
        value: value.to_string_lossy().into_owned(),
        reason: "it must be UTF-8".to_owned(),
    })
}
