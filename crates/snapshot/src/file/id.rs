//! Ids of files.

use std::fmt;
use std::str::FromStr;

use serde::{Deserialize, Serialize};

/// A random 64-bit id of one file. In text and in state files it is 16 hexadecimal digits.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(into = "String", try_from = "String")]
pub struct FileId(pub(super) u64);

impl FileId {
    /// Draws a new id from the kernel's random number generator.
    pub fn random() -> std::io::Result<Self> {
        let mut bytes = [0; 8];
        let got = rustix::rand::getrandom(&mut bytes, rustix::rand::GetRandomFlags::empty())?;
        debug_assert_eq!(got, bytes.len(), "getrandom gives up to 256 bytes at once");
        Ok(FileId(u64::from_le_bytes(bytes)))
    }
}

impl fmt::Display for FileId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:016x}", self.0)
    }
}

impl From<FileId> for String {
    fn from(id: FileId) -> String {
        id.to_string()
    }
}

impl FromStr for FileId {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let digits = text.len() == 16 && text.bytes().all(|b| b.is_ascii_hexdigit());
        match u64::from_str_radix(text, 16) {
            Ok(id) if digits => Ok(FileId(id)),
            _ => Err(format!("a file id is 16 hexadecimal digits, not {text:?}")),
        }
    }
}

impl TryFrom<String> for FileId {
    type Error = String;

    fn try_from(text: String) -> Result<Self, String> {
        text.parse()
    }
}
