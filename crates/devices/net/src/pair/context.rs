//! What both directions of a queue pair use, and the bounds on one call of the task.

use std::io;
use std::sync::Arc;

use memory::GuestRam;

use crate::shared::Shared;
use virtio::device::Interrupt;
use virtio::queue::{Queue, QueueError};

/// Bytes in one direction after which the task yields to the other direction and to other tasks.
pub(super) const BYTES_PER_CALL: usize = 1 << 20;
/// Least number of bytes that a frame counts for [`BYTES_PER_CALL`].
pub(super) const MIN_FRAME_COST: usize = 4 << 10;
/// Most frames between two publications of the used ring.
pub(super) const FRAMES_PER_PUBLISH: u32 = 16;

/// What both directions of a queue pair use.
pub(super) struct PairContext {
    pub(super) shared: Arc<Shared>,
    pub(super) memory: GuestRam,
    pub(super) interrupt: Arc<dyn Interrupt>,
}

impl PairContext {
    /// Publishes the used buffers of `queue`, and interrupts the driver if it asked for that.
    pub(super) fn publish(&self, queue: &mut Queue) -> Result<(), QueueError> {
        if queue.publish()? {
            self.interrupt.queue(queue.index());
        }
        Ok(())
    }
}

/// Whether a direction has more to do.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Progress {
    /// Nothing more, until an event, a kick or a timer.
    Waiting,
    /// More, in the next call: it has reached [`BYTES_PER_CALL`].
    MoreWork,
}

/// Why a queue pair cannot work until the driver resets the device.
#[derive(Debug, thiserror::Error)]
pub(super) enum PairError {
    #[error(transparent)]
    Queue(#[from] QueueError),
    #[error("cannot watch the descriptor of its network: {0}")]
    Watch(io::Error),
}
