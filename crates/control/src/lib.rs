//! What a microVM is told, by whom and when: the one list of commands, the phases in which each is possible, and the
//! HTTP API that carries them from clients.
//!
//! - [`command`]: [`Command`], its [`Reply`] and [`CommandError`]. The API and the configuration file both end here.
//! - [`phase`]: which command is possible before the guest starts, and which after.
//! - [`controller`]: the owner of configuration and machine, which carries commands out.
//! - [`fork`]: children of a started microVM.
//! - [`snapshot`]: saving a microVM to files, and going on with one.
//! - `task`: the part of a long command that may wait for the host, on a thread of its own;
//!   questions are answered meanwhile.
//! - `vsock`: the host sockets of the vsock device.
//! - [`http`]: HTTP/1.x as bytes in, requests out and back. No sockets.
//! - [`api`]: the thread `fc_api`, which serves the API socket, and the way from there to the main thread and back.
//!
//! # Invariants
//!
//! - A [`Command`] that came from [`api`] has passed the bounds of `config`; it may still be impossible in the present
//!   phase, or for what the host has.
//! - The API thread never touches the machine, and never waits for anything but its `epoll`: a command that takes long,
//!   a client that stalls or one that talks nonsense delays nobody else.
//! - What a client can make the process hold is bounded by [`api::Limits`].

#![forbid(unsafe_code)]

pub mod api;
mod closing;
pub mod command;
pub mod controller;
pub mod fork;
pub mod http;
mod metadata;
pub mod phase;
pub mod snapshot;
mod task;
mod vsock;

pub use command::{Command, CommandError, Reply};
pub use controller::{Controller, Host, Identity, Platform};
pub use phase::{Phase, PhaseError};
