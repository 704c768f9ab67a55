//! A state file's contents, and whether they and the memory file can be what they say.

use std::path::{Path, PathBuf};

use config::ConfigError;
use machine::MachineState;
use memory::MemoryLayout;
use memory::image::{ImageFile, ImageInfo, RestoreError, examine};
use memory::layout::MIB;
use snapshot::{Description, ReadError, Snapshot};

use super::{KIND, SavedConfig};

/// The state file of a microVM of this architecture, every section that this version knows decoded.
#[derive(Debug, Clone)]
pub struct Saved {
    /// The file in summary.
    pub description: Description,
    /// What the microVM was told to be.
    pub config: SavedConfig,
    /// What its memory file is.
    pub image: ImageInfo,
    /// The machine.
    pub machine: MachineState,
}

/// A snapshot that was found good.
#[derive(Debug, Clone)]
pub struct Verified {
    /// What the state file holds.
    pub saved: Saved,
    /// The memory file, where one was to be looked at.
    pub memory: Option<ImageFile>,
}

/// What is wrong with a snapshot.
#[derive(Debug, thiserror::Error)]
pub enum VerifyError {
    /// The state file cannot be read, is damaged, or holds something else.
    #[error(transparent)]
    State(#[from] ReadError),
    /// The memory file cannot be read.
    #[error(transparent)]
    Memory(#[from] RestoreError),
    /// The configuration in the state file is none that a microVM can have.
    #[error("{}: section config: {source}", path.display())]
    Config {
        /// The state file.
        path: PathBuf,
        /// What is wrong with it.
        source: ConfigError,
    },
    /// Two sections disagree.
    #[error("{}: {what}: section config says {configured}, section {section} has {found}", path.display())]
    Disagree {
        /// The state file.
        path: PathBuf,
        /// What they disagree on.
        what: &'static str,
        /// The configured number.
        configured: u64,
        /// The other section.
        section: &'static str,
        /// Its number.
        found: u64,
    },
    /// The memory lies where it does not for a guest of that size.
    #[error("{}: section memory: its regions are not those of a microVM with {mem_size_mib} MiB", path.display())]
    Layout {
        /// The state file.
        path: PathBuf,
        /// The configured size.
        mem_size_mib: u32,
    },
    /// The memory file is another guest's, or was cut off.
    #[error("the memory image {} has {found} bytes; the one of {} has {wanted}", path.display(), state.display())]
    MemorySize {
        /// The memory file.
        path: PathBuf,
        /// Its size in bytes.
        found: u64,
        /// The state file.
        state: PathBuf,
        /// What the state file says.
        wanted: u64,
    },
}

impl Saved {
    /// Reads the state file at `path`.
    pub fn open(path: &Path) -> Result<Self, ReadError> {
        Self::of(&Snapshot::open(path)?)
    }

    /// Decodes a state file.
    pub fn of(snapshot: &Snapshot) -> Result<Self, ReadError> {
        snapshot.expect(KIND)?;
        Ok(Saved {
            description: snapshot.describe(),
            config: snapshot.get()?,
            image: snapshot.get()?,
            machine: snapshot.get()?,
        })
    }
}

impl Saved {
    /// Reads the state file at `path` for a microVM that is to go on with it: its sections agree.
    pub fn load(path: &Path) -> Result<Self, VerifyError> {
        let saved = Self::open(path)?;
        saved.check(path)?;
        Ok(saved)
    }

    /// Whether this can be a microVM. The checksums do not say that: anyone can make a file whose checksums are right.
    fn check(&self, path: &Path) -> Result<(), VerifyError> {
        let path = || path.to_path_buf();
        let machine = &self.config.config.machine_config;
        machine.check().map_err(|source| VerifyError::Config { path: path(), source })?;
        let agree = |what, configured: u64, section, found: u64| {
            if configured == found {
                return Ok(());
            }
            Err(VerifyError::Disagree { path: path(), what, configured, section, found })
        };
        agree("vCPUs", u64::from(machine.vcpu_count), "machine", self.machine.vcpus.len() as u64)?;
        let mem_size_mib = machine.mem_size_mib;
        let layout = &self.image.layout;
        agree("bytes of memory", u64::from(mem_size_mib) * MIB, "memory", layout.ram_size())?;
        if *layout != MemoryLayout::of_size(mem_size_mib) {
            return Err(VerifyError::Layout { path: path(), mem_size_mib });
        }
        Ok(())
    }
}

/// Checks the state file at `state`: all checksums, that every section decodes, and that they agree. Of the memory file, that it is there and
/// as large as the state file says; it has no checksums.
pub fn verify(state: &Path, memory: Option<&Path>) -> Result<Verified, VerifyError> {
    let snapshot = Snapshot::open(state)?;
    // Those, too, that nobody here knows.
    snapshot.verify()?;
    let saved = Saved::of(&snapshot)?;
    saved.check(state)?;
    let memory = memory.map(|memory| examine(memory, &saved.image)).transpose()?;
    if let Some(file) = &memory
        && file.size != saved.image.layout.file_size()
    {
        return Err(VerifyError::MemorySize {
            path: file.path.clone(),
            found: file.size,
            state: state.to_path_buf(),
            wanted: saved.image.layout.file_size(),
        });
    }
    Ok(Verified { saved, memory })
}
