//! The network device (virtio 1.3, section 5.1).
//!
//! ```text
//!  device.rs   the front: features, configuration space, activation     config_space, header, stats, limits, late
//!      |       port.rs: where a back end waits between two drivers
//!      |
//!  task.rs     one pair of queues: rx.rs (network -> guest), tx.rs (guest -> network), interceptor.rs (what answers in its place)
//!  ctrl.rs     the control queue     call_budget.rs  how often it makes the kernel take RTNL
//!  vhost_task.rs   one pair of queues that the kernel serves
//!      |
//!  backend.rs  which network: tap.rs, links.rs, stream.rs, vhost.rs     segments.rs  stretches of guest memory
//! ```
//!
//! # Back ends
//!
//! | back end | frames move by                                   | offloads            | queues   | limits, interceptor, address check |
//! |----------|--------------------------------------------------|---------------------|----------|-------------------------------|
//! | tap      | `readv` and `writev` on guest memory, no copies  | all that it has     | several  | yes                           |
//! | vhost    | a thread of the kernel's                         | all that it has     | several  | no                            |
//! | stream   | a Unix socket, one copy each way                 | none                | one pair | yes                           |
//!
//! # What is dropped
//!
//! A network may drop frames, and this one does, each time counted: frames that are none, frames
//! from another address than the guest's where that is set, frames larger than the buffers that the
//! guest has for them, frames that a receive limit would deliver too late ([`late`]), and whatever
//! is sent while the network is gone. What the headers say of offloads is for the kernel to check,
//! which drops what lies.
//!
//! # Bounds
//!
//! A pair keeps at most one frame of its own, 512 KiB of a stream's, and 16 bytes for each of the guest's receive buffers that it has taken ahead: a
//! thousand or so, or as many as one frame needs. In one call it moves at most 1 MiB each way.
//!
//! A device takes the host's RTNL lock 128 times at once and 64 times a second after that, whatever
//! its guest does.

#![deny(unsafe_code)]

mod backend;
mod call_budget;
mod config_space;
mod ctrl;
mod device;
#[cfg(any(test, feature = "testing"))]
pub mod fuzz;
mod header;
pub mod interceptor;
mod late;
mod limits;
mod links;
mod port;
mod rx;
mod segments;
mod stats;
pub mod stream;
pub mod tap;
mod task;
#[cfg(test)]
mod tests;
mod tx;
pub mod vhost;
mod vhost_task;

pub use backend::{NetBackend, OpenError, OpenErrorKind};
pub use device::{Net, NetConfig, NetControl, NetError, NetSetup, NetState};
pub use interceptor::FrameInterceptor;
pub use stats::NetStats;
