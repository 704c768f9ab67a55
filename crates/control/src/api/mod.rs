//! The API socket: a thread named `fc_api` that turns HTTP into [`Command`](crate::Command)s for
//! the main thread, and its answers into HTTP.
//!
//! ```text
//! clients <-- unix socket --> fc_api (epoll) -- Request --> main thread
//!                                   ^------- ReplyTo --------|
//!                                   '------- EventLog -------'
//! ```
//!
//! The main thread creates an [`ApiServer`], to which clients can connect from then on, and spawns
//! its thread. It takes [`Request`]s from the [`Requests`] that it gets for it. Each is answered
//! through its [`ReplyTo`], at any time and in any order.
//!
//! # Invariants
//!
//! - The thread waits in `epoll_wait` only. It takes the next request of a connection when the
//!   answer to the last one has been sent, and reads only when it needs more bytes for a request.
//!   So answers come in the order of the requests, and a client that does not read its answers is
//!   not read from.
//! - A connection holds at most one request and one answer, and has at most one command with the
//!   main thread. It counts among [`Limits::max_connections`] until that command is answered, even
//!   if its client hangs up.
//! - Every request is answered, with an error if the main thread drops it.
//! - A connection that asked for events (`GET /events`) is a stream until it closes. It holds a few
//!   KiB of events that its client has not read. The next ones stay in the [`EventLog`], which
//!   drops the oldest.

mod channel;
mod connection;
mod endpoints;
#[cfg(any(test, feature = "testing"))]
pub mod fuzz;
mod limits;
mod request_log;
mod routes;
mod server;

use std::{
    io,
    os::fd::{AsFd, BorrowedFd, OwnedFd},
    path::Path,
    sync::Arc,
};

pub use channel::{ReplyTo, Request, Requests};
pub use endpoints::Endpoint;
pub use limits::Limits;
pub use routes::{ENDPOINTS, Read, Route, RouteError, Routed, route};
pub use socket_file::{BindError, Occupant, leave_all as leave_all_sockets};
use socket_file::{SocketFile, SocketType};

use crate::Instance;
use crate::events::EventLog;

/// The thread's name. Tools look for it.
pub const THREAD_NAME: &str = "fc_api";

/// The thread's stack: enough for `serde_json`'s deepest recursion in an unoptimized build. Pages
/// that are never touched take no memory.
const STACK_SIZE: usize = 512 << 10;

/// The API socket, before it is served. Clients can connect, and wait.
#[derive(Debug)]
pub struct ApiServer {
    listener: OwnedFd,
    socket_file: SocketFile,
    limits: Limits,
}

impl ApiServer {
    /// Creates the socket at `path`. The file is removed when this value, or the [`Requests`] that
    /// [`Self::spawn`] returns, is dropped.
    pub fn bind(path: &Path, limits: Limits) -> Result<ApiServer, BindError> {
        let (listener, socket_file) = socket_file::bind("API socket", path, SocketType::STREAM)?;
        request_log::listening(path);
        Ok(ApiServer { listener, socket_file, limits })
    }

    /// The listener, which a forked child of this process keeps.
    pub fn as_fd(&self) -> BorrowedFd<'_> {
        self.listener.as_fd()
    }

    /// Makes this forked process the one that removes the socket's file.
    pub fn adopt(&mut self) {
        self.socket_file.adopt();
    }

    /// Leaves the socket to a forked child of this process, which has it too. The file stays.
    pub fn leave_to_fork(self) {
        self.socket_file.leave_to_child();
    }

    /// Starts the thread, which inherits the signal mask of the caller, describes `instance` and
    /// streams `events` to clients that ask for them. Fails if the process or the host is out of
    /// descriptors, memory or threads.
    pub fn spawn(self, instance: Arc<Instance>, events: EventLog) -> io::Result<Requests> {
        let (mut requests, outbox) = channel::channel(self.socket_file, &events)?;
        let server = server::Server::new(self.listener, outbox, (instance, events), self.limits)?;
        requests.set_thread(sync::thread::spawn(THREAD_NAME, Some(STACK_SIZE), move || server.run())?);
        Ok(requests)
    }
}
