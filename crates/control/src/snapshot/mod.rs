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
//!   would have had. But a Diff in place whose base cannot be written after its commit is complete together with its log; the error names that.
//! - A load that fails leaves a process that was not configured yet, ready for another try.

pub(crate) mod ahead;
mod create;
pub(crate) mod job;
mod load;
mod saved;

use config::{CpuTemplate, FullVmConfig};
use serde::de::Error as _;
use serde::{Deserialize, Deserializer, Serialize, Serializer};
use snapshot::{Section, Value, from_value};

pub use saved::{Saved, Verified, VerifyError, verify};

/// What files of this kind say that they are.
pub const KIND: &str = "microvm";

/// What the microVM was told to be. In the section, the keys of [`FullVmConfig`] stand beside the others.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct SavedConfig {
    /// Its configuration, with its devices.
    pub config: FullVmConfig,
    /// Its devices are on virtio-pci.
    pub pci: bool,
    /// Its id when it was saved.
    pub id: String,
    /// Drives whose overlay is to be made at each load, because the snapshot was live: its disks are a base that is only read. Their
    /// `overlay.path` is how its name begins, with a number that is chosen then.
    pub fresh_overlays: Vec<String>,
}

/// The fields of [`SavedConfig`] beside the configuration.
#[derive(Deserialize)]
struct Rest {
    #[serde(default)]
    pci: bool,
    #[serde(default)]
    id: String,
    #[serde(default)]
    fresh_overlays: Vec<String>,
}

impl Serialize for SavedConfig {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        #[derive(Serialize)]
        struct Flat<'a> {
            #[serde(flatten)]
            config: &'a FullVmConfig,
            pci: bool,
            id: &'a str,
            fresh_overlays: &'a [String],
        }
        let SavedConfig { config, pci, id, fresh_overlays } = self;
        Flat { config, pci: *pci, id, fresh_overlays }.serialize(serializer)
    }
}

/// Both structs read the whole section, each its own keys (see [`from_value`]).
impl<'de> Deserialize<'de> for SavedConfig {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        let section = Value::deserialize(deserializer)?;
        let mut config: FullVmConfig = from_value(&section).map_err(D::Error::custom)?;
        let Rest { pci, id, fresh_overlays } = from_value(&section).map_err(D::Error::custom)?;
        // Earlier versions took this template, which had no effect, and saved it.
        let template = &mut config.machine_config.cpu_template;
        *template = template.filter(|template| *template != CpuTemplate::V1N1);
        Ok(SavedConfig { config, pci, id, fresh_overlays })
    }
}

impl Section for SavedConfig {
    const NAME: &'static str = "config";
}
