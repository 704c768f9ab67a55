//! Transports: how a driver finds a device, sets it up and hears of it.
//!
//! ```text
//!        MmioTransport            PciTransport --- PciRoot (ECAM, 0xcf8, BARs)
//!          registers 4.2             capabilities 4.1, MSI-X
//!               \\                      /
//!                +----- TransportCore -------+      status, features, queues, reset, save: written once
//!                         |
//!                      dyn Device
//! ```
//!
//! # Locks
//!
//! A transport is used under its owner's lock, by vCPU threads, for registers only. The hot path does not come by: kicks
//! go through ioeventfds ([`IoEventFds`]) to the workers, and workers raise interrupts over atomics
//! ([`Interrupt`](crate::device::Interrupt)) and what the machine does in [`IrqLine::trigger`](mmio::IrqLine::trigger) or
//! [`MsiVectors::trigger`](pci::MsiVectors::trigger).
//!
//! # Reset
//!
//! A driver that writes 0 to the status takes the device's tasks off their workers, each once it has drained. Until then the status
//! does not read 0 and all other writes are ignored. On PCI the driver polls for it (4.1.4.3.2). On mmio drivers do not, so the vCPU
//! waits in the write ([`Resetting`]), without the lock and until [`RESET_TIMEOUT`] after the reset began at most; a driver that goes on
//! too early finds its writes ignored and gives up on the device.
//!
//! # What the machine supplies
//!
//! [`IoEventFds`] for kicks, and [`IrqLine`](mmio::IrqLine) or [`MsiVectors`](pci::MsiVectors) for interrupts.

mod core;
mod device_status;
pub mod mmio;
pub mod pci;
mod reset;
#[cfg(test)]
mod tests;

use std::io;
use std::time::Duration;

use memory::GuestRam;

use crate::device::{ActivateError, Device};
use crate::queue::QueueError;
use crate::worker::Workers;
use sync::EventFd;

pub use core::CommonState;
pub use device_status::Status;
pub use reset::Resetting;

/// How long after its beginning a reset is waited for, where drivers do not poll.
pub const RESET_TIMEOUT: Duration = Duration::from_secs(5);

/// What every transport is made from.
pub struct Attachment {
    /// How logs name the device, as in `drive rootfs`.
    pub name: String,
    /// The device.
    pub device: Box<dyn Device>,
    /// The guest's memory.
    pub memory: GuestRam,
    /// Who runs its tasks.
    pub workers: Workers,
}

/// Which writes to an address are a kick.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum NotifyMatch {
    /// Any write, of any length.
    Any,
    /// A 32-bit write of this value.
    U32(u32),
}

/// Turns guest writes into signals without leaving the kernel (KVM's ioeventfd).
pub trait IoEventFds: Send + Sync {
    /// From now on writes at guest-physical `addr` that match signal `event`, and do not reach the transport. Where this fails,
    /// they do, and the transport signals it: slower, not wrong.
    fn register(&self, addr: u64, matching: NotifyMatch, event: &EventFd) -> io::Result<()>;
    /// Undoes [`IoEventFds::register`] with the same arguments.
    fn unregister(&self, addr: u64, matching: NotifyMatch, event: &EventFd);
}

/// Why a saved transport cannot be made again.
#[derive(Debug, thiserror::Error)]
pub enum RestoreError {
    /// The device has other queues than the saved one.
    #[error("{name} has {has} queues, but was saved with {saved}")]
    Queues {
        /// The device.
        name: String,
        /// Queues of the device.
        has: usize,
        /// Queues in the state.
        saved: usize,
    },
    /// The driver negotiated what the device no longer offers.
    #[error("{name} does not offer features {missing:#x} that its driver uses")]
    Features {
        /// The device.
        name: String,
        /// Feature bits.
        missing: u64,
    },
    /// A queue's rings are not what they can be.
    #[error("queue {index} of {name} cannot be: {source}")]
    Queue {
        /// The device.
        name: String,
        /// Which queue.
        index: u16,
        /// Why not.
        source: QueueError,
    },
    /// The device refuses to run.
    #[error("{name} cannot be activated: {source}")]
    Activate {
        /// The device.
        name: String,
        /// Why not.
        source: ActivateError,
    },
    /// The state does not fit the transport.
    #[error("the saved state of {name} is impossible: {what}")]
    Impossible {
        /// The device.
        name: String,
        /// What is wrong.
        what: &'static str,
    },
}
