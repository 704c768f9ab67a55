//! Overlays that a fork or a live snapshot adds to the drives of a microVM.
//!
//! What the guest wrote so far becomes a base that nothing writes to any more. The microVM, and
//! each child or later load, writes to a new overlay of its own on that base.
//!
//! - [`plan`]: which drive gets which overlay.
//! - [`files`]: the empty files of new overlays.
//! - [`merging`]: many layers of a drive are merged into one, while the guest runs.

pub(crate) mod files;
pub(crate) mod merging;
pub(crate) mod plan;
