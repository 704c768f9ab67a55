//! What the device table needs to know of each kind of device.
//!
//! An adapter has no state. It says how devices of its kind are called, which I/O workers they
//! need, and how the device's own crate builds and restores one.

use std::error::Error;
use std::sync::Arc;

use config::TokenBucket;
use virtio::device::{Device, DeviceData};
use virtio::rate_limiter::{BucketConfig, RateLimiterConfig};
use virtio::worker::{Nanos, WorkerId};

/// Why a device cannot be built. The text names the device.
pub(super) type BuildError = Box<dyn Error + Send + Sync>;

/// A device, and the handle that changes it while it works.
pub(super) type Built<C> = Result<(Box<dyn Device>, C), BuildError>;

/// Connects the crate of one kind of device to the device table ([`super::table`]).
pub(super) trait DeviceAdapter: 'static {
    /// First word of a device's name, as in `drive rootfs`. It is stored, so it never changes.
    const NOUN: &'static str;

    /// What the machine's owner supplies for one device: its configuration and its backend.
    type Setup: 'static;

    /// What a device saves.
    type State: DeviceData + 'static;

    /// Changes a device while it works.
    type Control: 'static;

    /// The device's ID, unique among devices of the kind. `None` for a kind of which a machine has
    /// at most one.
    fn id(setup: &Self::Setup) -> Option<&str>;

    /// Whether the device comes before all others of its kind.
    fn is_first(_setup: &Self::Setup) -> bool {
        false
    }

    /// What is added to the kernel's command line for the device, wherever it is.
    fn kernel_args(_setup: &Self::Setup) -> Option<String> {
        None
    }

    /// The I/O workers that the device needs; `state` is that of a saved device.
    fn io_workers(setup: &Self::Setup, state: Option<&Self::State>) -> Result<IoWorkers, BuildError>;

    /// Builds a device that no driver has seen.
    fn new(setup: Self::Setup, context: BuildContext<'_>) -> Built<Self::Control>;

    /// Builds a device from its saved state, on the backend that it has now.
    fn restore(setup: Self::Setup, state: &Self::State, context: BuildContext<'_>) -> Built<Self::Control>;
}

/// The I/O workers that a device needs.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum IoWorkers {
    /// Workers that all devices share: as many as the device that asks for most. At least 1.
    Shared(u16),
    /// Workers that serve this device alone, so that they may wait for its backend.
    Dedicated(u16),
}

/// What the machine supplies to build a device with.
pub(super) struct BuildContext<'a> {
    /// The time, on the clock of the I/O workers.
    pub(super) now: Nanos,
    /// The device's own workers: as many as it asked for by [`IoWorkers::Dedicated`].
    pub(super) workers: Vec<WorkerId>,
    /// The metadata service, if the machine has one.
    pub(super) metadata: Option<&'a Arc<mmds::Service>>,
    /// Whether writes to guest memory are logged (`track_dirty_pages`).
    pub(super) tracks_dirty_pages: bool,
}

/// Translates a rate limiter from the API's struct to the devices'.
pub fn limits(limiter: Option<&config::RateLimiter>) -> RateLimiterConfig {
    let bucket = |bucket: TokenBucket| BucketConfig {
        size: bucket.size,
        refill_time_ms: bucket.refill_time,
        one_time_burst: bucket.one_time_burst.unwrap_or(0),
    };
    limiter.map_or_else(RateLimiterConfig::default, |limiter| RateLimiterConfig {
        bandwidth: limiter.bandwidth.map(bucket),
        ops: limiter.ops.map(bucket),
    })
}
