//! The queues of a device that may have several: `num_queues`, `io_threads` and `queue_size`, which
//! drives and network interfaces share.

use crate::checks;
use crate::error::ConfigError;
use crate::limits::{
    MAX_DRIVE_QUEUE_SIZE, MAX_DRIVE_QUEUES, MAX_NET_QUEUE_SIZE, MAX_QUEUE_PAIRS, MIN_DRIVE_QUEUE_SIZE,
    MIN_NET_QUEUE_SIZE,
};

/// Default `num_queues` of a device.
pub(crate) const DEFAULT_NUM_QUEUES: u16 = 1;
/// Default `io_threads` of a device.
pub(crate) const DEFAULT_IO_THREADS: u16 = 1;

/// Number, I/O threads and size of a device's queues.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct QueueConfig {
    /// Number of queues; of queue pairs for a network interface.
    pub num_queues: u16,
    /// Number of I/O threads that share them.
    pub io_threads: u16,
    /// Descriptors per queue.
    pub queue_size: u16,
}

/// What the queues of one kind of device may be. All bounds are included.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct QueueBounds {
    /// Most queues.
    max_queues: u16,
    /// Descriptors of the smallest and the largest queue.
    queue_size: (u16, u16),
}

impl QueueBounds {
    /// Those of a drive.
    pub const DRIVE: QueueBounds = QueueBounds {
        max_queues: MAX_DRIVE_QUEUES,
        queue_size: (MIN_DRIVE_QUEUE_SIZE, MAX_DRIVE_QUEUE_SIZE),
    };
    /// Those of a network interface.
    pub const NETWORK: QueueBounds =
        QueueBounds { max_queues: MAX_QUEUE_PAIRS, queue_size: (MIN_NET_QUEUE_SIZE, MAX_NET_QUEUE_SIZE) };
}

impl QueueConfig {
    /// Checks that the numbers are within `bounds`, that there is a queue for each thread, and that
    /// the size is a power of two.
    pub fn check(&self, bounds: QueueBounds) -> Result<(), ConfigError> {
        checks::in_range("num_queues", self.num_queues.into(), 1, bounds.max_queues.into())?;
        checks::in_range("io_threads", self.io_threads.into(), 1, self.num_queues.into())?;
        checks::queue_size(self.queue_size, bounds.queue_size.0, bounds.queue_size.1)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn each_number_is_checked_by_name() {
        let queues = |num_queues, io_threads, queue_size| {
            let config = QueueConfig { num_queues, io_threads, queue_size };
            config.check(QueueBounds::DRIVE).map_err(|error| error.to_string())
        };
        queues(1, 1, 16).unwrap();
        queues(32, 32, 1024).unwrap();
        for (config, name) in [
            (queues(0, 1, 256), "num_queues"),
            (queues(33, 1, 256), "num_queues"),
            (queues(4, 5, 256), "io_threads"),
            (queues(4, 0, 256), "io_threads"),
            (queues(1, 1, 8), "queue_size"),
            (queues(1, 1, 100), "queue_size"),
        ] {
            let error = config.unwrap_err();
            assert!(error.starts_with(name), "{name}: {error}");
        }
        let small = QueueConfig { num_queues: 1, io_threads: 1, queue_size: 32 };
        small.check(QueueBounds::NETWORK).unwrap_err();
    }
}
