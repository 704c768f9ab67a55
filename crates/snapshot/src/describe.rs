//! The summary of a state file, for `snapshot info`.

use std::fmt;
use std::path::Path;

use serde::Serialize;

use crate::format::{FORMAT_VERSION, Header};
use crate::reader::{ReadError, Snapshot};

/// The summary of a state file. It is displayed as a table and serialized as an object.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct Description {
    /// The version of the file's format.
    pub format_version: u32,
    /// Its header.
    #[serde(flatten)]
    pub header: Header,
    /// The file's size in bytes.
    pub size: u64,
    /// Its sections in the file's order.
    pub sections: Vec<SectionDescription>,
}

/// The summary of one section.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct SectionDescription {
    /// Its name, including the instance.
    pub name: String,
    /// The version of its data.
    pub version: u16,
    /// Length of its data in bytes.
    pub size: u64,
}

impl Snapshot {
    /// The summary of the file.
    pub fn describe(&self) -> Description {
        Description {
            format_version: FORMAT_VERSION,
            header: self.header().clone(),
            size: self.size() as u64,
            sections: self
                .sections()
                .iter()
                .map(|s| SectionDescription { name: s.name.clone(), version: s.version, size: s.len as u64 })
                .collect(),
        }
    }
}

/// Reads the file at `path` and returns its summary. The file may be of any architecture and have
/// unknown sections.
pub fn describe(path: &Path) -> Result<Description, ReadError> {
    Snapshot::open(path).map(|snapshot| snapshot.describe())
}

/// Reads the file at `path`, checks it with [`Snapshot::verify`], and returns its summary.
pub fn verify(path: &Path) -> Result<Description, ReadError> {
    let snapshot = Snapshot::open(path)?;
    snapshot.verify()?;
    Ok(snapshot.describe())
}

impl fmt::Display for Description {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Header { kind, architecture, vesta_version, created_by, created_at_ms } = &self.header;
        writeln!(f, "format version  {}", self.format_version)?;
        writeln!(f, "kind            {kind}")?;
        writeln!(f, "architecture    {architecture}")?;
        writeln!(f, "vesta version   {vesta_version}")?;
        writeln!(f, "created by      {created_by}")?;
        writeln!(f, "created at      {created_at_ms} ms since 1970")?;
        writeln!(f, "size            {} bytes", self.size)?;
        for section in &self.sections {
            let SectionDescription { name, version, size } = section;
            writeln!(f, "section         {name}, version {version}, {size} bytes")?;
        }
        Ok(())
    }
}
