//! Saving a microVM to two files, and restoring one from them.
//!
//! The state file has these sections, each described where its type is: `config` ([`SavedConfig`]),
//! `machine` ([`machine::MachineState`]) and `memory` ([`memory::image::ImageInfo`]). The memory
//! file is flat and sparse. Both get their names when both are complete. A Diff into its base gives
//! the state and a redo log their names.
//!
//! # What is left to the user
//!
//! Disks are synced, so that their files hold all that the guest flushed, or for overlays all that
//! it wrote. The state names them. Copying them is left to the user. The log, metrics and the
//! contents of the metadata service are not saved.
//!
//! # Invariants
//!
//! - A snapshot that fails leaves the machine as it was, the old files as they were, and no part of
//!   the new ones. The next Diff has what this one would have had. But a Diff in place whose base
//!   cannot be written after its commit is complete together with its log; the error names that.
//! - A load that fails leaves a process that has no microVM, ready for another try.

mod config;
mod create;
mod load;
mod saved;

pub use self::config::{KIND, SavedConfig};
pub(crate) use create::create;
pub(crate) use load::load;
pub use saved::{Saved, Verified, VerifyError, verify};
