//! What a microVM's process is, decided once when it starts.

use machine::legacy::StartTimes;

/// The names and versions that the API reports.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Identity {
    /// The microVM's id.
    pub id: String,
    /// The program's name.
    pub app_name: &'static str,
    /// The program's version.
    pub version: &'static str,
    /// The version of Firecracker whose API this is.
    pub api_version: &'static str,
}

/// The options of the command line that hold for the whole process.
#[derive(Debug, Clone, Copy)]
pub struct Platform {
    /// The start times that the boot timer counts from; `None` for no boot timer.
    pub boot_timer: Option<StartTimes>,
    /// Whether devices are on virtio-pci instead of virtio-mmio.
    pub pci: bool,
    /// Largest contents of the metadata service, in bytes of JSON.
    pub mmds_size_limit: usize,
    /// Largest body of an API request, in bytes.
    pub max_payload: usize,
}
