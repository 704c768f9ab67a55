//! The harness that the whole-system tests, the demo and the benchmarks share.
//!
//! - [`vmm`]: the monitor as a process; [`transcript`]: what it says, and when; [`api`]: its HTTP API.
//! - [`guest`]: what a guest is to be, and with which kernel; [`initramfs`]: what it runs; [`modules`]: its kernel's modules.
//! - [`load`]: what the benchmarks' load generator is asked for, and answers; [`net_load`]: the same for networks.
//! - [`snapshots`]: saving guests, and going on with them in other monitors; [`page_server`]: their memory from another process;
//!   [`busy`]: guests that have much to lose.
//! - [`disks`]: guests with disks; [`pattern`]: what they write there; [`host_devices`]: the host's own disks, good and bad.
//! - [`faults`]: threads of the monitor that break.
//! - [`process`]: processes that nobody else waits for; [`said`]: what guests wrote to files.
//! - [`soak`]: how often tests repeat what they do.
//! - [`stalls`]: how far the host's time can be relied on.
//! - [`vsock`]: what programs on both sides of a vsock device say to each other; `guest-vsock` is the one in the guest.
//! - [`host_net`]: networks of the host, and guests on them; [`net_script`]: what they do there; [`traffic`]: what they send; [`exchange`]: bytes to and fro
//!   for as long as a guest is busy; [`passt`]: a network that needs no rights; [`unprivileged`]: programs that have none.
//! - [`elf`]: guests of a few instructions, and broken ones; [`minimal_driver`]: one whose driver accepts no feature.
//!
//! Nothing here sleeps to wait for a thing that can be waited for, and nothing outlives the value that stands for it.
#![deny(unsafe_code)]

pub mod api;
pub mod busy;
pub mod counting;
pub mod disks;
pub mod elf;
pub mod exchange;
pub mod faults;
pub mod guest;
pub mod host_devices;
pub mod host_net;
pub mod initramfs;
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
