//! Sections: the pieces of a state file.

use serde::Serialize;
use serde::de::DeserializeOwned;

use crate::Value;

/// Why a CBOR value cannot be decoded or migrated.
#[derive(Debug, thiserror::Error)]
#[error("{0}")]
pub struct MigrateError(
    /// The reason, in words.
    pub String,
);

/// Decodes a CBOR value: for migrations, and for sections that several structs share.
///
/// Such a section must not use `#[serde(flatten)]`: serde reads flattened fields as if they came
/// from a text format. Types with a separate compact form (an IP address) would then not be read
/// back as they were written.
pub fn from_value<T: DeserializeOwned>(value: &Value) -> Result<T, MigrateError> {
    value.deserialized().map_err(|error| match error {
        ciborium::value::Error::Custom(reason) => MigrateError(reason),
    })
}

/// A named, versioned piece of a state file: plain data of one crate or device.
///
/// A field that is added with `#[serde(default)]` needs no new version: unknown fields are skipped,
/// and missing ones take their default. Raise [`Self::VERSION`] if old data would be *misread*,
/// because a field changed its unit, meaning or type.
///
/// A `Vec<u8>` is stored as a CBOR array unless its field is encoded as bytes (`serde_bytes`).
pub trait Section: Serialize + DeserializeOwned {
    /// The section's name, such as `device/net`. A section that exists several times has its
    /// instance appended: `device/net/eth0`.
    const NAME: &'static str;
    /// The version of the data in this struct, from 1.
    const VERSION: u16 = 1;

    /// Converts data of version `from`, which is lower than [`Self::VERSION`], to the current
    /// version.
    ///
    /// The default is an error, which is correct while there is only one version.
    fn migrate(from: u16, value: Value) -> Result<Value, MigrateError> {
        drop(value);
        Err(MigrateError(format!("version {from} is no longer understood")))
    }
}
