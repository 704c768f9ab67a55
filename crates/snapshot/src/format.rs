//! Constants and checksums of the format, which the writer and the reader share.

use serde::{Deserialize, Serialize};

/// The version of the format that this crate writes, and the newest that it reads.
pub const FORMAT_VERSION: u32 = 1;
/// The largest state file, in bytes. A machine of 128 vCPUs has about 2 MiB of state.
pub const MAX_FILE_SIZE: u64 = 64 << 20;
/// The most sections of a file.
pub const MAX_SECTIONS: usize = 4096;
/// The longest name of a section, in bytes.
pub const MAX_NAME: usize = 128;

pub(crate) const MAGIC: [u8; 8] = *b"VESTA\r\n\x1a";
pub(crate) const SECTION: [u8; 4] = *b"SECT";
pub(crate) const END: [u8; 4] = *b"END\0";
/// Length of the magic, the format version and the header's length.
pub(crate) const PREFIX_LEN: usize = 16;
/// Length of a section's marker, length of name, version and length of data.
pub(crate) const FRAME_LEN: usize = 16;

/// The header of a file: its kind, its architecture and its writer. Unknown fields are ignored.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Header {
    /// What the file holds: `microvm` for a machine's state, `working-set` for a working set.
    pub kind: String,
    /// The CPU architecture, as Rust names it (`x86_64`).
    pub architecture: String,
    /// The version of vesta that wrote it.
    pub vesta_version: String,
    /// The program that wrote it.
    pub created_by: String,
    /// Time at which it was written, in milliseconds since 1970 (UTC), by the caller's clock.
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

/// Appends the checksum of `bytes[from..]` to `bytes`, and to `crcs` for the end record.
pub(crate) fn seal(bytes: &mut Vec<u8>, from: usize, crcs: &mut Vec<u8>) {
    let crc = crc32fast::hash(&bytes[from..]).to_le_bytes();
    bytes.extend_from_slice(&crc);
    crcs.extend_from_slice(&crc);
}

/// Appends the end record of a file whose header and sections have the checksums `crcs`.
pub(crate) fn end(bytes: &mut Vec<u8>, sections: usize, crcs: &[u8]) {
    let record = end_record(sections as u32);
    bytes.extend_from_slice(&record);
    bytes.extend_from_slice(&end_crc(crcs, &record).to_le_bytes());
}

/// The end record without its checksum.
pub(crate) fn end_record(sections: u32) -> [u8; 8] {
    let mut record = [0; 8];
    record[..4].copy_from_slice(&END);
    record[4..].copy_from_slice(&sections.to_le_bytes());
    record
}

/// The checksum of the end record.
pub(crate) fn end_crc(crcs: &[u8], record: &[u8]) -> u32 {
    let mut hasher = crc32fast::Hasher::new();
    hasher.update(crcs);
    hasher.update(record);
    hasher.finalize()
}
