//! How a block device is configured, and what it saves.

use config::{Drive, check_drive_queues};
use serde::{Deserialize, Serialize};
use virtio::device::DeviceData;
use virtio::rate_limiter::RateLimiterState;

use crate::error::BlockError;

/// How a block device is cut. Constant for its life.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct BlockConfig {
    /// Its name, of which the guest reads the first 20 bytes as the serial number.
    pub id: String,
    /// Number of queues, 1 or more.
    pub num_queues: u16,
    /// Descriptors per queue: a power of two.
    pub queue_size: u16,
    /// Number of tasks that the queues are dealt out to, 1 to `num_queues`.
    pub io_threads: u16,
}

impl BlockConfig {
    /// What `drive`, which was checked, asks for.
    pub fn of(drive: &Drive) -> Self {
        BlockConfig {
            id: drive.drive_id.clone(),
            num_queues: drive.num_queues(),
            queue_size: drive.queue_size(),
            io_threads: drive.io_threads(),
        }
    }

    /// Checks one that comes from a file: it is within the bounds of a drive's.
    pub fn check(&self) -> Result<(), BlockError> {
        check_drive_queues(self.num_queues, self.io_threads, self.queue_size)
            .map_err(|source| BlockError::State { id: self.id.clone(), source })
    }
}

/// What a block device saves.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct BlockState {
    /// How it is cut.
    pub config: BlockConfig,
    /// Sectors that the guest knows the disk to have.
    pub capacity: u64,
    /// Whether the guest cannot write.
    pub read_only: bool,
    /// Whether the guest can flush.
    pub flush: bool,
    /// How often the configuration space changed.
    pub generation: u32,
    /// How far its limits are used up.
    pub limiter: RateLimiterState,
}

impl DeviceData for BlockState {
    const NAME: &'static str = "Block";
}
