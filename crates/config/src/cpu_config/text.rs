//! Numbers of templates, which are strings in JSON.

use std::fmt;
use std::str::FromStr;

use serde::de::Error as _;
use serde::{Deserialize, Deserializer, Serialize, Serializer};

/// Longest part of a wrong text in an error message, in characters.
const SHOWN: usize = 64;

/// A KVM capability that a template adds to the required ones, or removes from them. Its number is
/// that of `KVM_CHECK_EXTENSION`.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum KvmCapability {
    /// The host must have it.
    Require(u32),
    /// The host need not have it, even if the monitor requires it otherwise.
    Ignore(u32),
}

/// A text that is no capability.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("kvm_capabilities has {text:?}; it must be a number of at most {}, or ! and such a number", u32::MAX)]
pub struct CapabilityError {
    /// The text given, cut after [`SHOWN`] characters.
    text: String,
}

impl FromStr for KvmCapability {
    type Err = CapabilityError;

    fn from_str(text: &str) -> Result<Self, CapabilityError> {
        let error = || CapabilityError { text: cut(text) };
        let number = |digits: &str| digits.parse().map_err(|_| error());
        match text.strip_prefix('!') {
            Some(digits) => number(digits).map(KvmCapability::Ignore),
            None => number(text).map(KvmCapability::Require),
        }
    }
}

impl fmt::Display for KvmCapability {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            KvmCapability::Require(number) => write!(f, "{number}"),
            KvmCapability::Ignore(number) => write!(f, "!{number}"),
        }
    }
}

impl Serialize for KvmCapability {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.collect_str(self)
    }
}

impl<'de> Deserialize<'de> for KvmCapability {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        String::deserialize(deserializer)?.parse().map_err(D::Error::custom)
    }
}

/// Writes a number as `0x1f`.
// serde gives fields by reference.
#[expect(clippy::trivially_copy_pass_by_ref)]
pub(super) fn hex<S: Serializer>(number: &u32, serializer: S) -> Result<S::Ok, S::Error> {
    serializer.collect_str(&format_args!("{number:#x}"))
}

/// Reads `leaf`.
pub(super) fn leaf<'de, D: Deserializer<'de>>(from: D) -> Result<u32, D::Error> {
    number("leaf", from)
}

/// Reads `subleaf`.
pub(super) fn subleaf<'de, D: Deserializer<'de>>(from: D) -> Result<u32, D::Error> {
    number("subleaf", from)
}

/// Reads `addr`.
pub(super) fn addr<'de, D: Deserializer<'de>>(from: D) -> Result<u32, D::Error> {
    number("addr", from)
}

fn number<'de, D: Deserializer<'de>>(field: &'static str, from: D) -> Result<u32, D::Error> {
    let text = String::deserialize(from)?;
    let (digits, radix) = match (text.strip_prefix("0x"), text.strip_prefix("0b")) {
        (Some(digits), _) => (digits, 16),
        (None, Some(digits)) => (digits, 2),
        (None, None) => ("", 10),
    };
    u32::from_str_radix(digits, radix).map_err(|_| {
        let text = cut(&text);
        D::Error::custom(format_args!(
            "{field} is {text:?}; it must be a hexadecimal number as \"0x1f\" or a binary one as \
             \"0b11\", of at most 32 bits"
        ))
    })
}

fn cut(text: &str) -> String {
    text.chars().take(SHOWN).collect()
}
