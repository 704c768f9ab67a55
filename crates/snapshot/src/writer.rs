//! Writing a state file.

use std::io::Write as _;
use std::path::Path;

use serde::Serialize;

use crate::file::{AtomicFile, FileError, Staged};
use crate::format::{self, FORMAT_VERSION, Header, MAX_FILE_SIZE, MAX_NAME, MAX_SECTIONS};
use crate::section::Section;

/// Why a state file could not be written.
#[derive(Debug, thiserror::Error)]
pub enum WriteError {
    /// A section's data cannot be encoded as CBOR: a mistake in its `Serialize`.
    #[error("section {section}: cannot encode: {reason}")]
    Encode {
        /// The section's name.
        section: String,
        /// The encoder's reason.
        reason: String,
    },
    /// A duplicate, empty or too long name, or too many sections.
    #[error("section {section}: {reason}")]
    Section {
        /// The section's name.
        section: String,
        /// What is wrong with it.
        reason: &'static str,
    },
    /// The file would be too large to be read.
    #[error("state file: it has {size} bytes; at most {MAX_FILE_SIZE}")]
    TooLarge {
        /// Its size in bytes.
        size: u64,
    },
    /// The file could not be created or renamed.
    #[error(transparent)]
    File(#[from] FileError),
    /// The file could not be written: usually no space.
    #[error("state file {}: cannot write {size} bytes: {source}", path.display())]
    Write {
        /// The file.
        path: std::path::PathBuf,
        /// Its full size in bytes.
        size: u64,
        /// The kernel's reason.
        source: std::io::Error,
    },
}

/// Builds a state file in memory. [`Self::stage`] or [`Self::commit`] writes it.
#[derive(Debug)]
pub struct Writer {
    bytes: Vec<u8>,
    crcs: Vec<u8>,
    names: Vec<String>,
}

impl Writer {
    /// Starts a file with this header.
    pub fn new(header: &Header) -> Result<Self, WriteError> {
        let data = encode("header", header)?;
        let mut bytes = Vec::with_capacity(64 << 10);
        bytes.extend_from_slice(&format::MAGIC);
        bytes.extend_from_slice(&FORMAT_VERSION.to_le_bytes());
        bytes.extend_from_slice(&(data.len() as u32).to_le_bytes());
        bytes.extend_from_slice(&data);
        let mut crcs = Vec::new();
        format::seal(&mut bytes, 0, &mut crcs);
        Ok(Writer { bytes, crcs, names: Vec::new() })
    }

    /// Adds a section that exists once.
    pub fn put<S: Section>(&mut self, section: &S) -> Result<(), WriteError> {
        self.put_raw(S::NAME, S::VERSION, section)
    }

    /// Adds one of several sections of this type. `instance` distinguishes them: a device's id, a
    /// vCPU's number.
    pub fn put_instance<S: Section>(&mut self, instance: &str, section: &S) -> Result<(), WriteError> {
        self.put_raw(&format!("{}/{instance}", S::NAME), S::VERSION, section)
    }

    fn put_raw(&mut self, name: &str, version: u16, data: &impl Serialize) -> Result<(), WriteError> {
        let refused = |reason| Err(WriteError::Section { section: name.to_owned(), reason });
        if name.is_empty() || name.len() > MAX_NAME {
            return refused("its name must have 1 to 128 bytes");
        }
        if self.names.len() == MAX_SECTIONS {
            return refused("a file has at most 4096 sections");
        }
        if self.names.iter().any(|n| n == name) {
            return refused("the file has a section of that name already");
        }
        let data = encode(name, data)?;
        let start = self.bytes.len();
        self.bytes.extend_from_slice(&format::SECTION);
        self.bytes.extend_from_slice(&(name.len() as u16).to_le_bytes());
        self.bytes.extend_from_slice(&version.to_le_bytes());
        self.bytes.extend_from_slice(&(data.len() as u64).to_le_bytes());
        self.bytes.extend_from_slice(name.as_bytes());
        self.bytes.extend_from_slice(&data);
        format::seal(&mut self.bytes, start, &mut self.crcs);
        self.names.push(name.to_owned());
        Ok(())
    }

    /// Ends the file and returns its bytes.
    pub fn finish(self) -> Result<Vec<u8>, WriteError> {
        let Writer { mut bytes, crcs, names } = self;
        format::end(&mut bytes, names.len(), &crcs);
        if bytes.len() as u64 > MAX_FILE_SIZE {
            return Err(WriteError::TooLarge { size: bytes.len() as u64 });
        }
        Ok(bytes)
    }

    /// Writes the state to `file` and stages it: for [`commit_pair`](crate::commit_pair).
    pub fn stage(self, file: AtomicFile) -> Result<Staged, WriteError> {
        let bytes = self.finish()?;
        let failed =
            |source| WriteError::Write { path: file.path().to_path_buf(), size: bytes.len() as u64, source };
        file.file().write_all(&bytes).map_err(failed)?;
        Ok(file.stage())
    }

    /// Writes the file to `path`. It replaces an older file in one step.
    pub fn commit(self, path: &Path) -> Result<(), WriteError> {
        self.stage(AtomicFile::create(path)?)?.commit()?;
        Ok(())
    }
}

fn encode(section: &str, data: &impl Serialize) -> Result<Vec<u8>, WriteError> {
    let mut bytes = Vec::new();
    match ciborium::into_writer(data, &mut bytes) {
        Ok(()) => Ok(bytes),
        Err(e) => Err(WriteError::Encode { section: section.to_owned(), reason: e.to_string() }),
    }
}
