//! The [`Interrupt`] trait, by which a device notifies its driver.

use std::fmt;

use sync::Counter;

/// Counters of one device's transport; they only grow.
#[derive(Debug, Default)]
pub struct TransportStats {
    /// Interrupts that the device raised.
    pub interrupts: Counter,
    /// MSI-X vectors that the driver gave another message.
    pub vector_updates: Counter,
    /// Times that the device needed a reset.
    pub device_errors: Counter,
}

/// A device's notifications to its driver. The transports implement it.
///
/// The calls do not wait. They take no lock of a transport, and only locks that are held for a few
/// instructions.
pub trait Interrupt: Send + Sync {
    /// Queue `index` has used buffers (2.3).
    fn queue(&self, index: u16);
    /// The configuration space has changed (2.3).
    fn config(&self);
    /// Sets `DEVICE_NEEDS_RESET` and notifies the driver (2.1.2). Each call is counted. `why` is
    /// logged for the first, second, fourth, eighth, … call.
    fn needs_reset(&self, why: &dyn fmt::Display);
}
