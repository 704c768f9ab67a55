//! Sections and endpoints of Firecracker that vesta does not support.
//!
//! Clients write these keys into every configuration file, mostly as null. An empty section
//! therefore counts as absent. A section with content is refused by name: a guest must not start
//! without a device that its user asked for.

use serde::{Deserialize, Deserializer, Serialize, Serializer};
use serde_json::Value;

/// A part of Firecracker's configuration that vesta does not support.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Unsupported {
    /// The balloon device.
    Balloon,
    /// Persistent memory devices.
    Pmem,
    /// The memory hot-plug device.
    MemoryHotplug,
}

impl Unsupported {
    /// What the part configures, for an error message.
    pub fn description(self) -> &'static str {
        match self {
            Unsupported::Balloon => "balloon devices",
            Unsupported::Pmem => "pmem devices",
            Unsupported::MemoryHotplug => "memory hot-plug",
        }
    }

    /// Key of the part in the configuration file.
    fn key(self) -> &'static str {
        match self {
            Unsupported::Balloon => "balloon",
            Unsupported::Pmem => "pmem",
            Unsupported::MemoryHotplug => "memory-hotplug",
        }
    }

    /// Reads the section, which must be empty: null, `[]` or `{}`.
    fn deserialize_empty<'de, D: Deserializer<'de>, T: Default>(self, from: D) -> Result<T, D::Error> {
        let empty = match Value::deserialize(from)? {
            Value::Null => true,
            Value::Array(list) => list.is_empty(),
            Value::Object(fields) => fields.is_empty(),
            _ => false,
        };
        if empty {
            return Ok(T::default());
        }
        Err(serde::de::Error::custom(format_args!(
            "section {}: this version does not support {}; remove the section or set it to null",
            self.key(),
            self.description()
        )))
    }

    pub(crate) fn balloon<'de, D: Deserializer<'de>>(from: D) -> Result<Absent, D::Error> {
        Unsupported::Balloon.deserialize_empty(from)
    }

    pub(crate) fn pmem<'de, D: Deserializer<'de>>(from: D) -> Result<AbsentList, D::Error> {
        Unsupported::Pmem.deserialize_empty(from)
    }

    pub(crate) fn memory_hotplug<'de, D: Deserializer<'de>>(from: D) -> Result<Absent, D::Error> {
        Unsupported::MemoryHotplug.deserialize_empty(from)
    }
}

/// Section of an unsupported device or setting; serialized as null.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Absent;

impl Serialize for Absent {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.serialize_none()
    }
}

/// Section of unsupported devices; serialized as `[]`.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct AbsentList;

impl Serialize for AbsentList {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.collect_seq(std::iter::empty::<()>())
    }
}
