//! The metadata service (MMDS): a JSON object that the user sets and the guest reads, by HTTP at a
//! link-local address as on EC2.
//!
//! ```text
//!  main thread                            worker of a network device
//!  -----------                            --------------------------
//!  SharedStore::put, patch, get           Stack (one per interface): wants, push, pop, deadline
//!        |                                   |  frames <-> Ethernet, ARP (stack::link)
//!        |                                   |  packets <-> TCP (smoltcp)
//!        |                                   |  bytes <-> requests and responses (http)
//!        v                                   v
//!      Store  <--- its lock --------------  Service (one per microVM): paths, formats, tokens
//! ```
//!
//! - [`SharedStore`] has the contents: one JSON object of bounded size. It exists from the start of
//!   the monitor, with or without a service.
//! - [`Service`] is shared by all interfaces of a microVM: the store, the tokens, the counters.
//! - [`Stack`] is the network stack of one interface. It receives the guest's frames to the service
//!   and returns frames to the guest.
//!
//! This crate has no I/O, no threads and no clock. Frames and the time are inputs, frames and a
//! deadline are outputs. So tests and the fuzzer run the same code as a guest.
//!
//! # Hostile guests
//!
//! A frame may have any content. Frames to other addresses are ignored; malformed ones are counted
//! and dropped. An interface has at most [`MAX_CONNECTIONS`](stack::MAX_CONNECTIONS) connections.
//! Each has buffers of fixed size, at most one request head and at most one response, bounded by
//! the limit of the store. The number of frames that the guest has not received yet is bounded too.
//! A connection without progress is dropped after a minute, or earlier if a new connection needs
//! its slot.
//!
//! # Save and restore
//!
//! A snapshot has [`Service::config`], plain data. It has neither the contents nor the key of the
//! tokens. Connections are reset when the restored guest sends its next segment. To the guest, the
//! service was restarted.

#![forbid(unsafe_code)]

#[cfg(any(test, feature = "testing"))]
pub mod fuzz;
mod http;
mod service;
pub mod stack;
pub mod stats;
pub mod store;
mod text;
pub mod token;

pub use service::{Service, SharedStore};
pub use stack::Stack;
