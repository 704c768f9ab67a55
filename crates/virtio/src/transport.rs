//! Transports: the registers by which a driver finds and sets up a device, and its interrupts.
//!
//! ```text
//!        MmioTransport            PciTransport --- PciRoot (ECAM, 0xcf8, BARs)
//!          registers 4.2             capabilities 4.1, MSI-X
//!               \\                      /
//!                +--- TransportCore ----+      status, features, queues, reset, save
//!                         |
//!                      dyn Device
//! ```
//!
//! # Locks
//!
//! vCPU threads use a transport for register accesses, under its owner's lock. Kicks and interrupts
//! do not take that lock: kicks go through ioeventfds ([`IoEventFds`]) to the workers, and workers
//! raise interrupts through atomics ([`Interrupt`](crate::device::Interrupt)) and the machine's
//! [`IrqLine::trigger`](mmio::IrqLine::trigger) or
//! [`MsiVectors::trigger`](pci::MsiVectors::trigger).
//!
//! # Reset
//!
//! When the driver writes 0 to the status, the device's tasks are removed from their workers, each
//! when it has drained. Until then the status does not read 0, and all other writes are ignored. On
//! PCI the driver polls the status (4.1.4.3.2). On mmio drivers do not poll, so the vCPU waits in
//! the write ([`Resetting`]), without the lock and at most until [`RESET_TIMEOUT`] after the reset
//! began. A driver that continues before the reset is complete finds its writes ignored.
//!
//! # What the machine provides
//!
//! [`IoEventFds`] for kicks, and [`IrqLine`](mmio::IrqLine) or [`MsiVectors`](pci::MsiVectors) for
//! interrupts.

mod core;
mod device_status;
pub mod mmio;
pub mod pci;
mod reset;
#[cfg(test)]
mod tests;

use std::io;
use std::sync::Arc;
use std::time::Duration;

use memory::GuestRam;

use crate::device::{ActivateError, Device};
use crate::queue::QueueError;
use crate::worker::Workers;
use sync::EventFd;

pub use core::CommonState;
pub use device_status::{FailureObserver, Status};
pub use reset::Resetting;

/// The longest wait for a reset on transports whose drivers do not poll.
pub const RESET_TIMEOUT: Duration = Duration::from_secs(5);

/// The arguments of a transport's constructor.
pub struct Attachment {
    /// The name of the device in logs and errors, as in `drive rootfs`.
    pub name: String,
    /// The device.
    pub device: Box<dyn Device>,
    /// The guest's memory.
    pub memory: GuestRam,
    /// The workers that run its tasks.
    pub workers: Workers,
    /// Learns when it fails.
    pub failures: Arc<dyn FailureObserver>,
}

/// The writes to an address that are kicks.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum NotifyMatch {
    /// Any write, of any length.
    Any,
    /// A 32-bit write of this value.
    U32(u32),
}

/// KVM's ioeventfds: guest writes that signal an eventfd inside the kernel.
pub trait IoEventFds: Send + Sync {
    /// Registers `event`: matching writes at guest-physical `addr` signal it and do not reach the
    /// transport. If this fails, they do reach it, and the transport signals `event` itself.
    fn register(&self, addr: u64, matching: NotifyMatch, event: &EventFd) -> io::Result<()>;
    /// Undoes [`IoEventFds::register`] with the same arguments.
    fn unregister(&self, addr: u64, matching: NotifyMatch, event: &EventFd);
}

/// Why a saved transport cannot be restored.
#[derive(Debug, thiserror::Error)]
pub enum RestoreError {
    /// The number of queues differs.
    #[error("{name}: the number of queues is {has}; it was saved with {saved}")]
    Queues {
        /// The device.
        name: String,
        /// Queues of the device.
        has: usize,
        /// Queues in the state.
        saved: usize,
    },
    /// The device does not offer features that the driver uses.
    #[error("{name}: the driver uses features that the device does not offer: {missing:#x}")]
    Features {
        /// The device.
        name: String,
        /// Feature bits.
        missing: u64,
    },
    /// A queue is invalid.
    #[error("{name}: queue {index} is invalid: {source}")]
    Queue {
        /// The device.
        name: String,
        /// The queue's index.
        index: u16,
        /// Why not.
        source: QueueError,
    },
    /// The device cannot be activated.
    #[error("{name}: cannot be activated: {source}")]
    Activate {
        /// The device.
        name: String,
        /// Why not.
        source: ActivateError,
    },
    /// The state does not fit the transport.
    #[error("{name}: the saved state is invalid: {what}")]
    Impossible {
        /// The device.
        name: String,
        /// What is wrong.
        what: &'static str,
    },
}
