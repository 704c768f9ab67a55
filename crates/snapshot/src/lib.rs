//! The state file of a snapshot: everything of a microVM but its memory and its disks.
//!
//! This crate knows how such a file looks, how it is written so that it is whole or not there, and how one that anybody
//! may have damaged is read. What is in it belongs to others: each room gives its plain data as a [`Section`].
//!
//! # The format, version 1
//!
//! All numbers are little-endian. The header never changes its first 16 bytes, whatever the version.
//!
//! ```text
//! header   "VESTA\r\n\x1a"  u32 format version  u32 length  <length bytes of CBOR: Header>  u32 crc of all that
//! section  "SECT"  u16 length of name  u16 version  u64 length of data  <name> <data: one CBOR item>  u32 crc of all that
//! ...      more sections, in any order, no name twice
//! end      "END\0"  u32 number of sections  u32 crc of: all crcs before, this record
//! ```
//!
//! Data is [CBOR](https://www.rfc-editor.org/rfc/rfc8949): self-describing, so that a field that is added, or one that this
//! version does not know, is no reason to fail, and so that `snapshot info` can show a file without knowing who wrote it;
//! binary, because registers and XSAVE areas are. Sections that nobody asks for are tolerated. A section of an older
//! version is brought up to date by [`Section::migrate`]; one of a newer version is refused by name.
//!
//! The checksum is CRC-32: it finds every damage of up to 32 bits in a row, so every flipped byte, and it is not there
//! against forgery (neither is any checksum that travels with its data: who may write a snapshot may write a guest).
//! Header and sections have their own so that an error names what is damaged. The last one is taken of the others, so that
//! sections of two files cannot be mixed. (A CRC over data *and* its CRC is the same number for all data: one over the
//! whole file would see only the end.)
//!
//! # Invariants
//!
//! - A file under its final name is whole: see [`AtomicFile`].
//! - Reading allocates in proportion to the file: lengths are compared with what is there before anything is
//!   allocated, and data is walked once ([`ReadError::Malformed`]) before a decoder sees it. Files beyond
//!   [`MAX_FILE_SIZE`] are refused.
//! - What [`Snapshot::open`] returned has passed every checksum. What is left to fail is what the data means.
//!
//! # Errors
//!
//! [`ReadError`], [`WriteError`] and [`FileError`] name the file; where it makes sense, the section, the offset in the
//! file and the bound that was broken.
//!
//! # Callers
//!
//! `machine` and `control` write and read state files; `memory` writes its images and working sets by the same means.

#![forbid(unsafe_code)]

mod describe;
mod file;
mod format;
#[cfg(any(test, feature = "testing"))]
pub mod fuzz;
mod reader;
mod section;
mod wellformed;
mod writer;

pub use ciborium::Value;
pub use describe::{Description, SectionDescription, describe, verify};
pub use file::{
    AtomicFile, FileError, FileId, RedoLog, Staged, commit_pair, commit_redo, find, is_same_path, redo_path,
};
pub use format::{FORMAT_VERSION, Header, MAX_FILE_SIZE, MAX_NAME, MAX_SECTIONS};
pub use reader::{ReadError, SectionInfo, Snapshot};
pub use section::{MigrateError, Section, from_value};
pub use writer::{WriteError, Writer};
