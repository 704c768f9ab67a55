//! Checks that several configuration structs share.

use std::collections::BTreeSet;
use std::path::Path;

use crate::error::{ConfigError, ForkError};
use crate::limits::MAX_SOCKET_PATH_LEN;

/// Checks that `min <= value <= max`.
pub(crate) fn in_range(field: &'static str, value: u64, min: u64, max: u64) -> Result<(), ConfigError> {
    if (min..=max).contains(&value) {
        Ok(())
    } else {
        Err(ConfigError::OutOfRange { field, value, min, max })
    }
}

/// Checks that `queue_size` is a power of two between `min` and `max`.
pub(crate) fn queue_size(queue_size: u16, min: u16, max: u16) -> Result<(), ConfigError> {
    in_range("queue_size", queue_size.into(), min.into(), max.into())?;
    if queue_size.is_power_of_two() { Ok(()) } else { Err(ConfigError::QueueSize { queue_size }) }
}

/// Whether `id` has 1 to `max_len` visible ASCII characters and nothing else.
pub(crate) fn is_device_id(id: &str, max_len: usize) -> bool {
    (1..=max_len).contains(&id.len()) && id.bytes().all(|byte| byte.is_ascii_graphic())
}

/// Checks that the kernel can take `path`.
pub(crate) fn path(field: &'static str, path: &Path) -> Result<(), ConfigError> {
    let bytes = path.as_os_str().as_encoded_bytes();
    if bytes.is_empty() || bytes.contains(&0) { Err(ConfigError::BadPath { field }) } else { Ok(()) }
}

/// Checks that `path` fits in the address of a Unix socket.
pub(crate) fn socket_path(field: &'static str, path: &Path) -> Result<(), ConfigError> {
    let len = path.as_os_str().len();
    if (1..=MAX_SOCKET_PATH_LEN).contains(&len) {
        self::path(field, path)
    } else {
        Err(ConfigError::SocketPathLength { field, len })
    }
}

/// Checks that no value of a field is given twice.
pub(crate) fn unique(field: &'static str, values: impl Iterator<Item = String>) -> Result<(), ForkError> {
    let mut seen = BTreeSet::new();
    for value in values {
        if seen.contains(&value) {
            return Err(ForkError::Duplicate { field, value });
        }
        seen.insert(value);
    }
    Ok(())
}
