//! Reading and checking a state file.

use std::fs::File;
use std::io::Read as _;
use std::ops::Range;
use std::path::{Path, PathBuf};

use rustix::fs::{Mode, OFlags};
use serde::de::{DeserializeOwned, IgnoredAny};

use crate::Value;
use crate::format::{
    self, FORMAT_VERSION, FRAME_LEN, Header, MAX_FILE_SIZE, MAX_NAME, MAX_SECTIONS, PREFIX_LEN,
};
use crate::section::{Section, from_value};
use crate::wellformed;

/// Why a state file cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum ReadError {
    /// The file cannot be opened or read.
    #[error("state file {}: cannot read: {source}", path.display())]
    Io {
        /// The file.
        path: PathBuf,
        /// The kernel's reason.
        source: std::io::Error,
    },
    /// It is a directory, a device or a pipe.
    #[error("state file {}: it is not a regular file", path.display())]
    NotAFile {
        /// The path.
        path: PathBuf,
    },
    /// It is larger than any state file.
    #[error("state file {}: it has {size} bytes; at most {MAX_FILE_SIZE}", path.display())]
    TooLarge {
        /// The file.
        path: PathBuf,
        /// Its size in bytes.
        size: u64,
    },
    /// It does not begin with the magic of a state file.
    #[error("file {}: it is not a state file of vesta", path.display())]
    Magic {
        /// The file.
        path: PathBuf,
    },
    /// A newer vesta wrote it, in a newer format.
    #[error("state file {}: it has format version {found}; this vesta reads versions 1 to {FORMAT_VERSION}", path.display())]
    FormatVersion {
        /// The file.
        path: PathBuf,
        /// Its version.
        found: u32,
    },
    /// It ends in the middle of a record.
    #[error(
        "state file {}: it is truncated: {what} at offset {offset} needs {needed} bytes, {left} are left",
        path.display()
    )]
    Truncated {
        /// The file.
        path: PathBuf,
        /// The record that is cut off.
        what: String,
        /// Offset of the record in the file.
        offset: usize,
        /// Bytes that it needs.
        needed: u64,
        /// Bytes from there to the end of the file.
        left: usize,
    },
    /// A checksum is wrong.
    #[error("state file {}: it is damaged: wrong checksum of {what} at offset {offset}", path.display())]
    Checksum {
        /// The file.
        path: PathBuf,
        /// The record that is damaged.
        what: String,
        /// Offset of the record in the file.
        offset: usize,
    },
    /// A record violates the format.
    #[error("state file {}: {what} at offset {offset} is malformed: {reason}", path.display())]
    Malformed {
        /// The file.
        path: PathBuf,
        /// The record that is malformed.
        what: String,
        /// Offset of the record in the file.
        offset: usize,
        /// How it violates the format.
        reason: String,
    },
    /// It is of another CPU architecture.
    #[error("state file {}: it was saved on {found}; this host is {}", path.display(), std::env::consts::ARCH)]
    Architecture {
        /// The file.
        path: PathBuf,
        /// Its architecture.
        found: String,
    },
    /// It is of another kind.
    #[error("state file {}: it holds {found:?}, not {wanted:?}", path.display())]
    Kind {
        /// The file.
        path: PathBuf,
        /// Its kind.
        found: String,
        /// The expected kind.
        wanted: String,
    },
    /// A required section is missing.
    #[error("state file {}: it has no section {section}", path.display())]
    Missing {
        /// The file.
        path: PathBuf,
        /// The section's name.
        section: String,
    },
    /// A section has an unknown version.
    #[error("state file {}: section {section} has version {found}; this vesta reads versions 1 to {newest}", path.display())]
    SectionVersion {
        /// The file.
        path: PathBuf,
        /// The section's name.
        section: String,
        /// Its version.
        found: u16,
        /// The newest known version.
        newest: u16,
    },
    /// A section's data does not decode as its type.
    #[error("state file {}: section {section}: {reason}", path.display())]
    Decode {
        /// The file.
        path: PathBuf,
        /// The section's name.
        section: String,
        /// The decoder's reason.
        reason: String,
    },
}

/// The name, version and position of a section.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct SectionInfo {
    /// Its name, including the instance.
    pub name: String,
    /// The version of its data.
    pub version: u16,
    /// Offset of its data in the file.
    pub offset: usize,
    /// Length of its data in bytes.
    pub len: usize,
}

impl SectionInfo {
    fn data(&self) -> Range<usize> {
        self.offset..self.offset + self.len
    }
}

/// A state file in memory that has passed all checksums.
#[derive(Debug)]
pub struct Snapshot {
    path: PathBuf,
    bytes: Vec<u8>,
    header: Header,
    sections: Vec<SectionInfo>,
}

impl Snapshot {
    /// Reads and checks the file at `path`. A pipe or a device is refused without blocking.
    pub fn open(path: &Path) -> Result<Self, ReadError> {
        let io = |source: std::io::Error| ReadError::Io { path: path.to_path_buf(), source };
        let flags = OFlags::RDONLY | OFlags::NONBLOCK | OFlags::NOCTTY | OFlags::CLOEXEC;
        let file = File::from(rustix::fs::open(path, flags, Mode::empty()).map_err(|e| io(e.into()))?);
        let metadata = file.metadata().map_err(io)?;
        if !metadata.is_file() {
            return Err(ReadError::NotAFile { path: path.to_path_buf() });
        }
        let too_large = |size| Err(ReadError::TooLarge { path: path.to_path_buf(), size });
        if metadata.len() > MAX_FILE_SIZE {
            return too_large(metadata.len());
        }
        let mut bytes = Vec::with_capacity(metadata.len() as usize);
        file.take(MAX_FILE_SIZE + 1).read_to_end(&mut bytes).map_err(io)?;
        if bytes.len() as u64 > MAX_FILE_SIZE {
            return too_large(bytes.len() as u64);
        }
        Self::parse(path, bytes)
    }

    /// Checks a file's bytes. `path` is for error messages.
    pub fn parse(path: &Path, bytes: Vec<u8>) -> Result<Self, ReadError> {
        let mut cursor = Cursor { path, bytes: &bytes, at: 0, crcs: Vec::new() };
        let header = cursor.header()?;
        let mut sections: Vec<SectionInfo> = Vec::new();
        while let Some(section) = cursor.section(sections.len())? {
            if sections.iter().any(|s| s.name == section.name) {
                return Err(cursor.malformed(
                    &section.name,
                    section.offset,
                    "the file has a section of that name already",
                ));
            }
            sections.push(section);
        }
        if cursor.at != bytes.len() {
            return Err(cursor.malformed("the file", cursor.at, "data after the end"));
        }
        Ok(Snapshot { path: path.to_path_buf(), bytes, header, sections })
    }

    /// The file's header.
    pub fn header(&self) -> &Header {
        &self.header
    }

    /// The path for error messages.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// The file's size in bytes.
    pub fn size(&self) -> usize {
        self.bytes.len()
    }

    /// All sections in the file's order, including unknown ones.
    pub fn sections(&self) -> &[SectionInfo] {
        &self.sections
    }

    /// Checks that the file has this kind and this host's architecture. To be called before a
    /// restore.
    pub fn expect_kind(&self, kind: &str) -> Result<(), ReadError> {
        let path = self.path.clone();
        if self.header.kind != kind {
            let (found, wanted) = (self.header.kind.clone(), kind.to_owned());
            return Err(ReadError::Kind { path, found, wanted });
        }
        if self.header.architecture != std::env::consts::ARCH {
            return Err(ReadError::Architecture { path, found: self.header.architecture.clone() });
        }
        Ok(())
    }

    /// The section of this type, migrated to its current version. An error if there is none.
    pub fn get<S: Section>(&self) -> Result<S, ReadError> {
        self.find(S::NAME)?
            .ok_or_else(|| ReadError::Missing { path: self.path.clone(), section: S::NAME.into() })
    }

    /// The section of this type, if the file has one.
    pub fn get_optional<S: Section>(&self) -> Result<Option<S>, ReadError> {
        self.find(S::NAME)
    }

    /// The section of this type with this instance. An error if there is none.
    pub fn get_instance<S: Section>(&self, instance: &str) -> Result<S, ReadError> {
        let section = format!("{}/{instance}", S::NAME);
        self.find(&section)?.ok_or_else(|| ReadError::Missing { path: self.path.clone(), section })
    }

    /// The instances of the sections of this type, in the file's order.
    pub fn instances<S: Section>(&self) -> impl Iterator<Item = &str> {
        self.sections.iter().filter_map(|s| s.name.strip_prefix(S::NAME)?.strip_prefix('/'))
    }

    /// The data of the section `name` as a generic value: for display. An error if there is none.
    pub fn value(&self, name: &str) -> Result<Value, ReadError> {
        let info = self.sections.iter().find(|s| s.name == name);
        let info =
            info.ok_or_else(|| ReadError::Missing { path: self.path.clone(), section: name.to_owned() })?;
        self.decode(info)
    }

    /// Checks that the data of each section decodes as CBOR, including unknown sections.
    pub fn verify(&self) -> Result<(), ReadError> {
        self.sections.iter().try_for_each(|section| self.decode::<IgnoredAny>(section).map(drop))
    }

    fn find<S: Section>(&self, name: &str) -> Result<Option<S>, ReadError> {
        let Some(info) = self.sections.iter().find(|s| s.name == name) else { return Ok(None) };
        if info.version == S::VERSION {
            return self.decode(info).map(Some);
        }
        if info.version > S::VERSION || info.version == 0 {
            return Err(ReadError::SectionVersion {
                path: self.path.clone(),
                section: name.to_owned(),
                found: info.version,
                newest: S::VERSION,
            });
        }
        let value = S::migrate(info.version, self.decode(info)?).map_err(|e| self.decode_error(name, &e))?;
        from_value(&value).map(Some).map_err(|e| self.decode_error(name, &e))
    }

    fn decode<T: DeserializeOwned>(&self, info: &SectionInfo) -> Result<T, ReadError> {
        ciborium::from_reader(&self.bytes[info.data()])
            .map_err(|e| self.decode_error(&info.name, &reason(&e)))
    }

    fn decode_error(&self, section: &str, reason: &dyn std::fmt::Display) -> ReadError {
        ReadError::Decode { path: self.path.clone(), section: section.to_owned(), reason: reason.to_string() }
    }
}

/// The decoder's error in words.
fn reason(e: &ciborium::de::Error<std::io::Error>) -> String {
    match e {
        ciborium::de::Error::Semantic(_, text) => text.clone(),
        ciborium::de::Error::Syntax(at) => format!("invalid data at byte {at} of the section"),
        ciborium::de::Error::Io(e) => e.to_string(),
        ciborium::de::Error::RecursionLimitExceeded => "nested too deeply".to_owned(),
    }
}

/// Reads a file from front to back. `at` is never beyond the end.
struct Cursor<'a> {
    path: &'a Path,
    bytes: &'a [u8],
    at: usize,
    /// The checksums so far, which the end record's checksum covers.
    crcs: Vec<u8>,
}

impl<'a> Cursor<'a> {
    fn header(&mut self) -> Result<Header, ReadError> {
        const WHAT: &str = "the header";
        let known = self.bytes.len().min(format::MAGIC.len());
        if self.bytes[..known] != format::MAGIC[..known] {
            return Err(ReadError::Magic { path: self.path.to_path_buf() });
        }
        let prefix = self.peek(WHAT, PREFIX_LEN as u64)?;
        let found = u32_at(prefix, 8);
        if found == 0 || found > FORMAT_VERSION {
            return Err(ReadError::FormatVersion { path: self.path.to_path_buf(), found });
        }
        let len = u32_at(prefix, 12);
        let whole = self.sealed(WHAT, PREFIX_LEN as u64 + u64::from(len))?;
        let data = &whole[PREFIX_LEN..];
        self.well_formed(WHAT, PREFIX_LEN, data)?;
        ciborium::from_reader(data).map_err(|e| self.malformed(WHAT, PREFIX_LEN, &reason(&e)))
    }

    /// Reads the next section, or the end record, for which it returns none. `before` sections came
    /// before it.
    fn section(&mut self, before: usize) -> Result<Option<SectionInfo>, ReadError> {
        let start = self.at;
        let marker = self.peek("a section", format::SECTION.len() as u64)?;
        if marker == format::END {
            self.end(before)?;
            return Ok(None);
        }
        if marker != format::SECTION {
            return Err(self.malformed("a section", start, "it has no section marker"));
        }
        if before == MAX_SECTIONS {
            return Err(self.malformed("a section", start, "a file has at most 4096 sections"));
        }
        let frame = self.peek("a section", FRAME_LEN as u64)?;
        let name_len = usize::from(u16_at(frame, 4));
        let version = u16_at(frame, 6);
        let len = u64::from_le_bytes(frame[8..16].try_into().expect("8 bytes"));
        if name_len == 0 || name_len > MAX_NAME {
            return Err(self.malformed("a section", start, "its name must have 1 to 128 bytes"));
        }
        let head = FRAME_LEN + name_len;
        // The name, for error messages, before its checksum was checked.
        let shown = String::from_utf8_lossy(&self.peek("a section", head as u64)?[FRAME_LEN..]).into_owned();
        let what = format!("section {shown:?}");
        let whole = self.sealed(&what, (head as u64).saturating_add(len))?;
        let name = std::str::from_utf8(&whole[FRAME_LEN..head])
            .map_err(|_| self.malformed(&what, start, "its name is not UTF-8"))?
            .to_owned();
        self.well_formed(&what, start + head, &whole[head..])?;
        Ok(Some(SectionInfo { name, version, offset: start + head, len: whole.len() - head }))
    }

    fn end(&mut self, sections: usize) -> Result<(), ReadError> {
        let start = self.at;
        let frame = self.peek("the end", 12)?;
        let (count, crc) = (u32_at(frame, 4), u32_at(frame, 8));
        if crc != format::end_crc(&self.crcs, &frame[..8]) {
            let (path, what) = (self.path.to_path_buf(), "the end".to_owned());
            return Err(ReadError::Checksum { path, what, offset: start });
        }
        if count as usize != sections {
            let reason = format!("it announces {count} sections, the file has {sections}");
            return Err(self.malformed("the end", start, &reason));
        }
        self.at += 12;
        Ok(())
    }

    /// Returns the next `needed` bytes and does not advance.
    fn peek(&self, what: &str, needed: u64) -> Result<&'a [u8], ReadError> {
        let left = &self.bytes[self.at..];
        match usize::try_from(needed).ok().and_then(|n| left.get(..n)) {
            Some(bytes) => Ok(bytes),
            None => Err(ReadError::Truncated {
                path: self.path.to_path_buf(),
                what: what.to_owned(),
                offset: self.at,
                needed,
                left: left.len(),
            }),
        }
    }

    /// Checks the next `len` bytes against the checksum that follows them, returns them, and
    /// advances past both.
    fn sealed(&mut self, what: &str, len: u64) -> Result<&'a [u8], ReadError> {
        let all = self.peek(what, len.saturating_add(4))?;
        let (bytes, crc) = all.split_at(all.len() - 4);
        if u32_at(crc, 0) != crc32fast::hash(bytes) {
            let (path, what) = (self.path.to_path_buf(), what.to_owned());
            return Err(ReadError::Checksum { path, what, offset: self.at });
        }
        self.crcs.extend_from_slice(crc);
        self.at += all.len();
        Ok(bytes)
    }

    fn well_formed(&self, what: &str, offset: usize, data: &[u8]) -> Result<(), ReadError> {
        wellformed::check(data).map_err(|error| self.malformed(what, offset + error.at, error.reason))
    }

    fn malformed(&self, what: &str, offset: usize, reason: &str) -> ReadError {
        let (path, what, reason) = (self.path.to_path_buf(), what.to_owned(), reason.to_owned());
        ReadError::Malformed { path, what, offset, reason }
    }
}

fn u16_at(bytes: &[u8], at: usize) -> u16 {
    u16::from_le_bytes(bytes[at..at + 2].try_into().expect("2 bytes"))
}

fn u32_at(bytes: &[u8], at: usize) -> u32 {
    u32::from_le_bytes(bytes[at..at + 4].try_into().expect("4 bytes"))
}
