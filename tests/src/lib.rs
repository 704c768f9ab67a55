//! The harness that the whole-system tests, the demo and the benchmarks share.
//!
//! - Monitors: [`vmm`] runs one as a process, [`transcript`] records its output with times, [`api`]
//!   is a client of its HTTP API, [`events`] of its events, [`faults`] breaks its threads.
//! - The API: [`conformance`] generates requests from the description of Firecracker's.
//! - Guests: [`guest`] is a guest's configuration and kernel, [`initramfs`] its first programs,
//!   [`modules`] its kernel modules, [`serial_file`] its output in files. [`elf`] has guests of a
//!   few instructions: [`counting`] ones that count, [`minimal_driver`] one whose driver accepts no
//!   feature.
//! - Disks: [`disks`] has guests with disks, [`pattern`] the data on them, [`host_devices`] block
//!   devices of the host that fail or are slow.
//! - Networks: [`host_net`] has networks of the host and guests on them, [`net_script`] what those
//!   guests run, [`traffic`] and [`exchange`] checked data, [`passt`] a network without privileges.
//! - vsock: [`vsock`] is the protocol between programs of the host and `guest-vsock`.
//! - Snapshots: [`snapshots`] saves and restores guests, [`page_server`] serves their memory,
//!   [`busy`] has guests that use all devices and check them.
//! - Debuggers: [`gdb`] drives Debian's gdb, and speaks its protocol.
//! - Benchmarks: [`load`] describes load on disks, [`net_load`] on networks.
//! - Processes: [`line`] prints from several of them, [`process`] ends children and orphans,
//!   [`unprivileged`] runs programs without privileges, [`stalls`] measures pauses of the host,
//!   [`soak`] scales repetitions.
//!
//! Nothing here sleeps where it can wait for an event, and no process, device or file outlives the
//! value that owns it.
#![deny(unsafe_code)]

pub mod api;
pub mod busy;
pub mod conformance;
pub mod counting;
pub mod cpu;
pub mod disks;
pub mod elf;
pub mod events;
pub mod exchange;
pub mod faults;
pub mod gdb;
pub mod guest;
pub mod host_devices;
pub mod host_net;
pub mod initramfs;
pub mod line;
pub mod load;
pub mod minimal_driver;
pub mod modules;
pub mod net_load;
pub mod net_script;
pub mod page_server;
pub mod passt;
pub mod pattern;
pub mod process;
pub mod serial_file;
pub mod snapshots;
pub mod soak;
pub mod stalls;
pub mod traffic;
pub mod transcript;
pub mod unprivileged;
pub mod vmm;
pub mod vsock;
