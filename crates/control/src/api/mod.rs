//! The API socket: a thread named `fc_api` that turns HTTP into [`Command`](crate::Command)s for the main thread, and
//! its answers into HTTP.
//!
//! ```text
//! clients <-- unix socket --> fc_api (epoll) -- Request --> main thread
//!                                   ^------- ReplyTo --------'
//! ```
//!
//! The main thread makes an [`ApiServer`] (from then on clients can connect), spawns its thread, and takes
//! [`Request`]s from the [`Requests`] that it gets for it. Each is answered through its [`ReplyTo`], soon or late, in
//! any order.
//!
//! # Invariants
//!
//! - The thread waits in `epoll_wait` only. It reads from a connection only when it can use more, and takes the next
//!   request of a connection only when the answer to the last one has gone out: answers come in the order of the
//!   requests, and a client that does not read its answers is not read from either.
//! - A connection holds at most one request and one answer, and has at most one command with the main thread. It keeps
//!   its place among [`Limits::max_connections`] until that command is answered, even if its client hangs up.
//! - Every request is answered, by a refusal if the main thread drops it.
//!
//! Block the signals that the main thread is to handle before spawning: the thread inherits its mask.

mod channel;
mod connection;
mod replay;
mod routes;
mod server;
mod socket;

use std::{
    io,
    os::{
        fd::{AsFd, BorrowedFd},
        unix::net::UnixListener,
    },
    path::Path,
    thread,
};

pub use channel::{ReplyTo, Request, Requests};
pub use replay::{Replayed, replay};
pub use routes::{RouteError, Routed, route};
pub use socket::{BindError, Occupant};

/// The thread's name, by which tools find it.
pub const THREAD_NAME: &str = "fc_api";

/// Enough for `serde_json`'s deepest recursion in an unoptimized build; only what is touched is ever there.
const STACK_SIZE: usize = 512 << 10;

/// What clients may take up.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Limits {
    /// Most connections at a time; one more is told so and closed.
    pub max_connections: usize,
    /// Most bytes of one request's body.
    pub max_payload: usize,
    /// Most bytes of one request's first line and headers together.
    pub max_head: usize,
}

impl Default for Limits {
    fn default() -> Limits {
        Limits { max_connections: 10, max_payload: 51200, max_head: 8192 }
    }
}

/// The API socket, made and not yet served. Clients can connect and wait.
#[derive(Debug)]
pub struct ApiServer {
    listener: UnixListener,
    socket_file: socket::SocketFile,
    limits: Limits,
}

impl ApiServer {
    /// Makes the socket at `path`. The file is removed when this value, or the [`Requests`] that comes of it, is dropped.
    pub fn bind(path: &Path, limits: Limits) -> Result<ApiServer, BindError> {
        let (listener, socket_file) = socket::bind(path)?;
        Ok(ApiServer { listener, socket_file, limits })
    }

    /// The listener, which a fork of this process goes on with.
    pub fn as_fd(&self) -> BorrowedFd<'_> {
        self.listener.as_fd()
    }

    /// Leaves the socket to a fork of this process that has it too: the file stays.
    pub fn leave_to_fork(self) {
        self.socket_file.keep();
    }

    /// Starts the thread. Fails if the process or the host has no descriptors, memory or threads left.
    pub fn spawn(self) -> io::Result<Requests> {
        let (mut requests, outbox) = channel::channel(self.socket_file)?;
        let server = server::Server::new(self.listener, outbox, self.limits)?;
        let thread = thread::Builder::new().name(THREAD_NAME.into()).stack_size(STACK_SIZE);
        requests.set_thread(thread.spawn(move || server.run())?);
        Ok(requests)
    }
}
