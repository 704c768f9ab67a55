//! Copy-on-write overlays: writes go to a sparse file, and the disk below is never written.
//!
//! # Guarantees
//!
//! - The disk below is only read. It may have overlays of its own. Each overlay identifies the disk
//!   that it was created on, and is refused on any other.
//! - The first write, write-zeroes or discard of a sector allocates it in the overlay. A discarded
//!   sector reads as zeros and does not show the disk below. Data is at a fixed offset; there is no
//!   lookup table.
//! - What the guest flushed survives a crash of the host. What was completed, flushed or not,
//!   survives a kill of the monitor. What was completed before
//!   [`Disk::close`](crate::disk::Disk::close) survives both, if flushes wait for the disk. See
//!   [`format`].
//! - One monitor writes to an overlay (an exclusive lock), or any number read it.
//! - Opening an overlay does not change its contents, nor how overlays created on it see it. Its
//!   session begins with the first change.
//!
//! # Sessions
//!
//! ```text
//! open --> first change: OPEN, sessions + 1 --> ... --> close, freeze, drop: maps written, CLOSED
//!   ^                                                                    |
//!   +------------------------------ thaw --------------------------------+
//! ```
//!
//! # Error model
//!
//! Opening fails with [`OverlayError`], which names the file. Nothing that a file says is used
//! before it is checked: a truncated file or a damaged header is an error, never a wrong disk.
//! Later errors are those of single requests: the write that finds the host's disk full fails with
//! `ENOSPC`. After a failed sync the maps are not written any more and the overlay is never closed
//! ([`health`](crate::host_file::health), [`format`]).

mod active;
mod backing;
pub(crate) mod commit;
mod error;
mod file;
pub(crate) mod flush;
mod format;
pub mod inspect;
pub(crate) mod map;
pub(crate) mod merge;
pub(crate) mod session;
mod state;

pub(crate) use active::{ActiveLayer, ActiveOptions};
pub(crate) use backing::BackingLayer;
pub use error::OverlayError;
pub(crate) use format::BackingId;
pub(crate) use state::ActiveState;
