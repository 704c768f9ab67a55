//! What threads share, once for every crate: [`locked`], [`Counter`], [`EventFd`], and
//! the start of their [`thread`]s.
//!
//! Each is a leaf: none of them logs, allocates after its construction or waits for anything but a
//! mutex.

#![forbid(unsafe_code)]

mod counter;
mod eventfd;
mod lock;
pub mod thread;

pub use counter::Counter;
pub use eventfd::EventFd;
pub use lock::locked;
