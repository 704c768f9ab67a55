//! Copy-on-write overlays: writes go to a sparse file over a disk that is never written.
//!
//! # What holds
//!
//! - What lies beneath is only ever read. It may be a plain disk, or a disk with overlays of its own; each overlay knows
//!   what it was made on and refuses anything else.
//! - A sector is the overlay's from the first write, zeroing or discard on; a discarded sector reads as zeros and does
//!   not show what lies beneath. Where the data of a sector stands is arithmetic: no table is walked.
//! - What the guest flushed survives a crash of the host. What was answered, flushed or not, survives the monitor's being killed:
//!   only what was in flight may be as before. What was answered before the session was closed ([`Disk::close`](super::disk::Disk::close))
//!   survives both, where flushes wait for the disk. See [`format`] for how.
//! - One monitor at a time writes to an overlay (an exclusive lock); any number may read one that nobody writes to.
//! - Opening an overlay changes nothing of what it holds, nor how others see it: its session begins with the first change.
//!
//! # A session
//!
//! ```text
//! open --> first change: OPEN, one more session --> ... --> close, freeze or drop: maps written, CLOSED
//!   ^                                                                    |
//!   +------------------------------ thaw --------------------------------+
//! ```
//!
//! # Error model
//!
//! Opening fails with [`OverlayError`], which names the file. Nothing that a file says is believed before it is checked:
//! a truncated file or a header that does not fit it is an error, not a wrong disk. Later errors are those of single
//! requests: a full disk is `ENOSPC` for the write that found it so. After a failed sync the overlay is given up
//! ([`health`](super::health), [`format`]): its maps are not written any more, and it is never closed.

mod active;
mod backing;
pub(crate) mod commit;
mod error;
mod file;
pub(crate) mod flush;
mod format;
pub(crate) mod map;
pub(crate) mod merge;
pub(crate) mod session;
mod state;

pub(crate) use active::{ActiveLayer, ActiveOptions};
pub(crate) use backing::BackingLayer;
pub use error::OverlayError;
pub(crate) use format::BackingId;
pub(crate) use state::ActiveState;
