//! The bytes of the format (crate documentation): what writer and reader share.

use serde::{Deserialize, Serialize};

/// The version of the format that this crate writes, and the newest that it reads.
pub const FORMAT_VERSION: u32 = 1;
/// The largest state file that is read, in bytes. A machine of 128 vCPUs has about 2 MiB of state.
pub const MAX_FILE_SIZE: u64 = 64 << 20;
/// The most sections that a file can have.
pub const MAX_SECTIONS: usize = 4096;
/// The longest name of a section, in bytes.
pub const MAX_NAME: usize = 128;

pub(crate) const MAGIC: [u8; 8] = *b"VESTA\r\n\x1a";
pub(crate) const SECTION: [u8; 4] = *b"SECT";
pub(crate) const END: [u8; 4] = *b"END\0";
/// Magic, format version, length of the header's data.
pub(crate) const PREFIX_LEN: usize = 16;
/// Marker, length of the name, version, length of the data.
pub(crate) const FRAME_LEN: usize = 16;

/// Who wrote a file, where, and what it is. All of it is for people and for telling files apart; unknown fields are
/// tolerated.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Header {
    /// What the file holds: `microvm` for a machine's state, other words for other uses of the format.
    pub kind: String,
    /// The processor's architecture, as Rust names it (`x86_64`).
    pub architecture: String,
    /// The version of vesta that wrote it.
    pub vesta_version: String,
    /// The program that wrote it.
    pub created_by: String,
    /// When, in milliseconds since 1970 (UTC). The caller's clock.
    #[serde(default)]
    pub created_at_ms: u64,
}

impl Header {
    /// A header for a file of `kind` that `created_by` writes on this machine.
    pub fn new(kind: &str, created_by: &str, created_at_ms: u64) -> Self {
        Header {
            kind: kind.to_owned(),
            architecture: std::env::consts::ARCH.to_owned(),
            vesta_version: env!("CARGO_PKG_VERSION").to_owned(),
            created_by: created_by.to_owned(),
            created_at_ms,
        }
    }
}

/// Appends the checksum of `bytes[from..]`, also to those that the end is checked with.
pub(crate) fn seal(bytes: &mut Vec<u8>, from: usize, crcs: &mut Vec<u8>) {
    let crc = crc32fast::hash(&bytes[from..]).to_le_bytes();
    bytes.extend_from_slice(&crc);
    crcs.extend_from_slice(&crc);
}

/// Appends the end of a file whose header and sections have the checksums `crcs`.
pub(crate) fn end(bytes: &mut Vec<u8>, sections: usize, crcs: &[u8]) {
    let record = end_record(sections as u32);
    bytes.extend_from_slice(&record);
    bytes.extend_from_slice(&end_crc(crcs, &record).to_le_bytes());
}

pub(crate) fn end_record(sections: u32) -> [u8; 8] {
    let mut record = [0; 8];
    record[..4].copy_from_slice(&END);
    record[4..].copy_from_slice(&sections.to_le_bytes());
    record
}

pub(crate) fn end_crc(crcs: &[u8], record: &[u8]) -> u32 {
    let mut hasher = crc32fast::Hasher::new();
    hasher.update(crcs);
    hasher.update(record);
    hasher.finalize()
}
