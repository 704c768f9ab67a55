//! What a microVM is, as its user writes it: one struct per JSON object of the API and of the configuration file,
//! with its defaults, bounds and checks.
//!
//! The same structs read a request body and a section of `--config-file`. This room does no I/O: it says whether a
//! value can be meant, never whether a file exists.
//!
//! # Invariants
//!
//! - Unknown fields are refused, with their name, wherever they stand.
//! - Deserializing checks form (types, names of variants); `check` methods check bounds and combinations. A value
//!   that came through both is in range, and other rooms may rely on it.
//! - Serializing gives the shape that the API answers with.
//!
//! # Errors
//!
//! [`ConfigError`]: each variant names the field, the value and the bound. Names have their own, [`IdError`].

#![forbid(unsafe_code)]

mod absent;
mod action;
mod boot_source;
mod drive;
mod entropy;
mod fork;
mod id;
mod logger;
mod machine_config;
mod mmds;
mod network;
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
pub use boot_source::{BootSource, DEFAULT_BOOT_ARGS, MAX_BOOT_ARGS_LEN};
pub use drive::{
    CacheType, DEFAULT_DRIVE_QUEUE_SIZE, Drive, DriveError, DriveUpdate, IoEngine, MAX_DRIVE_ID_LEN,
    MAX_DRIVE_QUEUE_SIZE, MAX_DRIVE_QUEUES, MAX_OVERLAY_LAYERS, MIN_DRIVE_QUEUE_SIZE, Overlay,
    check_drive_queues,
};
pub use entropy::Entropy;
pub use fork::{Child, DriveOverlay, Fork, ForkError, MAX_CHILDREN};
pub use id::{IdError, InstanceId, ResourceId};
pub use logger::{LogLevel, Logger, UnknownLogLevel};
pub use machine_config::{
    CpuTemplate, HugePages, MAX_MEM_SIZE_MIB, MAX_VCPU_COUNT, MachineConfig, MachineConfigUpdate,
};
pub use mmds::{DEFAULT_MMDS_ADDRESS, MmdsConfig, MmdsConfigError, MmdsVersion};
pub use network::{
    DEFAULT_NET_QUEUE_SIZE, MAX_IFACE_ID_LEN, MAX_NET_QUEUE_SIZE, MAX_QUEUE_PAIRS, MAX_TAP_NAME_LEN, MIN_MTU,
    MIN_NET_QUEUE_SIZE, MacAddress, MacAddressError, NetBackendKind, NetworkError, NetworkInterface,
    NetworkInterfaceUpdate, NetworkOverride, check_networks, override_networks,
};
pub use serial::Serial;
pub use snapshot::{
    DriveOverride, MemoryBackend, MemoryBackendType, SnapshotCreate, SnapshotError, SnapshotHugePages,
    SnapshotLoad, SnapshotType,
};
pub use token_bucket::{MAX_REFILL_TIME_MS, RateLimiter, TokenBucket};
pub use vm_config::{FullVmConfig, VmConfig, check_drives};
pub use vm_state::{Vm, VmState};
pub use vsock::{MAX_SOCKET_PATH_LEN, Vsock, VsockOverride};

/// A value that has the right form and cannot be meant.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum ConfigError {
    /// A number outside its bounds.
    #[error("{field} is {value}: it must be between {min} and {max}")]
    OutOfRange {
        /// The field's name in JSON.
        field: &'static str,
        /// What was given.
        value: u64,
        /// Smallest value allowed.
        min: u64,
        /// Largest value allowed.
        max: u64,
    },
    /// `smt` with an odd number of vCPUs above one.
    #[error("vcpu_count is {vcpu_count}: with smt it must be 1 or even")]
    OddVcpusWithSmt {
        /// What was given.
        vcpu_count: u8,
    },
    /// Memory that is not a whole number of huge pages.
    #[error("mem_size_mib is {mem_size_mib}: with huge_pages 2M it must be a multiple of 2")]
    OddMemoryWithHugePages {
        /// What was given.
        mem_size_mib: u32,
    },
    /// A kernel command line that does not fit in the guest's buffer.
    #[error("boot_args is {len} bytes long: at most {MAX_BOOT_ARGS_LEN} fit")]
    BootArgsTooLong {
        /// Length given, in bytes.
        len: usize,
    },
    /// A kernel command line with a NUL byte in it.
    #[error("boot_args has a NUL byte at offset {offset}: the kernel would not see what follows it")]
    BootArgsHaveNul {
        /// Where it stands.
        offset: usize,
    },
    /// The metadata service.
    #[error(transparent)]
    Mmds(#[from] MmdsConfigError),
    /// A block device.
    #[error(transparent)]
    Drive(#[from] DriveError),
    /// A network interface.
    #[error(transparent)]
    Network(#[from] NetworkError),
    /// A snapshot.
    #[error(transparent)]
    Snapshot(#[from] SnapshotError),
    /// Children of a fork.
    #[error(transparent)]
    Fork(#[from] ForkError),
    /// Two drives with the same id, in one configuration file.
    #[error("there are two drives with drive_id {drive_id}")]
    DuplicateDrive {
        /// The id.
        drive_id: String,
    },
    /// Two drives that are both the root device.
    #[error("drives {first} and {second} are both the root device: only one can be")]
    TwoRootDevices {
        /// The drive that is it.
        first: String,
        /// The drive that wants to be it too.
        second: String,
    },
    /// A path that no Unix socket can have.
    #[error("{field} is {len} bytes long: it must have 1 to {MAX_SOCKET_PATH_LEN}")]
    SocketPathLength {
        /// The field's name in JSON.
        field: &'static str,
        /// Length given, in bytes.
        len: usize,
    },
    /// A CPU template for another architecture.
    #[error("cpu_template is {template}; {template} is for aarch64 hosts and this one is x86_64")]
    ForeignCpuTemplate {
        /// What was given.
        template: &'static str,
    },
    /// Two sockets at one path.
    #[error("uds_path and seqpacket_uds_path are both {}: they must differ", path.display())]
    SameSocketPath {
        /// The path.
        path: std::path::PathBuf,
    },
}

/// Whether `value` lies between `min` and `max`, both included.
fn in_range(field: &'static str, value: u64, min: u64, max: u64) -> Result<(), ConfigError> {
    if (min..=max).contains(&value) {
        Ok(())
    } else {
        Err(ConfigError::OutOfRange { field, value, min, max })
    }
}
