//! The network device (virtio 1.3, section 5.1) and its backends.
//!
//! ```text
//!  device.rs         features, activation, state      config_space.rs state.rs stats.rs error.rs
//!      |             shared.rs: what the device shares with its tasks
//!      |             backend_slot.rs: holds a backend between two drivers
//!      |
//!  pair/             task of a queue pair: transmit (guest -> network), receive (network -> guest)
//!  vhost_task.rs     task of a queue pair that the kernel serves
//!  control_queue.rs  task of the control queue
//!      |             rtnl_budget.rs: bounds the ioctls under RTNL
//!      |             shared_limiter.rs: the rate limit of one direction
//!      |
//!  backend/          tap, vhost, stream               header.rs: the header before a frame
//!  interceptor.rs    a service that replies to some frames
//! ```
//!
//! # Backends
//!
//! | backend | frames are moved by              | offloads     | queue pairs | checks (1) |
//! |---------|----------------------------------|--------------|-------------|------------|
//! | tap     | `readv` and `writev`, no copy    | all of a tap | several     | yes        |
//! | vhost   | a thread of the kernel           | all of a tap | several     | no         |
//! | stream  | a Unix socket, one copy each way | none         | one         | yes        |
//!
//! (1) Rate limits, an interceptor, and the check of the source MAC.
//!
//! # Dropped frames
//!
//! The device drops and counts these frames:
//!
//! - malformed frames of the guest;
//! - frames whose source MAC is not the guest's, if the guest has a configured MAC;
//! - frames that do not fit in the guest's receive buffers;
//! - frames that a receive limit would deliver too late;
//! - frames that the guest sends while the network is gone.
//!
//! The device does not check what a header says of offloads. The kernel does, and refuses a frame
//! with an invalid header.
//!
//! # Bounds
//!
//! The task of a queue pair keeps at most one received frame, about 512 KiB of a stream, and 16
//! bytes for each receive buffer popped ahead: about a thousand, or as many as one frame needs. In
//! one call it moves at most 1 MiB in each direction.
//!
//! A device takes the host's RTNL lock at most 128 times at once and 64 times a second after that,
//! whatever its guest does.

#![deny(unsafe_code)]

pub mod backend;
mod backend_slot;
mod config_space;
mod control_queue;
mod device;
mod error;
#[cfg(any(test, feature = "testing"))]
pub mod fuzz;
mod header;
pub mod interceptor;
mod pair;
mod rtnl_budget;
mod shared;
mod shared_limiter;
mod state;
mod stats;
#[cfg(test)]
mod tests;
mod vhost_task;

pub use backend::{NetBackend, OpenError, OpenErrorKind};
pub use device::{Net, NetControl, NetSetup};
pub use error::NetError;
pub use interceptor::FrameInterceptor;
pub use state::{NetConfig, NetState};
pub use stats::NetStats;
