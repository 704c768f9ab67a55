//! What a state file says about itself, for people and scripts.

use std::fmt;
use std::path::Path;

use serde::Serialize;

use crate::format::{FORMAT_VERSION, Header};
use crate::reader::{ReadError, Snapshot};

/// A state file in summary. As text, a table; as JSON, an object.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct Description {
    /// The version of the file's format.
    pub format_version: u32,
    /// Who wrote it, and what it is.
    #[serde(flatten)]
    pub header: Header,
    /// The file's size in bytes.
    pub size: u64,
    /// Its sections in order.
    pub sections: Vec<SectionDescription>,
}

/// One section in summary.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct SectionDescription {
    /// Its name, with the instance.
    pub name: String,
    /// The version of its data.
    pub version: u16,
    /// Length of its data in bytes.
    pub size: u64,
}

impl Snapshot {
    /// The file in summary.
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

/// Reads the file at `path` and says what is in it. It may come from any architecture and hold unknown sections.
pub fn describe(path: &Path) -> Result<Description, ReadError> {
    Snapshot::open(path).map(|snapshot| snapshot.describe())
}

/// [`Snapshot::verify`] for the file at `path`.
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
