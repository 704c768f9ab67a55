//! Host events: what they do to connections, and how host clients are accepted.

use std::os::fd::OwnedFd;

use rustix::io::Errno;
use virtio::worker::{Context, Event, Interest, Nanos};

use crate::connect_request::{self, ConnectRequest};
use crate::connection::{State, is_peer_send_shut};
use crate::muxer::{FIRST_LISTENER, MS, Muxer};
use crate::packet::SocketKind;
use crate::table::Slot;

/// How long a host client may take to send its `CONNECT` line.
const CONNECT_REQUEST_TIMEOUT: Nanos = 30_000 * MS;
/// How long the guest may take to answer a connection request.
const RESPONSE_TIMEOUT: Nanos = 10_000 * MS;
/// After how long a process that ran out of file descriptors accepts again.
const ACCEPT_RETRY_INTERVAL: Nanos = 100 * MS;
/// Maximum number of host clients accepted at once from each listener.
const ACCEPTS_PER_ROUND: usize = 64;

impl Muxer {
    /// Handles an event of a listener or a host socket.
    pub(crate) fn ready(&mut self, cx: &mut Context<'_>, event: Event) {
        if let Some(listener) = event.token.checked_sub(FIRST_LISTENER) {
            if let Some(acceptable) = self.acceptable.get_mut(listener as usize) {
                *acceptable = true;
            }
            return;
        }
        let slot = event.token;
        let Some(connection) = self.table.get(slot) else { return };
        // The event may be of a previous connection in this slot. A needless read or write does no
        // harm. A hangup is permanent, so it is checked.
        let hangup = event.hangup && connection.socket.as_ref().is_some_and(is_peer_send_shut);
        connection.hangup |= hangup;
        match connection.state {
            State::AwaitingConnect => self.read_connect_request(cx, slot),
            State::Requested | State::Held if hangup => {
                if connection.is_peer_gone() {
                    self.kill(cx, slot);
                }
            }
            State::Requested | State::Held | State::Connecting | State::Closing => {}
            State::Established | State::Lingering => {
                connection.readable |= event.readable || hangup;
                connection.close_if_peer_gone();
                if connection.blocked && (event.writable || hangup) {
                    let outcome = connection.flush();
                    self.written(cx, slot, outcome);
                }
                self.schedule(cx, slot);
            }
        }
    }

    /// Handles every listener and host socket as if it had had all events.
    pub(crate) fn poll_all(&mut self, cx: &mut Context<'_>) {
        self.acceptable.fill(true);
        for token in self.table.all() {
            self.ready(cx, Event { token, readable: true, writable: true, hangup: true });
        }
    }

    /// Watches the listeners.
    pub(crate) fn attach(&mut self, cx: &mut Context<'_>) -> std::io::Result<()> {
        for (token, listener) in (FIRST_LISTENER..).zip(&self.sockets.listeners) {
            cx.watch_shared(token, listener.fd(), Interest::READ)?;
        }
        Ok(())
    }

    /// Accepts pending host clients. True if there may be more of them.
    pub(crate) fn accept(&mut self, cx: &mut Context<'_>) -> bool {
        if self.accept_retry_at.is_some() {
            return false;
        }
        for at in 0..self.acceptable.len() {
            for _ in 0..ACCEPTS_PER_ROUND {
                if !self.acceptable[at] {
                    break;
                }
                match self.sockets.listeners[at].accept() {
                    Ok(socket) => {
                        let kind = self.sockets.listeners[at].kind();
                        self.add_client(cx, socket, kind);
                    }
                    Err(Errno::AGAIN) => self.acceptable[at] = false,
                    Err(Errno::MFILE | Errno::NFILE | Errno::NOMEM | Errno::NOBUFS) => {
                        self.accept_retry_at = Some(cx.now().saturating_add(ACCEPT_RETRY_INTERVAL));
                        return false;
                    }
                    // The client has closed its socket already.
                    Err(_) => {}
                }
            }
        }
        self.acceptable.contains(&true)
    }

    /// Adds a host client that was accepted. If there are too many, its socket is closed.
    fn add_client(&mut self, cx: &mut Context<'_>, socket: OwnedFd, kind: SocketKind) {
        let is_possible = !self.is_closed && self.is_below_fd_limit(&socket);
        let slot = is_possible.then(|| self.table.add(kind, State::AwaitingConnect)).flatten();
        let Some(slot) = slot else {
            self.shared.stats.conns_refused.add(1);
            return;
        };
        self.shared.stats.conns_added.add(1);
        if !self.set_socket(cx, slot, socket) {
            return self.kill(cx, slot);
        }
        let deadline = cx.now().saturating_add(CONNECT_REQUEST_TIMEOUT);
        self.table.set_deadline(slot, Some(deadline));
        self.read_connect_request(cx, slot);
    }

    /// Reads a host client's `CONNECT` line, if it is complete.
    fn read_connect_request(&mut self, cx: &mut Context<'_>, slot: Slot) {
        let Some(connection) = self.table.get(slot) else { return };
        let Some(socket) = &connection.socket else { return };
        match connect_request::read(socket, connection.kind) {
            ConnectRequest::Port(port) if connection.kind == SocketKind::Stream || self.seqpacket => {
                self.request_from_guest(cx, slot, port);
            }
            ConnectRequest::Partial if !connection.hangup => {}
            _ => self.kill(cx, slot),
        }
    }

    /// Sends the guest a connection request for this port, for a host client on whose connection
    /// no data was sent.
    pub(crate) fn request_from_guest(&mut self, cx: &mut Context<'_>, slot: Slot, port: u32) {
        let key = self.table.new_key(port, &self.shared.next_port);
        self.table.set_key(slot, key);
        let deadline = cx.now().saturating_add(RESPONSE_TIMEOUT);
        self.table.set_deadline(slot, Some(deadline));
        if let Some(connection) = self.table.get(slot) {
            connection.state = State::Requested;
            connection.pending.request = true;
        }
        self.table.enqueue(slot);
    }
}
