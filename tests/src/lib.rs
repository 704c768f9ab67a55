//! The harness that the whole-system tests, the demo and the benchmarks share.
//!
//! - [`vmm`]: the monitor as a process; [`transcript`]: what it says, and when; [`api`]: its HTTP API.
//! - [`guest`]: what a guest is to be, and with which kernel; [`initramfs`]: what it runs; [`modules`]: its kernel's modules.
//! - [`snapshots`]: saving guests, and going on with them in other monitors.
//! - [`disks`]: guests with disks; [`pattern`]: what they write there; [`host_devices`]: the host's own disks, good and bad.
//! - [`elf`]: guests of a few instructions, and broken ones.
//!
//! Nothing here sleeps to wait for a thing that can be waited for, and nothing outlives the value that stands for it.
#![deny(unsafe_code)]

pub mod api;
pub mod counting;
pub mod disks;
pub mod elf;
pub mod guest;
pub mod host_devices;
pub mod initramfs;
pub mod modules;
pub mod pattern;
pub mod process;
pub mod snapshots;
pub mod transcript;
pub mod vmm;
