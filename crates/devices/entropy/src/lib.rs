//! The entropy device (virtio 1.3, section 5.4): random bytes from the host's kernel.
//!
//! ```text
//!  device.rs   the device as its transport sees it     shared.rs   its rate limiter     state.rs stats.rs
//!      |
//!  task.rs     serves the queue
//! ```
//!
//! The device has one queue. A request is a chain of writable buffers and gets at most
//! [`MAX_REQUEST`] bytes.
//!
//! # Bounds
//!
//! A rate limiter bounds the bytes and requests per second, if limits are set. In one call the task
//! writes at most 128 KiB and one request more, and then yields to other tasks of its worker.
//!
//! # Errors
//!
//! The device needs a reset when the driver violates the rules of the queue, or when the host's
//! kernel has no random numbers (no supported kernel does this).

#![forbid(unsafe_code)]

mod device;
#[cfg(any(test, feature = "testing"))]
pub mod fuzz;
mod shared;
mod state;
mod stats;
mod task;
#[cfg(test)]
mod tests;

pub use device::{Entropy, EntropyControl};
pub use state::EntropyState;
pub use stats::EntropyStats;
pub use task::MAX_REQUEST;
