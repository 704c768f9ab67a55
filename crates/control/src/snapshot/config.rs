//! [`SavedConfig`]: the section `config` of a state file.

use config::{CpuTemplate, FullVmConfig};
use serde::de::Error as _;
use serde::{Deserialize, Deserializer, Serialize, Serializer};
use snapshot::{Section, Value, from_value};

/// The kind in the header of a microVM's state file.
pub const KIND: &str = "microvm";

/// The configuration of a saved microVM. In the section, the keys of [`FullVmConfig`] stand beside
/// the others.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct SavedConfig {
    /// The configuration.
    pub config: FullVmConfig,
    /// Whether its devices are on virtio-pci.
    pub pci: bool,
    /// Its id when it was saved.
    pub id: String,
    /// The drives for which each load creates an overlay, because the snapshot was live: their
    /// disks are bases that are only read. Their `overlay.path` is the overlay's name with a
    /// number; each load chooses another number.
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

/// Two structs read the whole section, each its own keys (see [`from_value`]).
impl<'de> Deserialize<'de> for SavedConfig {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        let section = Value::deserialize(deserializer)?;
        let mut config: FullVmConfig = from_value(&section).map_err(D::Error::custom)?;
        let Rest { pci, id, fresh_overlays } = from_value(&section).map_err(D::Error::custom)?;
        // Earlier versions accepted this template, which had no effect, and saved it.
        let template = &mut config.machine_config.cpu_template;
        *template = template.filter(|template| *template != CpuTemplate::V1N1);
        Ok(SavedConfig { config, pci, id, fresh_overlays })
    }
}

impl Section for SavedConfig {
    const NAME: &'static str = "config";
}
