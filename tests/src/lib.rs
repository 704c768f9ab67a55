//! The harness that the whole-system tests, the demo and the benchmarks share.
//!
//! - [`modules`]: kernel modules, by name and by what they need.
#![forbid(unsafe_code)]

pub mod modules;
