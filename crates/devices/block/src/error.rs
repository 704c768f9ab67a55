//! Why a disk cannot be opened, or a block device not be built.

use std::io;
use std::path::PathBuf;

use config::ConfigError;

use crate::engine::UringError;
use crate::host_file::health::ContentsUnknown;
use crate::host_file::lock::LockError;
use crate::overlay::OverlayError;

/// Why a block device cannot be built, or its disk not be replaced.
#[derive(Debug, thiserror::Error)]
pub enum BlockError {
    /// The disk cannot be served.
    #[error("drive {id}: {source}")]
    Disk {
        /// The drive.
        id: String,
        /// The reason.
        source: DiskError,
    },
    /// The host has no more event descriptors.
    #[error("cannot create an eventfd for a drive: {0}")]
    Event(#[source] io::Error),
    /// The disk lacks a property that the driver has negotiated.
    #[error("drive {id}: the disk does not fit the guest, which needs one {was}")]
    Differs {
        /// The drive.
        id: String,
        /// The property.
        was: &'static str,
    },
    /// A saved configuration that is out of bounds.
    #[error("drive {id}: invalid saved state: {source}")]
    State {
        /// The drive.
        id: String,
        /// The value and its bound.
        source: ConfigError,
    },
    /// Several I/O threads for a disk with an overlay, which only one thread can serve.
    #[error("drive {id}: io_threads is {threads}; 1 with an overlay")]
    OverlayThreads {
        /// The drive.
        id: String,
        /// The number that was asked for.
        threads: u16,
    },
}

/// Why a disk cannot be opened, served or closed.
#[derive(Debug, thiserror::Error)]
pub enum DiskError {
    /// The kernel refuses to open it. The path comes last too: clients of Firecracker take it from
    /// there.
    #[error("cannot open {0}: {source} {0}", path.display())]
    Open {
        /// The file or device.
        path: PathBuf,
        /// The kernel's reason.
        source: io::Error,
    },
    /// It is a directory, a pipe or anything else that cannot be a disk.
    #[error("disk {}: neither a file nor a block device", path.display())]
    NotADisk {
        /// The path.
        path: PathBuf,
    },
    /// It was opened but cannot be read.
    #[error("cannot read disk {}: {source}", path.display())]
    Read {
        /// The file or device.
        path: PathBuf,
        /// The kernel's reason.
        source: io::Error,
    },
    /// It cannot be locked.
    #[error(transparent)]
    Lock(#[from] LockError),
    /// A sync of it failed before.
    #[error(transparent)]
    ContentsUnknown(#[from] ContentsUnknown),
    /// An overlay cannot be opened.
    #[error(transparent)]
    Overlay(#[from] OverlayError),
    /// `io_engine` is Async, and `io_uring` is not available.
    #[error("io_engine Async: {0}")]
    Async(#[from] UringError),
    /// Only [`IoEngine::Sync`](config::IoEngine::Sync) can serve it, and its worker also serves
    /// other devices.
    #[error(
        "io_engine Sync blocks, and the I/O worker of this drive serves other devices; enable io_uring, or restart the microVM"
    )]
    SyncOnSharedWorker,
}
