//! Why a disk cannot be opened, or a block device not be made.

use std::io;
use std::path::PathBuf;

use config::ConfigError;

use crate::engine::UringError;
use crate::host_file::health::ContentsUnknown;
use crate::host_file::lock::LockError;
use crate::overlay::OverlayError;

/// Why a block device cannot be made, or its disk not be replaced.
#[derive(Debug, thiserror::Error)]
pub enum BlockError {
    /// What serves the disk cannot be made.
    #[error("drive {id}: {source}")]
    Disk {
        /// Which drive.
        id: String,
        /// Why not.
        source: DiskError,
    },
    /// The host has no more event descriptors.
    #[error("cannot make an event descriptor for a disk: {0}")]
    Event(#[source] io::Error),
    /// The driver has negotiated something else with the disk before.
    #[error("drive {id}: the disk that the guest knows is {was}, this one is not")]
    Differs {
        /// Which drive.
        id: String,
        /// What the guest relies on.
        was: &'static str,
    },
    /// A saved device that cannot be.
    #[error("the saved state of drive {id} is not possible: {source}")]
    State {
        /// Which drive.
        id: String,
        /// What is wrong with it.
        source: ConfigError,
    },
    /// Several I/O threads for a disk that only one can serve.
    #[error("drive {id} has an overlay: only one I/O thread can serve it, not {threads}")]
    OverlayThreads {
        /// Which drive.
        id: String,
        /// How many were asked for.
        threads: u16,
    },
}

/// Why a disk cannot be opened.
#[derive(Debug, thiserror::Error)]
pub enum DiskError {
    /// The kernel does not open it.
    #[error("cannot open disk {}: {source}", path.display())]
    Open {
        /// The disk.
        path: PathBuf,
        /// The kernel's reason.
        source: io::Error,
    },
    /// It is a directory, a pipe or another thing that cannot be a disk.
    #[error("disk {} is neither a file nor a block device", path.display())]
    NotADisk {
        /// What was named.
        path: PathBuf,
    },
    /// It could be opened but not read or synced.
    #[error("cannot use disk {}: {source}", path.display())]
    Read {
        /// The disk.
        path: PathBuf,
        /// The kernel's reason.
        source: io::Error,
    },
    /// Another monitor uses it.
    #[error(transparent)]
    Lock(#[from] LockError),
    /// A sync of it failed before.
    #[error(transparent)]
    ContentsUnknown(#[from] ContentsUnknown),
    /// An overlay does not open.
    #[error(transparent)]
    Overlay(#[from] OverlayError),
    /// `io_engine` is Async and there is none.
    #[error("io_engine Async: {0}")]
    Async(#[from] UringError),
    /// It has no `io_uring`, and the worker that is to serve it serves other devices, too.
    #[error(
        "io_engine Sync blocks, and the I/O worker of this drive serves other devices; enable io_uring, or restart the microVM"
    )]
    SyncOnSharedWorker,
}
