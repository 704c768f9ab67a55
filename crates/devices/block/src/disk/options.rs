//! What a disk is made of, and how it is to be used.

use std::path::PathBuf;

use config::{CacheType, Drive, IoEngine};

/// What a disk is made of, and how it is to be used.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct DiskOptions {
    /// The file or block device.
    pub path: PathBuf,
    /// Whether the guest cannot write.
    pub read_only: bool,
    /// Whether the guest's flushes wait for the disk.
    pub cache_type: CacheType,
    /// How it is read and written; the best that the kernel has where absent.
    pub engine: Option<IoEngine>,
    /// Where writes go instead.
    pub overlay: Option<config::Overlay>,
    /// Most queues that serve it at a time.
    pub io_threads: u16,
    /// Whether other monitors are kept from it while it is in use.
    pub lock: bool,
    /// Whether the directory entry of a new, empty overlay file is known to be durable. If not, it is made so.
    pub name_is_durable: bool,
}

impl DiskOptions {
    /// What `drive` asks for; a drive that was checked has a path.
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
