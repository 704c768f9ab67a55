//! The virtio block device (virtio 1.3, section 5.2) and the disks behind it.
//!
//! ```text
//!  device.rs  control.rs  task.rs           the virtio device; config_space.rs state.rs stats.rs
//!     |  request.rs, in_flight.rs           requests of the guest: parsed, and given to the disk
//!     |  shared.rs, backend_slot.rs         what device, control and tasks share; disk swaps
//!     v
//!  disk/      mod.rs, options.rs            opening a disk
//!     |       queue.rs, split.rs            requests -> transfers, in parts where they are large
//!     |       buffer_pool.rs                lists of guest buffers to use again
//!     |       backlog.rs                    bounds what is in flight and dirty; schedules syncs
//!     |       layered.rs, base.rs           which file has a sector; the file at the bottom
//!     |       image.rs                      the contents of a disk, for tools
//!     v
//!  overlay/   active.rs, state.rs           the overlay that takes the writes
//!     |       backing.rs, merge.rs          overlays that are only read; merging them
//!     |       session.rs, commit.rs         written before the first change, and after each change
//!     |       flush.rs                      syncs: the data, then the map
//!     |       file.rs, format.rs, map.rs    the file on disk
//!     |       inspect.rs                    description of an overlay file, for tools
//!     v
//!  engine/    mod.rs, transfer.rs           transfers -> system calls
//!             uring.rs, blocking.rs         through io_uring, or on the worker's own thread
//!             draining_uring.rs             io_uring that submit waits for, for fuzzing
//!
//!  leaves:    io_request.rs  error.rs  creator_pid.rs  slab.rs
//!             host_file/  lock.rs (flock), health.rs (failed syncs), name.rs (durable file names)
//! ```
//!
//! Arrows go down; no two modules use each other.
//!
//! # Backends
//!
//! | backend           | reads                      | writes      | discard                    |
//! |-------------------|----------------------------|-------------|----------------------------|
//! | file              | the file                   | the file    | punches a hole             |
//! | block device      | the device                 | the device  | as the device supports it  |
//! | overlay on either | the overlay or its backing | the overlay | punches a hole, reads as 0 |
//!
//! # Bounds
//!
//! A task has at most 256 requests in flight, each of at most 256 segments and 64 MiB. The bytes in
//! flight, and those that were written and are not durable, are bounded for each disk
//! (`disk/backlog.rs`). Further requests stay in the guest's rings. A large request is split into
//! parts of 1 MiB, a discard into parts of 4 MiB, so no guest keeps a worker to itself.

#![deny(unsafe_code)]

mod backend_slot;
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
mod slab;
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

/// Bytes of a sector: the unit of all offsets and lengths in virtio-blk, whatever the disk's block
/// size.
pub const SECTOR: u64 = 512;
