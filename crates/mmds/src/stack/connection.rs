//! One TCP connection of a guest: moves bytes between its socket and its session, and knows when it stalls.

use std::time::Duration;

use smoltcp::iface::{SocketHandle, SocketSet};
use smoltcp::socket::tcp::{Socket, SocketBuffer, State};

use crate::http::Session;
use crate::service::Service;

/// Received bytes that were not looked at yet: the window that a guest is offered. More than a head is never needed.
const RECEIVE_LEN: usize = 4096;
/// Sent bytes that the guest did not acknowledge yet.
const SEND_LEN: usize = 8192;
/// How long nothing may move on a connection: no request becomes whole, no byte of an answer is acknowledged.
pub(crate) const PATIENCE: Duration = Duration::from_mins(1);

/// A connection and what it is at.
#[derive(Debug)]
pub(crate) struct Connection {
    pub(crate) handle: SocketHandle,
    session: Session,
    /// When something last moved.
    moved: Duration,
    /// Bytes that were on the way to the guest then.
    on_the_way: usize,
}

/// A socket that listens on `port`.
pub(crate) fn listener(port: u16) -> Socket<'static> {
    let buffer = |len| SocketBuffer::new(vec![0; len]);
    let mut socket = Socket::new(buffer(RECEIVE_LEN), buffer(SEND_LEN));
    // An answer is written at once, so its last segment has nothing to wait for.
    socket.set_nagle_enabled(false);
    socket.listen(port).expect("a new socket can listen on any port but 0");
    socket
}

impl Connection {
    /// A connection whose first segment arrives at `now`.
    pub(crate) fn new(handle: SocketHandle, now: Duration) -> Connection {
        Connection { handle, session: Session::new(), moved: now, on_the_way: 0 }
    }

    /// When it is dropped if nothing moves.
    pub(crate) fn deadline(&self) -> Duration {
        self.moved + PATIENCE
    }

    /// Since when nothing moved.
    pub(crate) fn moved(&self) -> Duration {
        self.moved
    }

    /// Bytes that it holds besides its buffers.
    #[cfg(any(test, feature = "testing"))]
    pub(crate) fn held(&self) -> usize {
        self.session.held()
    }

    /// Moves what can be moved.
    pub(crate) fn pump(&mut self, sockets: &mut SocketSet<'_>, service: &Service, now: Duration) {
        let socket: &mut Socket<'_> = sockets.get_mut(self.handle);
        let mut moved = false;
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
            let taken = socket.recv(|bytes| {
                let taken = session.consume(bytes, |request| {
                    moved = true;
                    service.answer(request, now)
                });
                (taken, taken)
            });
            match taken {
                Ok(0) => break,
                Ok(_) => {}
                // The guest has said all that it will.
                Err(_) => {
                    if socket.state() == State::CloseWait {
                        socket.close();
                    }
                    break;
                }
            }
        }
        let on_the_way = socket.send_queue() + self.session.output().len();
        if moved || on_the_way < self.on_the_way {
            self.moved = now;
        }
        self.on_the_way = on_the_way;
    }

    /// Ends it if its deadline has come: in order if it only was idle, otherwise at once.
    pub(crate) fn expire(&mut self, sockets: &mut SocketSet<'_>, now: Duration) {
        if now < self.deadline() {
            return;
        }
        let socket: &mut Socket<'_> = sockets.get_mut(self.handle);
        if socket.state() == State::Established && self.on_the_way == 0 && self.session.is_idle() {
            socket.close();
            // It gets as long again to say goodbye.
            self.moved = now;
        } else {
            socket.abort();
        }
    }
}
