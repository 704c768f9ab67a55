//! One TCP connection of a guest: moves bytes between its socket and its HTTP session, and detects
//! stalls.

use std::time::Duration;

use smoltcp::iface::{SocketHandle, SocketSet};
use smoltcp::socket::tcp::{Socket, SocketBuffer, State};

use crate::http::Session;
use crate::service::Service;

/// Receive buffer, which is the window offered to the guest: as long as the longest request head.
const RECEIVE_LEN: usize = 4096;
/// Send buffer: bytes that the guest has not acknowledged.
const SEND_LEN: usize = 8192;
/// Longest time without progress: no complete request, no acknowledged byte of a response.
pub(crate) const STALL_TIMEOUT: Duration = Duration::from_mins(1);

/// A connection.
#[derive(Debug)]
pub(crate) struct Connection {
    pub(crate) handle: SocketHandle,
    session: Session,
    /// Time of the last progress.
    last_progress: Duration,
    /// Bytes to the guest that were unsent or unacknowledged when last checked.
    in_flight: usize,
}

/// Creates a socket that listens on `port`.
pub(crate) fn listener(port: u16) -> Socket<'static> {
    let buffer = |len| SocketBuffer::new(vec![0; len]);
    let mut socket = Socket::new(buffer(RECEIVE_LEN), buffer(SEND_LEN));
    // A response is written in one piece, so its last segment need not wait for more data.
    socket.set_nagle_enabled(false);
    socket.listen(port).expect("a new socket can listen on any port but 0");
    socket
}

impl Connection {
    /// A connection whose first segment arrives at `now`.
    pub(crate) fn new(handle: SocketHandle, now: Duration) -> Connection {
        Connection { handle, session: Session::new(), last_progress: now, in_flight: 0 }
    }

    /// When the connection is dropped without further progress.
    pub(crate) fn deadline(&self) -> Duration {
        self.last_progress + STALL_TIMEOUT
    }

    /// Time of the last progress.
    pub(crate) fn last_progress(&self) -> Duration {
        self.last_progress
    }

    /// Bytes that the session stores, without the buffers of the socket.
    #[cfg(any(test, feature = "testing"))]
    pub(crate) fn held(&self) -> usize {
        self.session.held()
    }

    /// Moves bytes between socket and session until neither can continue.
    pub(crate) fn process(&mut self, sockets: &mut SocketSet<'_>, service: &Service, now: Duration) {
        let socket: &mut Socket<'_> = sockets.get_mut(self.handle);
        let mut has_progress = false;
        loop {
            while !self.session.output().is_empty() && socket.can_send() {
                let Ok(len) = socket.send_slice(self.session.output()) else { break };
                self.session.sent(len);
            }
            if !self.session.output().is_empty() {
                break;
            }
            if self.session.is_closing() {
                socket.close();
            }
            let session = &mut self.session;
            let consumed = socket.recv(|bytes| {
                let consumed = session.consume(bytes, |request| {
                    has_progress = true;
                    service.respond(request, now)
                });
                (consumed, consumed)
            });
            match consumed {
                Ok(0) => break,
                Ok(_) => {}
                // The guest has closed its direction.
                Err(_) => {
                    if socket.state() == State::CloseWait {
                        socket.close();
                    }
                    break;
                }
            }
        }
        let in_flight = socket.send_queue() + self.session.output().len();
        if has_progress || in_flight < self.in_flight {
            self.last_progress = now;
        }
        self.in_flight = in_flight;
    }

    /// Ends the connection after its deadline: with a FIN if it was idle, otherwise with a reset.
    pub(crate) fn expire(&mut self, sockets: &mut SocketSet<'_>, now: Duration) {
        if now < self.deadline() {
            return;
        }
        let socket: &mut Socket<'_> = sockets.get_mut(self.handle);
        if socket.state() == State::Established && self.in_flight == 0 && self.session.is_idle() {
            socket.close();
            // The guest has the same time again to close its direction.
            self.last_progress = now;
        } else {
            socket.abort();
        }
    }
}
