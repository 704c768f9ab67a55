//! The life of a machine: built or restored, paused, running, saved.
//!
//! ```text
//!  Setup --Paused::build----\           resume
//!                            Paused -----------------> Running
//!  Restore --Paused::restore-/  |  <------------------    |
//!                               |          pause          |
//!                             save                      drop
//!                               v                         v
//!                          MachineState           vCPU threads end
//! ```
//!
//! [`Paused`] and [`Running`] own the same [`Machine`]. A step from one to the other consumes the
//! one and returns the other. Only [`Paused`] can be saved. Both dereference to [`Machine`] for
//! what is possible in either state.
//!
//! | module | what it is about |
//! |---|---|
//! | `lifecycle` | [`Paused`] and [`Running`] |
//! | `build` | from [`Setup`] or [`Restore`] to a machine |
//! | `assemble` | the steps that both have in common, in KVM's order |
//! | `instance` | [`Machine`]: its parts, and the order in which they are dropped |
//! | `setup`, `error` | what goes in, and what can go wrong |
//!
//! # Errors
//!
//! [`StartError`] names what could not be built; no thread, descriptor or memory of the machine is
//! left, but for vCPU threads that wait for guest memory (`assemble`). [`PauseError::Busy`] returns
//! the machine, which runs. [`VcpuThreadDied`](crate::vcpu::VcpuThreadDied) is a bug in this
//! monitor.

mod assemble;
mod build;
mod error;
mod instance;
mod lifecycle;
mod setup;

pub use error::{SaveError, StartError};
pub use instance::Machine;
pub use lifecycle::{DRAIN_TIMEOUT, PauseError, Paused, Running, VCPU_TIMEOUT};
pub use setup::{Restore, Setup};
