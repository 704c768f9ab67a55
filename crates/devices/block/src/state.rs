//! Configuration and saved state of a block device.

use config::{Drive, QueueBounds, QueueConfig};
use serde::{Deserialize, Serialize};
use virtio::device::DeviceData;
use virtio::rate_limiter::RateLimiterState;

use crate::error::BlockError;

/// The fixed properties of a block device.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct BlockConfig {
    /// Drive id. The guest reads its first 20 bytes as the serial number.
    pub id: String,
    /// Number of queues, 1 or more.
    pub num_queues: u16,
    /// Descriptors per queue: a power of two.
    pub queue_size: u16,
    /// Number of tasks that the queues are dealt to, 1 to `num_queues`.
    pub io_threads: u16,
}

impl BlockConfig {
    /// The configuration of `drive`, which was checked.
    pub fn of(drive: &Drive) -> Self {
        BlockConfig {
            id: drive.drive_id.clone(),
            num_queues: drive.num_queues(),
            queue_size: drive.queue_size(),
            io_threads: drive.io_threads(),
        }
    }

    /// Checks a configuration that was read from a file against the bounds of a drive.
    pub fn check(&self) -> Result<(), BlockError> {
        let BlockConfig { num_queues, io_threads, queue_size, .. } = *self;
        QueueConfig { num_queues, io_threads, queue_size }
            .check(QueueBounds::DRIVE)
            .map_err(|source| BlockError::State { id: self.id.clone(), source })
    }
}

/// Saved state of a block device.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct BlockState {
    /// Its configuration.
    pub config: BlockConfig,
    /// Capacity that the guest knows, in sectors.
    pub capacity: u64,
    /// Whether the disk is read-only.
    pub read_only: bool,
    /// Whether the guest is offered `VIRTIO_BLK_F_FLUSH`.
    pub flush: bool,
    /// Generation of the configuration space.
    pub generation: u32,
    /// State of the rate limiter.
    pub limiter: RateLimiterState,
}

impl DeviceData for BlockState {
    const NAME: &'static str = "Block";
}
