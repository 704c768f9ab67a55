//! Why a machine cannot be started or saved.

use memory::MapError;
use memory::page_server::FetchError;

use crate::boot::BootError;
use crate::cpu::TemplateError;
use crate::debug::DebuggerError;
use crate::devices::DeviceError;
use crate::kvm::KvmError;
use crate::vcpu::VcpuThreadDied;

/// Why a machine cannot be saved.
#[derive(Debug, thiserror::Error)]
pub enum SaveError {
    /// KVM does not give a part of its state.
    #[error(transparent)]
    Kvm(#[from] KvmError),
    /// A bug in this monitor.
    #[error(transparent)]
    ThreadDied(#[from] VcpuThreadDied),
}

/// Why a machine cannot be started.
#[derive(Debug, thiserror::Error)]
pub enum StartError {
    /// A KVM call failed, or this host's KVM lacks something.
    #[error(transparent)]
    Kvm(#[from] KvmError),
    /// The CPU template asks for what this host lacks.
    #[error(transparent)]
    Template(#[from] TemplateError),
    /// Guest memory cannot be mapped.
    #[error(transparent)]
    Memory(#[from] MapError),
    /// The kernel, the initrd or the command line cannot be loaded.
    #[error(transparent)]
    Boot(#[from] BootError),
    /// The debugger's socket or thread cannot be created.
    #[error(transparent)]
    Debugger(#[from] DebuggerError),
    /// The devices cannot be built.
    #[error(transparent)]
    Device(#[from] DeviceError),
    /// This host's CPU lacks features that CPUID showed to the saved guest.
    #[error("this host's CPU lacks features that the saved guest uses: {}", missing.join(", "))]
    MissingCpuFeatures {
        /// The names of the features.
        missing: Vec<String>,
    },
    /// The saved state and the configuration disagree on the number of vCPUs.
    #[error("machine-config: vcpu_count is {configured}; the saved state has {saved} vCPUs")]
    VcpuCount {
        /// The number in the saved state.
        saved: usize,
        /// The number in the configuration.
        configured: u8,
    },
    /// The page server did not send pages that the vCPUs need.
    #[error(transparent)]
    PageServer(#[from] FetchError),
    /// The restore was cancelled while it waited for guest memory.
    #[error("the restore was cancelled while it waited for guest memory")]
    Cancelled,
    /// A bug in this monitor.
    #[error(transparent)]
    ThreadDied(#[from] VcpuThreadDied),
    /// The host is out of threads or descriptors.
    #[error("cannot create {what}: {source}")]
    Host {
        /// What was to be created.
        what: &'static str,
        /// The kernel's reason.
        source: std::io::Error,
    },
}
