//! What a virtio device is to a transport.
//!
//! # The life of a device
//!
//! ```text
//!            features(), queue_sizes(), read_config(), write_config()       any time, on vCPU threads
//!  new ---> inactive ---- activate(Activation) ----> active (its tasks run on io workers)
//!              ^                                        |
//!              +--- reset() <--- Task::detach() --------+  drained, then taken back from the workers
//! ```
//!
//! - The transport calls [`Device::activate`] when the driver sets `DRIVER_OK` and every queue that it enabled lies in RAM.
//! - The device answers with its [`Task`]s; the transport hands them to io workers.
//! - For a reset the transport takes the tasks back (each drains what is in flight first), calls [`Task::detach`] on each,
//!   by which a task puts its back end where its device finds it again, and then [`Device::reset`].
//!   Afterwards the device is as it was before `activate`.
//!
//! # Save and restore
//!
//! [`Device::save`] is called while all tasks are quiesced or there are none. The queues' positions are not the device's to
//! save: the transport reads them from the queues. A device is restored by its own constructor (state and back ends in,
//! device out); the transport then activates it through the same path as a driver would.
//!
//! # Errors
//!
//! A device that cannot go on (its back end is gone, its driver broke the rules of a queue) calls
//! [`Interrupt::needs_reset`]. Nothing else of the machine is affected.

mod state;

use std::fmt;
use std::ops::Range;
use std::sync::Arc;

use memory::GuestRam;
use serde::{Deserialize, Serialize};

use crate::queue::Queue;
use crate::worker::Task;
use sync::EventFd;

pub use state::{DecodeError, DeviceData, DeviceState};

/// The kinds of devices, by their number in chapter 5 of the specification.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[repr(u32)]
pub enum DeviceKind {
    /// Network card.
    Net = 1,
    /// Disk.
    Block = 2,
    /// Console.
    Console = 3,
    /// Source of entropy.
    Entropy = 4,
    /// Memory balloon.
    Balloon = 5,
    /// Socket device.
    Vsock = 19,
    /// Hot-pluggable memory.
    Mem = 24,
    /// Shared file system.
    Fs = 26,
    /// Persistent memory.
    Pmem = 27,
}

/// Feature bits that belong to the ring and the transport (chapter 6), not to a device.
pub mod feature {
    /// Chains may continue in a table of their own.
    pub const RING_INDIRECT_DESC: u64 = 1 << 28;
    /// Both sides say at which index they want to be notified.
    pub const RING_EVENT_IDX: u64 = 1 << 29;
    /// The device conforms to version 1 of the specification. Always offered; it does so for a
    /// driver that does not accept it too.
    pub const VERSION_1: u64 = 1 << 32;
}

/// A field of a device's configuration space that exists only with a feature.
///
/// Before `FEATURES_OK` a driver reads the fields of all features that are offered (2.5.1),
/// afterwards those of the features that it accepted; all others read as 0. Drivers read past
/// fields that they know, and take what they find there for a part of them.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ConfigField {
    /// Its bytes in the configuration space.
    pub bytes: Range<u64>,
    /// The feature bits, one of which it exists with.
    pub feature: u64,
    /// It only hints at what is quick, so that 0 is a valid value: it is 0 until the driver has
    /// accepted the feature.
    pub hint: bool,
}

impl ConfigField {
    /// The field `bytes`, which exists with `feature`.
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

/// The front of a device: what its driver can see and negotiate.
///
/// Calls come from vCPU threads with the transport's lock held, so none of them may wait for anything.
pub trait Device: Send {
    /// Which kind of device it is.
    fn kind(&self) -> DeviceKind;

    /// The device's own feature bits. The transport adds those of [`feature`].
    fn features(&self) -> u64;

    /// The largest size of each queue; how many there are is how many queues the device has. Each is a power of two,
    /// at most [`MAX_QUEUE_SIZE`](crate::queue::MAX_QUEUE_SIZE). Constant for the life of the device.
    fn queue_sizes(&self) -> &[u16];

    /// Fills `data` from the configuration space at `offset`. Any offset and length may come; bytes that do not exist
    /// read as 0. ([`read_bytes`] does this from a byte image.)
    fn read_config(&self, offset: u64, data: &mut [u8]);

    /// The fields of the configuration space that exist only with a feature.
    /// [`Device::read_config`] gives them in any case.
    fn config_fields(&self) -> &'static [ConfigField] {
        &[]
    }

    /// Writes the configuration space. Any offset and length may come; what is not writable is ignored.
    fn write_config(&mut self, _offset: u64, _data: &[u8]) {}

    /// Changes whenever the configuration space changes, *under the same lock* as it: a driver that reads the same
    /// generation before and after a field of several words has not read a mix of old and new (2.5.1).
    fn config_generation(&self) -> u32 {
        0
    }

    /// Starts the device: the driver accepted it and set up its queues. On an error the device is as before and the
    /// transport sets `DEVICE_NEEDS_RESET`.
    fn activate(&mut self, activation: Activation) -> Result<Vec<Box<dyn Task>>, ActivateError>;

    /// Back to before `activate`. Its tasks, if any, have been detached.
    fn reset(&mut self);

    /// The device's state, for its constructor. All tasks are quiesced.
    fn save(&self) -> DeviceState;
}

/// What a device gets when its driver sets `DRIVER_OK`.
pub struct Activation {
    /// The guest's memory.
    pub memory: GuestRam,
    /// The queues that the driver enabled, in order of index. A device that needs a queue which is not here answers
    /// [`ActivateError::QueueMissing`].
    pub queues: Vec<ActiveQueue>,
    /// Raises the device's interrupts.
    pub interrupt: Arc<dyn Interrupt>,
    /// The features that the driver accepted, [`feature`]s included.
    pub features: u64,
    /// A saved driver goes on, and what the device has restored is its. Else a driver begins anew.
    pub restored: bool,
}

/// A queue that the driver enabled.
pub struct ActiveQueue {
    /// Its rings. [`Queue::index`] says which queue it is.
    pub queue: Queue,
    /// Signalled when the driver kicks the queue.
    pub kick: Arc<EventFd>,
}

impl Activation {
    /// Takes the queue `index` out, or says that it is missing.
    pub fn take_queue(&mut self, index: u16) -> Result<ActiveQueue, ActivateError> {
        let at = self.queues.iter().position(|q| q.queue.index() == index);
        at.map(|at| self.queues.remove(at)).ok_or(ActivateError::QueueMissing(index))
    }
}

/// Why a device could not be activated.
#[derive(Debug, thiserror::Error)]
pub enum ActivateError {
    /// The driver set `DRIVER_OK` without a queue that the device needs.
    #[error("the driver did not set up queue {0}")]
    QueueMissing(u16),
    /// The host refused something.
    #[error("cannot {doing}: {source}")]
    Host {
        /// What was tried, as in "cannot ...".
        doing: &'static str,
        /// The kernel's reason.
        source: std::io::Error,
    },
}

/// How a device speaks to its driver without a request. Implemented by the transports. Waits for nobody: it takes no lock but such as
/// are held for a few instructions, and never a transport's.
pub trait Interrupt: Send + Sync {
    /// Queue `index` has used buffers.
    fn queue(&self, index: u16);
    /// The configuration space has changed.
    fn config(&self);
    /// The device is broken until it is reset: sets `DEVICE_NEEDS_RESET` and tells the driver (2.1.2). All are
    /// counted; `why` is logged, ever more rarely if it happens over and over.
    fn needs_reset(&self, why: &dyn fmt::Display);
}

/// Fills `data` from `image` at `offset`; what lies beyond the image reads as 0.
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
    fn config_reads_of_any_size_at_any_offset_give_the_image_and_zeros() {
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
