//! The state file of a snapshot: all state of a microVM except its memory and its disks.
//!
//! This crate defines the file format, writes files atomically, and reads files that may be damaged
//! or hostile. The contents belong to other crates: each provides its plain data as a [`Section`].
//!
//! # The format, version 1
//!
//! All numbers are little-endian. The first 16 bytes have this layout in every version.
//!
//! ```text
//! header   "VESTA\r\n\x1a"  u32 format version  u32 length  <length bytes of CBOR: Header>
//!          u32 CRC of all that
//! section  "SECT"  u16 length of name  u16 version  u64 length of data
//!          <name>  <data: one CBOR item>  u32 CRC of all that
//! ...      more sections, in any order, no name twice
//! end      "END\0"  u32 number of sections  u32 CRC of: all CRCs before, this record
//! ```
//!
//! Data is [CBOR](https://www.rfc-editor.org/rfc/rfc8949). It is self-describing, so an added or
//! unknown field is no error, and `snapshot info` can show a file without knowing its sections. It
//! is binary, because registers and XSAVE areas are. Unknown sections are ignored. A section of an
//! older version is migrated by [`Section::migrate`]; one of a newer version is refused by name.
//!
//! The checksum is CRC-32. It detects any damage of up to 32 consecutive bits, so every flipped
//! byte. It does not protect against forgery, as no checksum in the file itself can: a process that
//! may write a snapshot may write a guest. Header and sections have their own checksums, so that an
//! error names what is damaged. The last checksum covers the others, so that sections of two files
//! cannot be mixed. (A CRC over data *and* its CRC is the same for all data, so one over the whole
//! file would cover only the end record.)
//!
//! # Invariants
//!
//! - A file under its final name is complete: see [`AtomicFile`].
//! - Reading allocates in proportion to the file. Lengths are compared with the bytes that are
//!   there before anything is allocated, and data is checked once ([`ReadError::Malformed`]) before
//!   a decoder reads it. Files larger than [`MAX_FILE_SIZE`] are refused.
//! - A [`Snapshot`] has passed every checksum. Only the meaning of its data can still be wrong.
//!
//! # Errors
//!
//! [`ReadError`], [`WriteError`] and [`FileError`] name the file and, if there is one, the section,
//! the offset in the file and the bound.
//!
//! # Callers
//!
//! `machine` and `control` write and read state files. `memory` writes its images as
//! [`AtomicFile`]s and its working sets in this format.

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
