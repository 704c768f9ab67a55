//! What the tools for CPU templates can be asked to do.

use std::path::PathBuf;

/// A command.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum Tool {
    /// Prints this text.
    Help(&'static str),
    /// Prints the version of Firecracker's tool.
    Version,
    /// Writes what the guest's vCPU shows.
    Dump { guest: GuestFiles, output: PathBuf },
    /// Writes what templates do not have in common, each to a file with `suffix` in its name.
    Strip { paths: Vec<PathBuf>, suffix: String },
    /// Checks that the guest's vCPU shows what its template says.
    Verify { guest: GuestFiles },
    /// Writes what the guest's vCPU shows, with what that depends on.
    FingerprintDump { guest: GuestFiles, output: PathBuf },
    /// Compares these fields of two fingerprints.
    FingerprintCompare { previous: PathBuf, current: PathBuf, fields: Vec<Field> },
}

/// The files that describe a guest. Without any it is the default one.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub(crate) struct GuestFiles {
    /// Its configuration file.
    pub(crate) config: Option<PathBuf>,
    /// Its CPU template, in place of the configuration file's.
    pub(crate) template: Option<PathBuf>,
}

/// A field of a fingerprint.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Field {
    FirecrackerVersion,
    KernelVersion,
    MicrocodeVersion,
    BiosVersion,
    BiosRevision,
    GuestCpuConfig,
}

impl Field {
    pub(super) const ALL: [Field; 6] = [
        Field::FirecrackerVersion,
        Field::KernelVersion,
        Field::MicrocodeVersion,
        Field::BiosVersion,
        Field::BiosRevision,
        Field::GuestCpuConfig,
    ];

    /// Its key in the file.
    pub(super) fn name(self) -> &'static str {
        match self {
            Field::FirecrackerVersion => "firecracker_version",
            Field::KernelVersion => "kernel_version",
            Field::MicrocodeVersion => "microcode_version",
            Field::BiosVersion => "bios_version",
            Field::BiosRevision => "bios_revision",
            Field::GuestCpuConfig => "guest_cpu_config",
        }
    }
}
