//! Saving a microVM to two files, and going on with one that was saved.
//!
//! The state file has these sections, each described where its type is: `config` ([`SavedConfig`]), `machine`
//! ([`machine::MachineState`]) and `memory` ([`memory::image::ImageInfo`]). The memory file is flat and sparse. Both appear under their
//! names when both are complete; of a Diff into its base, the state and a redo log do.
//!
//! # What is the user's
//!
//! Disks: they are made to hold all that the guest flushed, or for overlays all that it wrote, and the state names them. Copying them is for who
//! needs copies. The log, metrics and the contents of the metadata service are not saved.
//!
//! # Invariants
//!
//! - A snapshot that fails leaves the machine as it was, the old files as they were, and no part of the new ones; the next Diff has what this one
//!   would have had.
//! - A load that fails leaves a process that was not configured yet, ready for another try.

pub(crate) mod ahead;
mod create;
pub(crate) mod job;
mod load;
mod saved;

use config::FullVmConfig;
use serde::{Deserialize, Serialize};
use snapshot::Section;

pub use saved::{Saved, Verified, VerifyError, verify};

/// What files of this kind say that they are.
pub const KIND: &str = "microvm";

/// What the microVM was told to be.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct SavedConfig {
    /// Its configuration, with its devices.
    #[serde(flatten)]
    pub config: FullVmConfig,
    /// Its devices are on virtio-pci.
    #[serde(default)]
    pub pci: bool,
    /// Its id when it was saved.
    #[serde(default)]
    pub id: String,
    /// Drives whose overlay is to be made at each load, because the snapshot was live: its disks are a base that is only read. Their
    /// `overlay.path` is how its name begins, with a number that is chosen then.
    #[serde(default)]
    pub fresh_overlays: Vec<String>,
}

impl Section for SavedConfig {
    const NAME: &'static str = "config";
}
