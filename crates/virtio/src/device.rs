//! The [`Device`] trait: a virtio device as its transport sees it.
//!
//! # The life of a device
//!
//! ```text
//!            features(), queue_sizes(), read_config(), write_config()       any time, on vCPU threads
//!  new ---> inactive ---- activate(Activation) ----> active (its tasks run on I/O workers)
//!              ^                                        |
//!              +--- reset() <--- Task::detach() --------+  drained, then taken back from the workers
//! ```
//!
//! - The transport calls [`Device::activate`] when the driver sets `DRIVER_OK` and every enabled
//!   queue lies in RAM.
//! - The device returns its [`Task`]s. The transport adds them to I/O workers.
//! - For a reset the transport removes the tasks from the workers (each drains first) and calls
//!   [`Task::detach`] on each, by which the task returns its backend to the device. Then it calls
//!   [`Device::reset`]. Now the device is as it was before `activate`.
//!
//! # Save and restore
//!
//! [`Device::save`] is called while all tasks are quiesced, or there are none. It does not save the
//! progress of the queues: the transport does. A device is restored by its own constructor, from
//! its state and its backends. The transport then activates it by the same path as for a driver.
//!
//! # Errors
//!
//! A device whose backend is gone, or whose driver broke the rules of a queue, calls
//! [`Interrupt::needs_reset`]. Nothing else in the machine is affected.

mod state;

use std::fmt;
use std::ops::Range;
use std::sync::Arc;

use memory::GuestRam;
use serde::{Deserialize, Serialize};

use crate::queue::Queue;
use crate::worker::Task;
use sync::EventFd;

pub use crate::feature;
pub use crate::interrupt::{Interrupt, TransportStats};
pub use state::{DecodeError, DeviceData, DeviceState};

/// The device id (chapter 5).
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[repr(u32)]
pub enum DeviceKind {
    /// Network device.
    Net = 1,
    /// Block device.
    Block = 2,
    /// Console.
    Console = 3,
    /// Entropy source.
    Entropy = 4,
    /// Memory balloon.
    Balloon = 5,
    /// Socket device (vsock).
    Vsock = 19,
    /// Memory device (hot-plug).
    Mem = 24,
    /// File system device.
    Fs = 26,
    /// Persistent memory device.
    Pmem = 27,
}

/// A field of the configuration space that exists only with a feature.
///
/// Before `FEATURES_OK` a driver reads the fields of all offered features (2.5.1), and afterwards
/// those of the features that it accepted. All others read as 0: some drivers read past the fields
/// that they know, and take the bytes there for a part of them.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ConfigField {
    /// Its bytes in the configuration space.
    pub bytes: Range<u64>,
    /// It exists with any of these feature bits.
    pub feature: u64,
    /// The field is a hint, for which 0 is valid too. It is 0 until the driver accepts the feature.
    pub hint: bool,
}

impl ConfigField {
    /// A field at `bytes` that exists with `feature`.
    pub const fn new(bytes: Range<u64>, feature: u64) -> Self {
        ConfigField { bytes, feature, hint: false }
    }

    /// Sets the field to 0 in `data`, which was read at `offset`.
    pub(crate) fn clear(&self, offset: u64, data: &mut [u8]) {
        let place =
            |at: u64| usize::try_from(at.saturating_sub(offset)).map_or(data.len(), |at| at.min(data.len()));
        let range = place(self.bytes.start)..place(self.bytes.end);
        data[range].fill(0);
    }
}

/// A virtio device: features, configuration space, activation.
///
/// It is called on vCPU threads with the transport's lock held, so no call may wait.
pub trait Device: Send {
    /// The device id.
    fn kind(&self) -> DeviceKind;

    /// The device's own feature bits. The transport adds those of [`feature`].
    fn features(&self) -> u64;

    /// The largest size of each queue, one entry per queue. Each is a power of two, at most
    /// [`MAX_QUEUE_SIZE`](crate::queue::MAX_QUEUE_SIZE). Constant for the life of the device.
    fn queue_sizes(&self) -> &[u16];

    /// Reads the configuration space at `offset`. Any offset and length may come. Bytes outside the
    /// space read as 0 ([`read_bytes`] does this).
    fn read_config(&self, offset: u64, data: &mut [u8]);

    /// The fields of the configuration space that exist only with a feature. The transport hides
    /// them; [`Device::read_config`] returns them in any case.
    fn config_fields(&self) -> &'static [ConfigField] {
        &[]
    }

    /// Writes the configuration space at `offset`. Any offset and length may come. Writes to bytes
    /// that are not writable are ignored.
    fn write_config(&mut self, _offset: u64, _data: &[u8]) {}

    /// The generation of the configuration space (2.5.1). It changes with the space, *under the
    /// same lock*: a driver that reads the same generation before and after a field of several
    /// words has not read a mix of old and new.
    fn config_generation(&self) -> u32 {
        0
    }

    /// Starts the device with the queues that the driver set up. After an error the device is as
    /// before, and the transport sets `DEVICE_NEEDS_RESET`.
    fn activate(&mut self, activation: Activation) -> Result<Vec<Box<dyn Task>>, ActivateError>;

    /// Resets the device to the state before `activate`. Its tasks are detached.
    fn reset(&mut self);

    /// Returns the state for the device's constructor. All tasks are quiesced.
    fn save(&self) -> DeviceState;
}

/// The arguments of [`Device::activate`].
pub struct Activation {
    /// The guest's memory.
    pub memory: GuestRam,
    /// The enabled queues in order of index. A device that needs a missing queue returns
    /// [`ActivateError::QueueMissing`].
    pub queues: Vec<ActiveQueue>,
    /// Raises the device's interrupts.
    pub interrupt: Arc<dyn Interrupt>,
    /// The features that the driver accepted, those of [`feature`] included.
    pub features: u64,
    /// The driver is that of the saved state, and the device keeps what it restored. Otherwise the
    /// driver starts afresh.
    pub restored: bool,
}

/// A queue that the driver enabled.
pub struct ActiveQueue {
    /// The queue.
    pub queue: Queue,
    /// Signalled when the driver kicks the queue.
    pub kick: Arc<EventFd>,
}

impl Activation {
    /// Removes and returns the queue `index`.
    pub fn take_queue(&mut self, index: u16) -> Result<ActiveQueue, ActivateError> {
        let at = self.queues.iter().position(|q| q.queue.index() == index);
        at.map(|at| self.queues.remove(at)).ok_or(ActivateError::QueueMissing(index))
    }
}

/// Why a device cannot be activated.
#[derive(Debug, thiserror::Error)]
pub enum ActivateError {
    /// The driver set `DRIVER_OK` without a queue that the device needs.
    #[error("the driver did not set up queue {0}")]
    QueueMissing(u16),
    /// A system call of the host failed.
    #[error("cannot {doing}: {source}")]
    Host {
        /// What failed, as in "cannot ...".
        doing: &'static str,
        /// The kernel's reason.
        source: std::io::Error,
    },
}

/// Fills `data` from `image` at `offset`. Bytes beyond the image read as 0.
pub fn read_bytes(image: &[u8], offset: u64, data: &mut [u8]) {
    data.fill(0);
    let Ok(offset) = usize::try_from(offset) else { return };
    if let Some(image) = image.get(offset..) {
        let len = image.len().min(data.len());
        data[..len].copy_from_slice(&image[..len]);
    }
}

impl fmt::Debug for Activation {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let queues: Vec<_> = self.queues.iter().map(|q| q.queue.index()).collect();
        f.debug_struct("Activation")
            .field("queues", &queues)
            .field("features", &format_args!("{:#x}", self.features))
            .finish_non_exhaustive()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn config_reads_return_the_image_and_zeros() {
        let image = [1, 2, 3, 4];
        for (offset, want) in
            [(0, [1, 2, 3]), (2, [3, 4, 0]), (4, [0, 0, 0]), (u64::MAX, [0, 0, 0]), (u64::MAX - 1, [0, 0, 0])]
        {
            let mut data = [0xaa; 3];
            read_bytes(&image, offset, &mut data);
            assert_eq!(data, want, "offset {offset}");
        }
    }
}
