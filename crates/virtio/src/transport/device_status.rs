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

/// Learns of devices that fail. Transports call it from any thread; it must not wait.
pub trait FailureObserver: Send + Sync {
    /// The device `name` needs a reset, because of `why`. Called for the first, second, fourth,
    /// eighth, … time that it does, with `times`: a guest can cause this at will.
    fn device_needs_reset(&self, name: &str, why: &dyn fmt::Display, times: u64);
}

/// Ignores failures.
impl FailureObserver for () {
    fn device_needs_reset(&self, _name: &str, _why: &dyn fmt::Display, _times: u64) {}
}

/// The status register, shared without a lock.
pub(super) struct DeviceStatus {
    name: String,
    failures: Arc<dyn FailureObserver>,
    status: AtomicU8,
    /// A failure of the host was logged.
    complained: AtomicBool,
    /// How often the device needed a reset.
    broken: Counter,
}

impl DeviceStatus {
    pub(super) fn new(name: String, failures: Arc<dyn FailureObserver>) -> Arc<Self> {
        Arc::new(DeviceStatus {
            name,
            failures,
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
            self.failures.device_needs_reset(&self.name, why, times);
        }
        let before = self.status.fetch_or(Status::DEVICE_NEEDS_RESET, Ordering::SeqCst);
        before & Status::DRIVER_OK != 0
    }
}

#[cfg(test)]
mod tests {
    use std::sync::Mutex;

    use super::*;

    #[derive(Default)]
    struct Observer(Mutex<Vec<(String, u64)>>);

    impl FailureObserver for Observer {
        fn device_needs_reset(&self, name: &str, why: &dyn fmt::Display, times: u64) {
            self.0.lock().unwrap().push((format!("{name}: {why}"), times));
        }
    }

    #[test]
    fn observer_learns_of_failures_ever_more_rarely() {
        let observer = Arc::<Observer>::default();
        let status = DeviceStatus::new("drive a".into(), Arc::clone(&observer) as Arc<dyn FailureObserver>);
        assert!(!status.needs_reset(&"broken"), "no driver is there to be notified");
        status.set_status(Status::DRIVER_OK);
        assert!((0..9).all(|_| status.needs_reset(&"broken")));
        let seen = observer.0.lock().unwrap().clone();
        assert_eq!(seen, [1, 2, 4, 8].map(|times| ("drive a: broken".to_owned(), times)));
        assert_eq!(status.broken_count(), 10);
    }
}
