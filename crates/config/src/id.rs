//! Ids of microVMs, and of resources in the paths of API requests.

use std::{fmt, str::FromStr};

use serde::{Deserialize, Serialize};

/// Longest id of a microVM, in bytes.
pub(crate) const MAX_INSTANCE_ID_LEN: usize = 64;

/// Id of a microVM (`--id`): 1 to 64 ASCII letters, digits and hyphens.
#[derive(Debug, Clone, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub struct InstanceId(String);

/// Id of a resource in the path of an API request: ASCII letters, digits and underscores, at least
/// one.
#[derive(Debug, Clone, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub struct ResourceId(String);

/// An invalid id.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum IdError {
    /// The id is empty.
    #[error("the id is empty")]
    Empty,
    /// The id of a microVM is too long.
    #[error("the id has {len} bytes; it must have at most {MAX_INSTANCE_ID_LEN}")]
    TooLong {
        /// Length given, in bytes.
        len: usize,
    },
    /// A character that is not allowed.
    #[error("the id `{id}` has the character {character:?}; only letters, digits and `{also}` are allowed")]
    BadCharacter {
        /// The id given.
        id: String,
        /// The first character that is not allowed.
        character: char,
        /// Allowed besides letters and digits.
        also: char,
    },
}

impl Default for InstanceId {
    /// Id of a microVM without `--id`.
    fn default() -> InstanceId {
        InstanceId("anonymous-instance".into())
    }
}

impl FromStr for InstanceId {
    type Err = IdError;

    fn from_str(id: &str) -> Result<InstanceId, IdError> {
        InstanceId::try_from(id.to_owned())
    }
}

impl TryFrom<String> for InstanceId {
    type Error = IdError;

    fn try_from(id: String) -> Result<InstanceId, IdError> {
        if id.len() > MAX_INSTANCE_ID_LEN {
            return Err(IdError::TooLong { len: id.len() });
        }
        check_characters(&id, '-')?;
        Ok(InstanceId(id))
    }
}

impl FromStr for ResourceId {
    type Err = IdError;

    fn from_str(id: &str) -> Result<ResourceId, IdError> {
        ResourceId::try_from(id.to_owned())
    }
}

impl TryFrom<String> for ResourceId {
    type Error = IdError;

    fn try_from(id: String) -> Result<ResourceId, IdError> {
        check_characters(&id, '_')?;
        Ok(ResourceId(id))
    }
}

/// Checks that `id` is not empty and has only letters, digits and `also`.
fn check_characters(id: &str, also: char) -> Result<(), IdError> {
    if id.is_empty() {
        return Err(IdError::Empty);
    }
    match id.chars().find(|&character| !character.is_ascii_alphanumeric() && character != also) {
        Some(character) => Err(IdError::BadCharacter { id: id.to_owned(), character, also }),
        None => Ok(()),
    }
}

impl InstanceId {
    /// The id as text.
    pub fn as_str(&self) -> &str {
        &self.0
    }
}

impl ResourceId {
    /// The id as text.
    pub fn as_str(&self) -> &str {
        &self.0
    }
}

impl From<InstanceId> for String {
    fn from(id: InstanceId) -> String {
        id.0
    }
}

impl From<ResourceId> for String {
    fn from(id: ResourceId) -> String {
        id.0
    }
}

impl fmt::Display for InstanceId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

impl fmt::Display for ResourceId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn default_id_is_valid() {
        assert_eq!("anonymous-instance".parse(), Ok(InstanceId::default()));
    }

    #[test]
    fn id_length_is_bounded() {
        assert_eq!("".parse::<InstanceId>(), Err(IdError::Empty));
        assert_eq!("".parse::<ResourceId>(), Err(IdError::Empty));
        assert!("x".repeat(64).parse::<InstanceId>().is_ok());
        assert_eq!("x".repeat(65).parse::<InstanceId>(), Err(IdError::TooLong { len: 65 }));
    }

    #[test]
    fn first_bad_character_is_named() {
        let error = "a_b/".parse::<InstanceId>().unwrap_err();
        assert_eq!(error, IdError::BadCharacter { id: "a_b/".into(), character: '_', also: '-' });
        let error = serde_json::from_str::<ResourceId>(r#""a-b""#).unwrap_err().to_string();
        assert!(error.contains("`a-b`") && error.contains("'-'"), "{error}");
    }

    proptest! {
        #[test]
        fn valid_ids_round_trip(instance in "[A-Za-z0-9-]{1,64}", resource in "[A-Za-z0-9_]{1,100}") {
            let parsed: InstanceId = instance.parse().unwrap();
            prop_assert_eq!(parsed.as_str(), &instance);
            let parsed: ResourceId = serde_json::from_value(resource.clone().into()).unwrap();
            prop_assert_eq!(serde_json::to_value(&parsed).unwrap(), serde_json::Value::from(resource));
        }

        #[test]
        fn only_ids_with_allowed_characters_are_accepted(text in "\\PC{1,8}") {
            let good = |also| text.chars().all(|c: char| c.is_ascii_alphanumeric() || c == also);
            prop_assert_eq!(text.parse::<InstanceId>().is_ok(), good('-'));
            prop_assert_eq!(text.parse::<ResourceId>().is_ok(), good('_'));
        }
    }
}
