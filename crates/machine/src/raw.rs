//! KVM structures in the state file: byte strings of exactly the structure's size.
//!
//! The encoding is a CBOR byte string, which carries its length. A length other than the
//! structure's is an error that names the structure. `kvm-bindings` has a serde implementation with
//! the same encoding, but it truncates a longer string and pads a shorter one with zeros: a state
//! file from a build with another layout would load and mean something else. It also fails to load
//! a structure above 4 KiB (nested state), because the decoder returns such strings only as owned
//! buffers.
//!
//! A structure that grows in a later `kvm-bindings` needs a migration of its section
//! ([`snapshot::Section::migrate`]).
//!
//! Use it as `#[serde(with = "raw")]`, `#[serde(with = "raw::list")]` or `#[serde(with =
//! "raw::optional")]`.

use std::any::type_name;
use std::fmt;
use std::marker::PhantomData;

use serde::de::{Deserializer, Error, SeqAccess, Visitor};
use serde::ser::Serializer;
use serde::{Deserialize, Serialize};
use zerocopy::{FromBytes, Immutable, IntoBytes};

/// A kernel structure that consists of plain numbers.
pub(crate) trait Structure: FromBytes + IntoBytes + Immutable {}

impl<T: FromBytes + IntoBytes + Immutable> Structure for T {}

/// Writes the structure's bytes.
pub(crate) fn serialize<T: Structure, S: Serializer>(value: &T, serializer: S) -> Result<S::Ok, S::Error> {
    serializer.serialize_bytes(value.as_bytes())
}

/// Reads a structure from a byte string of exactly its size.
pub(crate) fn deserialize<'de, T: Structure, D: Deserializer<'de>>(deserializer: D) -> Result<T, D::Error> {
    // An owned buffer: the decoder lends only short strings.
    deserializer.deserialize_byte_buf(Exactly(PhantomData))
}

/// The name of a structure without its path, as in `kvm_regs`.
fn name<T>() -> &'static str {
    type_name::<T>().rsplit("::").next().unwrap_or_default()
}

/// Visits a byte string (or a sequence of bytes) of exactly the size of `T`.
struct Exactly<T>(PhantomData<T>);

impl<T: Structure> Exactly<T> {
    fn take<E: Error>(bytes: &[u8]) -> Result<T, E> {
        T::read_from_bytes(bytes).map_err(|_| Self::wrong_size(&format_args!("{} bytes", bytes.len())))
    }

    fn wrong_size<E: Error>(got: &dyn fmt::Display) -> E {
        E::custom(format_args!(
            "{}: saved size is {got}; this version's is {} bytes",
            name::<T>(),
            size_of::<T>()
        ))
    }
}

impl<'de, T: Structure> Visitor<'de> for Exactly<T> {
    type Value = T;

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "the {} bytes of {}", size_of::<T>(), name::<T>())
    }

    fn visit_bytes<E: Error>(self, bytes: &[u8]) -> Result<T, E> {
        Self::take(bytes)
    }

    fn visit_seq<A: SeqAccess<'de>>(self, mut sequence: A) -> Result<T, A::Error> {
        let mut bytes = Vec::with_capacity(size_of::<T>());
        while let Some(byte) = sequence.next_element::<u8>()? {
            if bytes.len() == size_of::<T>() {
                return Err(Self::wrong_size(&"larger"));
            }
            bytes.push(byte);
        }
        Self::take(&bytes)
    }
}

/// One structure, for the containers that serde supports.
struct One<T>(T);

impl<T: Structure> Serialize for One<&T> {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serialize(self.0, serializer)
    }
}

impl<'de, T: Structure> Deserialize<'de> for One<T> {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        deserialize(deserializer).map(One)
    }
}

/// Several structures of one type.
pub(crate) mod list {
    use super::{Deserialize, Deserializer, One, Serializer, Structure};

    /// Writes each as [`super::serialize`].
    pub(crate) fn serialize<T: Structure, S: Serializer>(values: &[T], to: S) -> Result<S::Ok, S::Error> {
        to.collect_seq(values.iter().map(One))
    }

    /// Reads each as [`super::deserialize`].
    pub(crate) fn deserialize<'de, T: Structure, D: Deserializer<'de>>(from: D) -> Result<Vec<T>, D::Error> {
        let values = Vec::<One<T>>::deserialize(from)?;
        Ok(values.into_iter().map(|One(value)| value).collect())
    }
}

/// A structure that may be absent.
pub(crate) mod optional {
    use super::{Deserialize, Deserializer, One, Serializer, Structure};

    /// Writes it as [`super::serialize`], or null.
    #[expect(clippy::ref_option, reason = "serde passes a reference to the field")]
    pub(crate) fn serialize<T: Structure, S: Serializer>(
        value: &Option<Box<T>>,
        to: S,
    ) -> Result<S::Ok, S::Error> {
        match value {
            Some(value) => to.serialize_some(&One(&**value)),
            None => to.serialize_none(),
        }
    }

    /// Reads it as [`super::deserialize`], or null.
    pub(crate) fn deserialize<'de, T: Structure, D: Deserializer<'de>>(
        from: D,
    ) -> Result<Option<Box<T>>, D::Error> {
        let value = Option::<One<T>>::deserialize(from)?;
        Ok(value.map(|One(value)| Box::new(value)))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use kvm_bindings::{kvm_irqchip, kvm_lapic_state, kvm_regs};
    use kvm_ioctls::KvmNestedStateBuffer;
    use serde::de::value::{BytesDeserializer, SeqDeserializer};

    type TextError = serde::de::value::Error;

    fn read<T: Structure>(bytes: &[u8]) -> Result<T, TextError> {
        deserialize(BytesDeserializer::new(bytes))
    }

    #[test]
    fn only_the_exact_size_of_a_structure_is_read() {
        fn check<T: Structure>(expected_name: &str) {
            let size = size_of::<T>();
            for length in (0..2 * size).step_by(size / 16) {
                assert_eq!(read::<T>(&vec![1; length]).is_ok(), length == size, "{expected_name}: {length}");
            }
            for length in [size - 1, size + 1] {
                let error = read::<T>(&vec![1; length]).err().unwrap().to_string();
                let sizes =
                    format!("{expected_name}: saved size is {length} bytes; this version's is {size} bytes");
                assert_eq!(error, sizes);
            }
        }
        check::<kvm_regs>("kvm_regs");
        check::<kvm_lapic_state>("kvm_lapic_state");
        check::<kvm_irqchip>("kvm_irqchip");
        check::<KvmNestedStateBuffer>("KvmNestedStateBuffer");
    }

    #[test]
    fn sequence_of_bytes_is_bounded_by_the_structure() {
        let endless = SeqDeserializer::<_, TextError>::new(std::iter::repeat(7u8));
        let error = deserialize::<kvm_regs, _>(endless).err().unwrap().to_string();
        assert!(error.contains("kvm_regs: saved size is larger"), "{error}");
        let short = SeqDeserializer::<_, TextError>::new(std::iter::repeat_n(7u8, 3));
        assert!(deserialize::<kvm_regs, _>(short).is_err());
    }
}
