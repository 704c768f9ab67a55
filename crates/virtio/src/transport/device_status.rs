//! The device status (2.1), which the transport and the workers share, with its log and counter.

use std::fmt;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU8, Ordering};

use sync::Counter;

/// Bits of the device status (2.1).
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Status;

impl Status {
    /// The guest found the device.
    pub const ACKNOWLEDGE: u8 = 1;
    /// The guest has a driver for it.
    pub const DRIVER: u8 = 2;
    /// The driver is ready.
    pub const DRIVER_OK: u8 = 4;
    /// Feature negotiation is complete.
    pub const FEATURES_OK: u8 = 8;
    /// The device has failed until it is reset.
    pub const DEVICE_NEEDS_RESET: u8 = 64;
    /// The driver gave up.
    pub const FAILED: u8 = 128;
}

/// The status register, shared without a lock.
#[derive(Debug)]
pub(super) struct DeviceStatus {
    name: String,
    status: AtomicU8,
    /// A failure of the host was logged.
    complained: AtomicBool,
    /// How often the device needed a reset.
    broken: Counter,
}

impl DeviceStatus {
    pub(super) fn new(name: String) -> Arc<Self> {
        Arc::new(DeviceStatus {
            name,
            status: AtomicU8::new(0),
            complained: AtomicBool::new(false),
            broken: Counter::default(),
        })
    }

    pub(super) fn name(&self) -> &str {
        &self.name
    }

    /// How often the device needed a reset.
    pub(super) fn broken_count(&self) -> u64 {
        self.broken.get()
    }

    /// The status register.
    pub(super) fn status(&self) -> u8 {
        self.status.load(Ordering::SeqCst)
    }

    /// Sets bits of the status register.
    pub(super) fn add_status(&self, bits: u8) {
        self.status.fetch_or(bits, Ordering::SeqCst);
    }

    /// Writes the status register.
    pub(super) fn set_status(&self, status: u8) {
        self.status.store(status, Ordering::SeqCst);
    }

    /// Logs a failure of the host that makes the device slower. Only the first: a guest can cause
    /// it at will.
    pub(super) fn complain(&self, what: &dyn fmt::Display) {
        if !self.complained.swap(true, Ordering::Relaxed) {
            log::warn!("{}: {what}", self.name);
        }
    }

    /// Sets `DEVICE_NEEDS_RESET`. Returns whether the driver must be notified.
    pub(super) fn needs_reset(&self, why: &dyn fmt::Display) -> bool {
        // A guest can cause this at will, and must not fill the log.
        if let Some(times) = self.broken.rarely() {
            log::warn!("{}: {why}; the device needs a reset (time {times})", self.name);
        }
        let before = self.status.fetch_or(Status::DEVICE_NEEDS_RESET, Ordering::SeqCst);
        before & Status::DRIVER_OK != 0
    }
}
