//! Commands to a microVM: the one list of them, the phases in which each is possible, and the HTTP
//! API that carries them from clients.
//!
//! - [`command`]: [`Command`] and its [`Reply`]. The API and the configuration file both end here.
//!   [`error`]: [`CommandError`].
//! - [`phase`]: the phases in which each command is possible.
//! - [`controller`]: the owner of a microVM, which dispatches commands.
//! - `instance`: who the microVM is and its phase, which the API thread tells by itself.
//! - `microvm`: the microVM: its identity, its `settings`, its machine (`lifecycle`), and its
//!   `backends`: `drives`, `networks` and the sockets of `vsock`. `metadata`: its metadata service.
//! - `boot`, `pause`, `drive_commands`, [`fork`], [`snapshot`], `shutdown`: what commands do to it.
//!   `reopen`: replaces a backend that has to be closed first.
//! - `child`: what a fork passes to its children, and their reports.
//! - `overlays`: the overlays that forks and live snapshots add to drives.
//! - `live_snapshot`: the job of a live snapshot. `prefetch`: the working set of a restored guest.
//! - `task`: the part of a long command that may wait for the host, on a thread of its own;
//!   questions are answered meanwhile. `token`: how a task is cancelled.
//! - [`metrics`]: counters for operators: lines in a file, and Prometheus text.
//! - `openapi`: the description of the API, which the API serves.
//! - `host`: what the process does for a controller.
//! - [`events`]: what happened to the microVM, for clients that watch it.
//! - [`http`]: HTTP/1.x as bytes in, requests out and back. No sockets.
//! - [`api`]: the thread `fc_api`, which serves the API socket, and its channel to the main thread.
//!
//! # Invariants
//!
//! - A [`Command`] that came from [`api`] has passed the bounds of `config` that can be checked
//!   without the microVM. It may still be impossible in the present phase, or on this host.
//! - The API thread never touches the machine, and waits for nothing but its `epoll`. A command
//!   that takes long and a client that stalls delay no other client.
//! - What a client can make the process hold is bounded by [`api::Limits`].

#![forbid(unsafe_code)]

pub mod api;
mod backends;
mod boot;
mod child;
pub mod command;
pub mod controller;
mod drive_commands;
mod drives;
pub mod error;
pub mod events;
pub mod fork;
mod host;
pub mod http;
mod identity;
mod instance;
mod lifecycle;
mod live_snapshot;
mod metadata;
pub mod metrics;
mod microvm;
mod networks;
mod openapi;
mod overlays;
mod pause;
pub mod phase;
mod prefetch;
mod reopen;
mod settings;
mod shutdown;
pub mod snapshot;
mod task;
mod token;
mod vsock;

pub use command::{Command, Reply};
pub use controller::Controller;
pub use error::CommandError;
pub use host::Host;
pub use identity::{Identity, Platform};
pub use instance::Instance;
pub use phase::{Phase, PhaseError};
pub use token::TaskError;
