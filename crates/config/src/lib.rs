//! Configuration of a microVM: one struct for each JSON object of the API and of the configuration
//! file, with defaults, bounds and checks.
//!
//! The same structs read an API request and a section of `--config-file`. This crate does no I/O:
//! it says whether a value is valid, not whether a file exists.
//!
//! # Invariants
//!
//! - Unknown fields are refused by name, at every depth.
//! - Deserializing checks types and the names of variants. `check` methods check bounds and
//!   combinations. Other crates may rely on a value that passed both.
//! - Serializing gives the JSON with which the API responds.
//!
//! # Errors
//!
//! [`ConfigError`]: each variant names the field, the value and the bound. Ids of microVMs and of
//! resources in paths have their own error, [`IdError`].

#![forbid(unsafe_code)]

mod absent;
mod action;
mod answers;
mod boot_source;
mod checks;
mod cpu_config;
mod drive;
mod entropy;
mod error;
mod fork;
mod id;
pub mod json_error;
mod limits;
mod logger;
mod mac;
mod machine_config;
mod metrics;
mod mmds;
mod network;
mod network_override;
mod queues;
#[cfg(feature = "schema")]
mod schema;
mod serde_helpers;
mod serial;
mod snapshot;
#[cfg(any(test, feature = "testing"))]
pub mod testing;
mod token_bucket;
mod vm_config;
mod vm_state;
mod vsock;

pub use absent::{Absent, AbsentList, Unsupported};
pub use action::{Action, ActionType};
pub use answers::{
    ChildOutcome, ChildState, Fault, ForkOutcome, HttpError, InstanceInfo, InstanceState, SnapshotJob,
    SnapshotJobState, Version,
};
pub use boot_source::{BootSource, DEFAULT_BOOT_ARGS};
pub use cpu_config::{
    Bitmap, BitmapError, CapabilityError, CpuConfig, CpuConfigSource, CpuidModifier, CpuidRegister,
    KvmCapability, MsrModifier, RegisterModifier,
};
pub use drive::{
    CacheType, DEFAULT_DRIVE_QUEUE_SIZE, Drive, DriveOverlay, DriveUpdate, IoEngine, Overlay, check_drives,
};
pub use entropy::Entropy;
pub use error::{ConfigError, DriveError, ForkError, MmdsConfigError, NetworkError, SnapshotError};
pub use fork::{Child, Fork};
pub use id::{IdError, InstanceId, ResourceId};
pub use limits::{
    MAX_BOOT_ARGS_LEN, MAX_CHILDREN, MAX_DRIVE_ID_LEN, MAX_DRIVE_QUEUE_SIZE, MAX_DRIVE_QUEUES,
    MAX_IFACE_ID_LEN, MAX_MEM_SIZE_MIB, MAX_NET_QUEUE_SIZE, MAX_OVERLAY_LAYERS, MAX_QUEUE_PAIRS,
    MAX_REFILL_TIME_MS, MAX_SOCKET_PATH_LEN, MAX_TAP_NAME_LEN, MAX_TEMPLATE_ENTRIES, MAX_VCPU_COUNT,
    MIN_DRIVE_QUEUE_SIZE, MIN_MTU, MIN_NET_QUEUE_SIZE,
};
pub use logger::{LogLevel, Logger, UnknownLogLevel};
pub use mac::{MacAddress, MacAddressError};
pub use machine_config::{CpuTemplate, HugePages, MachineConfig, MachineConfigUpdate};
pub use metrics::Metrics;
pub use mmds::{DEFAULT_MMDS_ADDRESS, MmdsConfig, MmdsVersion};
pub use network::{
    DEFAULT_NET_QUEUE_SIZE, NetBackendKind, NetworkInterface, NetworkInterfaceUpdate, check_networks,
};
pub use network_override::{NetworkOverride, apply_network_overrides};
pub use queues::{QueueBounds, QueueConfig};
pub use serial::Serial;
pub use snapshot::{
    DriveOverride, MemoryBackend, MemoryBackendType, SnapshotCreate, SnapshotHugePages, SnapshotLoad,
    SnapshotType,
};
pub use token_bucket::{RateLimiter, TokenBucket};
pub use vm_config::{FullVmConfig, VmConfig};
pub use vm_state::{Vm, VmState};
pub use vsock::{Vsock, VsockOverride};
