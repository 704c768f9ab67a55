//! Errors of configuration checks.

use std::net::Ipv4Addr;
use std::path::PathBuf;

use crate::limits::{
    MAX_BOOT_ARGS_LEN, MAX_CHILDREN, MAX_DRIVE_ID_LEN, MAX_IFACE_ID_LEN, MAX_SOCKET_PATH_LEN,
    MAX_TAP_NAME_LEN, MAX_TEMPLATE_ENTRIES,
};

/// A value that has the right type and is invalid.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum ConfigError {
    /// A number outside its bounds.
    #[error("{field} is {value}; it must be between {min} and {max}")]
    OutOfRange {
        /// The field's name in JSON.
        field: &'static str,
        /// The value given.
        value: u64,
        /// Smallest value allowed.
        min: u64,
        /// Largest value allowed.
        max: u64,
    },
    /// A queue size that is not a power of two.
    #[error("queue_size is {queue_size}; it must be a power of two")]
    QueueSize {
        /// The value given.
        queue_size: u16,
    },
    /// A path that the kernel cannot take.
    #[error("{field} is empty or has a NUL byte")]
    BadPath {
        /// The field's name in JSON.
        field: &'static str,
    },
    /// `smt` with an odd number of vCPUs above one.
    #[error("vcpu_count is {vcpu_count}; with smt it must be 1 or even")]
    OddVcpusWithSmt {
        /// The value given.
        vcpu_count: u8,
    },
    /// Memory that is not a whole number of huge pages.
    #[error("mem_size_mib is {mem_size_mib}; with huge_pages 2M it must be a multiple of 2")]
    OddMemoryWithHugePages {
        /// The value given.
        mem_size_mib: u32,
    },
    /// A kernel command line that does not fit in the guest's buffer.
    #[error("boot_args is {len} bytes long; with its final NUL it must fit in {MAX_BOOT_ARGS_LEN}")]
    BootArgsTooLong {
        /// Length given, in bytes.
        len: usize,
    },
    /// A kernel command line with a NUL byte. The kernel would ignore what follows it.
    #[error("boot_args has a NUL byte at offset {offset}")]
    BootArgsHaveNul {
        /// Offset of the byte.
        offset: usize,
    },
    /// The metadata service.
    #[error(transparent)]
    Mmds(#[from] MmdsConfigError),
    /// A drive.
    #[error(transparent)]
    Drive(#[from] DriveError),
    /// A network interface.
    #[error(transparent)]
    Network(#[from] NetworkError),
    /// A snapshot.
    #[error(transparent)]
    Snapshot(#[from] SnapshotError),
    /// A fork.
    #[error(transparent)]
    Fork(#[from] ForkError),
    /// Two drives with the same id.
    #[error("two drives have the drive_id {drive_id}")]
    DuplicateDrive {
        /// The id.
        drive_id: String,
    },
    /// Two drives with `is_root_device`.
    #[error("drives {first} and {second} are both the root device; at most one can be")]
    TwoRootDevices {
        /// Id of the first drive.
        first: String,
        /// Id of the second drive.
        second: String,
    },
    /// A path that is too long for a Unix socket, or empty.
    #[error("{field} is {len} bytes long; it must have 1 to {MAX_SOCKET_PATH_LEN}")]
    SocketPathLength {
        /// The field's name in JSON.
        field: &'static str,
        /// Length given, in bytes.
        len: usize,
    },
    /// A CPU template for another architecture.
    #[error("cpu_template is {template}, which is for aarch64 hosts; this host is x86_64")]
    ForeignCpuTemplate {
        /// The template given.
        template: &'static str,
    },
    /// A list of a custom CPU template that is too long.
    #[error("cpu-config: {list} has {count} entries; at most {MAX_TEMPLATE_ENTRIES}")]
    TemplateEntries {
        /// The list's name in JSON.
        list: &'static str,
        /// Its entries.
        count: usize,
    },
    /// Two vsock sockets at one path.
    #[error("uds_path and seqpacket_uds_path are both {}; they must differ", path.display())]
    SameSocketPath {
        /// The path.
        path: PathBuf,
    },
    /// An error in one of several devices of a kind.
    #[error("{kind} {id}: {source}")]
    Device {
        /// Kind of the device, such as "drive".
        kind: &'static str,
        /// Id of the device.
        id: String,
        /// What is wrong with it.
        source: Box<ConfigError>,
    },
}

impl ConfigError {
    /// Names the drive that has the error.
    pub(crate) fn in_drive(self, drive_id: &str) -> ConfigError {
        ConfigError::Device { kind: "drive", id: drive_id.to_owned(), source: Box::new(self) }
    }

    /// Names the network interface that has the error.
    pub(crate) fn in_network(self, iface_id: &str) -> ConfigError {
        ConfigError::Device { kind: "network interface", id: iface_id.to_owned(), source: Box::new(self) }
    }
}

/// An invalid drive.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum DriveError {
    /// A `drive_id` that is empty, too long, or has spaces, control or non-ASCII characters.
    #[error("drive_id is {drive_id:?}; it must be 1 to {MAX_DRIVE_ID_LEN} visible ASCII characters")]
    Id {
        /// The id given.
        drive_id: String,
    },
    /// The body of a request has another id than its path.
    #[error("drive_id is {body:?}; the request is for {path:?}")]
    IdMismatch {
        /// The id in the body.
        body: String,
        /// The id in the path, or of the drive to update.
        path: String,
    },
    /// Neither a disk nor a socket.
    #[error("path_on_host is missing")]
    NoPath,
    /// A vhost-user backend.
    #[error("socket: this version does not support vhost-user block devices")]
    VhostUser,
    /// Several I/O threads for a drive with an overlay.
    #[error("io_threads is {io_threads}; with an overlay it must be 1")]
    OverlayThreads {
        /// The value given.
        io_threads: u16,
    },
    /// An update of the disk below an overlay. The overlay was created on the old disk.
    #[error("path_on_host cannot change below an overlay; give a new overlay too")]
    OverlayOnOldPath,
}

/// An invalid network interface.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum NetworkError {
    /// An `iface_id` that is empty, too long, or has spaces, control or non-ASCII characters.
    #[error("iface_id is {iface_id:?}; it must be 1 to {MAX_IFACE_ID_LEN} visible ASCII characters")]
    Id {
        /// The id given.
        iface_id: String,
    },
    /// The body of a request has another id than its path.
    #[error("iface_id is {body:?}; the request is for {path:?}")]
    IdMismatch {
        /// The id in the body.
        body: String,
        /// The id in the path, or of the interface to update.
        path: String,
    },
    /// A field that the backend needs is missing.
    #[error("{field} is missing; the backend {backend} needs it")]
    MissingField {
        /// The field's name in JSON.
        field: &'static str,
        /// The backend's name in JSON.
        backend: &'static str,
    },
    /// A field that is impossible together with another.
    #[error("{field} cannot be combined with {with}")]
    Conflict {
        /// The field's name in JSON.
        field: &'static str,
        /// The value that the field conflicts with.
        with: &'static str,
    },
    /// An invalid name of a tap.
    #[error(
        "host_dev_name is {name:?}; it must be a tap name of 1 to {MAX_TAP_NAME_LEN} visible ASCII \
         characters without /, % and :, or an absolute path"
    )]
    TapName {
        /// The name given, cut after 64 characters.
        name: String,
    },
    /// The number of tap descriptors is not the number of queue pairs.
    #[error("fds has {count} descriptors; num_queues is {pairs}, and each queue pair needs one")]
    DescriptorCount {
        /// Number of descriptors.
        count: usize,
        /// Number of queue pairs.
        pairs: u16,
    },
    /// An override of an interface that the microVM does not have.
    #[error("network_overrides: the microVM has no network interface {iface_id}")]
    Unknown {
        /// The id given.
        iface_id: String,
    },
    /// Two interfaces share something that only one can have.
    #[error("network interfaces {first} and {second} have the same {what}: {value}")]
    Duplicate {
        /// Id of the first interface.
        first: String,
        /// Id of the second interface.
        second: String,
        /// The field in which both have the same value, such as `guest_mac`.
        what: &'static str,
        /// Its value.
        value: String,
    },
}

/// An invalid configuration of the metadata service.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum MmdsConfigError {
    /// No network interface leads to the service.
    #[error("mmds-config: network_interfaces is empty; name at least one interface")]
    NoInterfaces,
    /// A network interface that the microVM does not have.
    #[error("mmds-config: network_interfaces names {0}, which does not exist")]
    NoSuchInterface(String),
    /// A network interface whose frames the monitor does not see.
    #[error("mmds-config: network interface {0} has the backend vhost, whose frames only the kernel sees")]
    Vhost(String),
    /// A network interface with several queue pairs.
    #[error("mmds-config: network interface {iface_id} has num_queues {pairs}; it must be 1")]
    SeveralQueues {
        /// Id of the interface.
        iface_id: String,
        /// Its number of queue pairs.
        pairs: u16,
    },
    /// An address that is routable or reserved.
    #[error("mmds-config: ipv4_address is {0}; it must be between 169.254.1.0 and 169.254.254.255")]
    NotLinkLocal(Ipv4Addr),
}

/// An invalid request to create or load a snapshot.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum SnapshotError {
    /// Two sources of memory, or none.
    #[error("exactly one of mem_backend and mem_file_path must be given")]
    MemoryBackends,
    /// `prefetch` with a page server, which decides itself which pages it sends first.
    #[error("prefetch cannot be combined with mem_backend Uffd")]
    PrefetchWithUffd,
    /// State and memory in one file.
    #[error("snapshot_path and mem_file_path are both {}; they must differ", path.display())]
    SameFile {
        /// The file.
        path: PathBuf,
    },
    /// An overlay that is also a file of the snapshot.
    #[error("drives[].overlay and {field} are both {}; they must differ", path.display())]
    OverlayIsSnapshotFile {
        /// The field that names the snapshot's file.
        field: &'static str,
        /// The file.
        path: PathBuf,
    },
    /// New overlays for a snapshot that is not live.
    #[error("drives needs \"live\": true; otherwise the microVM keeps its disks")]
    DrivesNotLive,
}

/// An invalid fork.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum ForkError {
    /// No children, or too many.
    #[error("children has {count} entries; it must have 1 to {MAX_CHILDREN}")]
    Count {
        /// Number of children given.
        count: usize,
    },
    /// Two values that must differ.
    #[error("{field} {value} is given twice")]
    Duplicate {
        /// The field's name in JSON.
        field: &'static str,
        /// Its value.
        value: String,
    },
}
