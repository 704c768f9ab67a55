//! What threads share, once for every crate: [`locked`], [`Counter`], [`Latency`] and [`EventFd`];
//! and how every [`thread`] is started.
//!
//! This crate is a leaf. Nothing in it logs or waits for anything but a mutex. A counter and an
//! eventfd allocate nothing after their construction.

#![forbid(unsafe_code)]

mod counter;
mod eventfd;
mod latency;
mod lock;
pub mod thread;

pub use counter::Counter;
pub use eventfd::EventFd;
pub use latency::{Latency, LatencyTotals};
pub use lock::locked;
