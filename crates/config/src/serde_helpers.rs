//! Helpers for serde attributes.

use serde::{Deserialize, Deserializer};

/// Reads null as the default, as if the key were absent.
pub(crate) fn null_is_default<'de, D: Deserializer<'de>, T: Default + Deserialize<'de>>(
    deserializer: D,
) -> Result<T, D::Error> {
    Ok(Option::deserialize(deserializer)?.unwrap_or_default())
}
