//! The saved state of a device, which only the device's own crate can decode.
//!
//! This crate knows no concrete device. A state is stored as the name of its kind and
//! self-describing data. In a state file it is a map with one entry, `{name: data}`.

use std::fmt;

use serde::de::{DeserializeOwned, Error as _, MapAccess, Visitor};
use serde::ser::SerializeMap;
use serde::{Deserialize, Deserializer, Serialize, Serializer};
use snapshot::{MigrateError, Value};

/// The saved state of one kind of device.
///
/// It must not use `#[serde(flatten)]` (see [`snapshot::from_value`]).
pub trait DeviceData: Serialize + DeserializeOwned {
    /// The name of the kind of device. It is stored, so it never changes.
    const NAME: &'static str;
}

/// The state of one device.
#[derive(Debug, Clone, PartialEq)]
pub struct DeviceState {
    name: String,
    data: Value,
}

/// Why a [`DeviceState`] cannot be decoded.
#[derive(Debug, thiserror::Error)]
pub enum DecodeError {
    /// It is the state of another kind of device.
    #[error("the saved state is that of a {found} device; expected {expected}")]
    OtherKind {
        /// The name that was asked for.
        expected: &'static str,
        /// The name that was saved.
        found: String,
    },
    /// The data has another form.
    #[error(transparent)]
    Data(#[from] MigrateError),
}

impl DeviceState {
    /// Encodes `data`.
    ///
    /// # Panics
    ///
    /// If `data` cannot be encoded: plain structs always can.
    pub fn of<D: DeviceData>(data: &D) -> Self {
        let data = Value::serialized(data).expect("plain data can be encoded");
        DeviceState { name: D::NAME.to_owned(), data }
    }

    /// The name of the kind of device ([`DeviceData::NAME`]).
    pub fn name(&self) -> &str {
        &self.name
    }

    /// Decodes the state as that of a device of kind `D`.
    pub fn decode<D: DeviceData>(&self) -> Result<D, DecodeError> {
        if self.name != D::NAME {
            return Err(DecodeError::OtherKind { expected: D::NAME, found: self.name.clone() });
        }
        Ok(snapshot::from_value(&self.data)?)
    }
}

impl Serialize for DeviceState {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        let mut map = serializer.serialize_map(Some(1))?;
        map.serialize_entry(&self.name, &self.data)?;
        map.end()
    }
}

impl<'de> Deserialize<'de> for DeviceState {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct OneEntry;
        impl<'de> Visitor<'de> for OneEntry {
            type Value = DeviceState;

            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str("a map with the name of a kind of device and its state")
            }

            fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<DeviceState, A::Error> {
                let entry = map.next_entry::<String, Value>()?;
                let (name, data) = entry.ok_or_else(|| A::Error::custom("a device has no state"))?;
                if map.next_key::<String>()?.is_some() {
                    return Err(A::Error::custom("a device has two states"));
                }
                Ok(DeviceState { name, data })
            }
        }
        deserializer.deserialize_map(OneEntry)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[derive(Debug, PartialEq, Serialize, Deserialize)]
    struct Clock {
        ticks: u64,
        name: Option<String>,
    }

    impl DeviceData for Clock {
        const NAME: &'static str = "Clock";
    }

    #[derive(Debug, Serialize, Deserialize)]
    struct Other;

    impl DeviceData for Other {
        const NAME: &'static str = "Other";
    }

    #[test]
    fn a_state_is_encoded_as_an_externally_tagged_enum() {
        #[derive(Serialize, Deserialize)]
        enum Tagged {
            Clock(Clock),
        }
        let clock = || Clock { ticks: 1 << 40, name: Some("a".to_owned()) };
        let tagged = Value::serialized(&Tagged::Clock(clock())).unwrap();
        let state = DeviceState::of(&clock());
        assert_eq!(Value::serialized(&state).unwrap(), tagged);
        let back: DeviceState = tagged.deserialized().unwrap();
        assert_eq!(back, state);
        assert_eq!(back.decode::<Clock>().unwrap(), clock());
    }

    #[test]
    fn a_state_is_not_decoded_as_another_kind() {
        let state = DeviceState::of(&Other);
        assert!(matches!(state.decode::<Clock>(), Err(DecodeError::OtherKind { .. })));
    }
}
