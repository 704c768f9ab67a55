//! The metadata service (MMDS): what a user keeps for a guest as JSON, and what the guest reads of it by HTTP at a
//! link-local address, as it would on EC2.
//!
//! ```text
//!  user's thread                          worker of a network device
//!  -------------                          --------------------------
//!  SharedStore::put, patch, get           Stack (one per interface): wants, accept, next_frame, deadline
//!        |                                   |  frames <-> Ethernet, ARP (stack::link)
//!        |                                   |  packets <-> TCP (smoltcp)
//!        |                                   |  bytes <-> requests and answers (http)
//!        v                                   v
//!      Store  <--- its lock --------------  Service (one per microVM): paths, forms, tokens
//! ```
//!
//! - [`SharedStore`] holds the contents: one JSON object of bounded size. It exists from the start, with or without a service.
//! - [`Service`] is what all interfaces of a microVM share: the store, the tokens, the counts.
//! - [`Stack`] is one interface's network: it gets the frames of the guest that are for the service and gives frames back.
//!
//! There is no I/O here, no thread and no clock: frames and the time come in, frames and a deadline go out. So the code that tests
//! and the fuzzer run is the code that guests meet.
//!
//! # Hostile guests
//!
//! A frame may be anything. What is not for the service is not touched; what is broken is counted and dropped. An interface holds at
//! most [`MAX_CONNECTIONS`](stack::MAX_CONNECTIONS) connections, each with buffers of fixed size, at most one request's head and
//! at most one answer, which is bounded by the store's limit; plus a bounded number of frames that the guest has not fetched.
//! A connection on which nothing moves for a while is dropped, and makes room for a new one earlier.
//!
//! # Save and restore
//!
//! What a snapshot keeps is [`Service::config`], plain data. The contents are not kept, tokens die with their key, and
//! connections are reset when their guest next speaks: to a restored guest, the service was restarted.

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
