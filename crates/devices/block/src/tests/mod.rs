//! Tests of disks and of the device; most of them against a model, a vector of bytes.

mod backlog;
mod completions;
mod crash;
mod device;
mod device_model;
mod errors;
mod failed_sync;
mod full;
mod guest;
mod host_crash;
mod killed;
mod limits;
mod model;
pub(crate) mod recorder;
pub(crate) mod rig;
