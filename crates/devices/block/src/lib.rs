//! The block device (virtio 1.3, section 5.2).
//!
//! ```text
//!  device.rs   the front: features, configuration space, activation       request.rs  what a guest asks for, parsed and checked
//!  task.rs     its work: chains in, requests out, used ring; flight.rs    config_space.rs, stats.rs
//!      |       lane.rs: its part of the disk
//!      |
//!  queue.rs    requests -> transfers; parts, fallbacks                    disk.rs     opening a disk; base.rs, lock.rs: its file
//!      |       backlog.rs: what the disk still has to move,             health.rs   whether its contents are known; name.rs
//!      |       and its syncs
//!      |       overlay/ + stack.rs: which file holds a sector; beginning.rs, holding.rs, flush.rs: what an overlay's file says of it
//!  engine.rs   transfers -> system calls: uring.rs, sync.rs, blocking.rs    buffers.rs  stretches of guest memory
//! ```
//!
//! # Back ends
//!
//! | back end              | reads                            | writes                    | discard                     |
//! |-----------------------|----------------------------------|---------------------------|-----------------------------|
//! | file                  | the file                         | the file                  | punches a hole              |
//! | block device          | the device                       | the device                | as the device can           |
//! | overlay on either     | overlay, else what lies beneath  | the overlay, any sector   | punches a hole, reads zeros |
//!
//! # Bounds
//!
//! Up to 256 requests per engine are in flight, each of at most 256 segments and 64 MiB. What they have together, and what was written and
//! is not durable, is bounded for each disk (`backlog.rs`); what a guest makes available beyond that stays in its ring. A large
//! request is worked off in parts of 1 MiB, a discard in parts of 4 MiB, so no guest keeps a worker to itself.

#![deny(unsafe_code)]

mod backend_slot;
pub mod buffers;
mod config_space;
mod control;
mod creator_pid;
mod device;
pub mod disk;
pub mod engine;
mod error;
#[cfg(any(test, feature = "testing"))]
pub mod fuzz;
mod host_file;
mod in_flight;
pub mod io_request;
pub mod overlay;
mod request;
mod shared;
mod state;
mod stats;
mod task;
#[cfg(test)]
mod tests;

pub use backend_slot::{DiskSwap, StillInUse};
pub use control::BlockControl;
pub use device::Block;
pub use error::BlockError;
pub use state::{BlockConfig, BlockState};
pub use stats::BlockStats;
pub use sync::Counter;

/// Bytes of a sector: the unit of everything that a guest asks for, whatever the disk's own block size is.
pub const SECTOR: u64 = 512;
