//! How a disk is opened.

use std::path::PathBuf;

use config::{CacheType, Drive, IoEngine};

/// How a disk is opened.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct DiskOptions {
    /// The file or block device.
    pub path: PathBuf,
    /// Whether the guest cannot write.
    pub read_only: bool,
    /// Whether the guest's flushes wait for the disk.
    pub cache_type: CacheType,
    /// The engine; the best that the kernel has where absent.
    pub engine: Option<IoEngine>,
    /// The overlay that takes the writes.
    pub overlay: Option<config::Overlay>,
    /// Number of queues in use at a time.
    pub io_threads: u16,
    /// Whether the disk is locked against other monitors.
    pub lock: bool,
    /// Whether the directory entry of a new overlay file is durable already; if not, it is synced.
    pub name_is_durable: bool,
}

impl DiskOptions {
    /// The options of `drive`, which was checked and so has a path.
    pub fn of(drive: &Drive) -> Self {
        DiskOptions {
            path: drive.path_on_host.clone().unwrap_or_default(),
            read_only: drive.is_read_only,
            cache_type: drive.cache_type,
            engine: drive.io_engine,
            overlay: drive.overlay.clone(),
            io_threads: drive.io_threads(),
            lock: drive.lock(),
            name_is_durable: false,
        }
    }
}
