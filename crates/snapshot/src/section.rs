//! What a room puts into a state file.

use serde::Serialize;
use serde::de::DeserializeOwned;

use crate::Value;

/// Why data in memory cannot be decoded or brought up to date.
#[derive(Debug, thiserror::Error)]
#[error("{0}")]
pub struct MigrateError(
    /// The reason, in words.
    pub String,
);

/// Decodes data that is in memory already: for migrations, and for sections that several structs share.
///
/// Such a section must not use `#[serde(flatten)]`. serde reads flattened fields as if they came from a text format, and types that
/// have a compact form beside their text (an IP address) are then not read back as they were written.
pub fn from_value<T: DeserializeOwned>(value: &Value) -> Result<T, MigrateError> {
    value.deserialized().map_err(|error| match error {
        ciborium::value::Error::Custom(reason) => MigrateError(reason),
    })
}

/// A named, versioned piece of a state file: plain data of one owner.
///
/// A field that is added with `#[serde(default)]` needs no new version, since unknown fields are skipped and missing
/// ones take their default. Raise [`Self::VERSION`] when old data would be *misread*: a field changed its unit, its
/// meaning or its type.
///
/// Bytes in bulk (`Vec<u8>`) are stored as CBOR arrays unless the field is encoded as bytes; both are read alike.
pub trait Section: Serialize + DeserializeOwned {
    /// The section's name; `device/net` and the like. A section that exists several times has an instance after it.
    const NAME: &'static str;
    /// The version of the data that this struct is, from 1.
    const VERSION: u16 = 1;

    /// Turns data of version `from` (below [`Self::VERSION`]) into data of the current version.
    ///
    /// The default refuses, which is right as long as there is only one version.
    fn migrate(from: u16, value: Value) -> Result<Value, MigrateError> {
        drop(value);
        Err(MigrateError(format!("version {from} is no longer understood")))
    }
}
