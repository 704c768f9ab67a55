//! What events of the host do to connections, and how host clients come in.

use std::os::fd::OwnedFd;

use rustix::io::Errno;

use super::connection::{State, is_peer_send_shut};
use super::connect_request::{self, ConnectRequest};
use super::packet::SocketKind;
use super::muxer::{FIRST_LISTENER, Muxer};
use super::table::Slot;
use virtio::worker::{Context, Event, Interest, Nanos};

const MS: Nanos = 1_000_000;
/// How long a host client may take to say where it wants to go.
const CONNECT_REQUEST_TIMEOUT: Nanos = 30_000 * MS;
/// How long the guest may take to answer a host client.
const RESPONSE_TIMEOUT: Nanos = 10_000 * MS;
/// A process out of descriptors accepts again after that.
const ACCEPT_RETRY_INTERVAL: Nanos = 100 * MS;
/// Host clients that are taken in one go.
const ACCEPTS_PER_ROUND: usize = 64;

impl Muxer {
    /// Something happened at a descriptor.
    pub(super) fn ready(&mut self, cx: &mut Context<'_>, event: Event) {
        if let Some(waiting) = event.token.checked_sub(FIRST_LISTENER) {
            if let Some(waiting) = self.waiting.get_mut(waiting as usize) {
                *waiting = true;
            }
            return;
        }
        let slot = event.token;
        let Some(connection) = self.table.get(slot) else { return };
        // The event may be of a connection that had the slot before. To look for something in vain does no harm; a hangup is for good.
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
                    let written = connection.flush();
                    self.written(cx, slot, written);
                }
                self.schedule(cx, slot);
            }
        }
    }

    /// Looks at every descriptor as if something had happened at it.
    pub(super) fn poll_all(&mut self, cx: &mut Context<'_>) {
        self.waiting.fill(true);
        for token in self.table.all() {
            self.ready(cx, Event { token, readable: true, writable: true, hangup: true });
        }
    }

    /// Watches the listeners.
    pub(super) fn attach(&mut self, cx: &mut Context<'_>) -> std::io::Result<()> {
        for (token, listener) in (FIRST_LISTENER..).zip(&self.sockets.listeners) {
            cx.watch_shared(token, listener.fd(), Interest::READ)?;
        }
        Ok(())
    }

    /// Takes host clients that wait. True if there may be more of them.
    pub(super) fn accept(&mut self, cx: &mut Context<'_>) -> bool {
        if self.accept_retry_at.is_some() {
            return false;
        }
        for at in 0..self.waiting.len() {
            for _ in 0..ACCEPTS_PER_ROUND {
                if !self.waiting[at] {
                    break;
                }
                match self.sockets.listeners[at].accept() {
                    Ok(socket) => {
                        let kind = self.sockets.listeners[at].kind();
                        self.add_client(cx, socket, kind);
                    }
                    Err(Errno::AGAIN) => self.waiting[at] = false,
                    Err(Errno::MFILE | Errno::NFILE | Errno::NOMEM | Errno::NOBUFS) => {
                        self.accept_retry_at = Some(cx.now().saturating_add(ACCEPT_RETRY_INTERVAL));
                        return false;
                    }
                    // That client has gone already.
                    Err(_) => {}
                }
            }
        }
        self.waiting.contains(&true)
    }

    /// A host client is there.
    fn add_client(&mut self, cx: &mut Context<'_>, socket: OwnedFd, kind: SocketKind) {
        let is_possible = !self.is_closed && self.is_below_fd_limit(&socket);
        let slot = is_possible.then(|| self.table.add(kind, State::AwaitingConnect)).flatten();
        let Some(slot) = slot else {
            // It hears it by being closed.
            self.shared.stats.conns_refused.add(1);
            return;
        };
        self.shared.stats.conns_added.add(1);
        if !self.adopt(cx, slot, socket) {
            return self.kill(cx, slot);
        }
        let deadline = cx.now().saturating_add(CONNECT_REQUEST_TIMEOUT);
        self.table.set_deadline(slot, Some(deadline));
        self.read_connect_request(cx, slot);
    }

    /// A host client may have said where it wants to go.
    fn read_connect_request(&mut self, cx: &mut Context<'_>, slot: Slot) {
        let Some(connection) = self.table.get(slot) else { return };
        let Some(socket) = &connection.socket else { return };
        match connect_request::read(socket, connection.kind) {
            ConnectRequest::Port(port) if connection.kind == SocketKind::Stream || self.seqpacket => {
                self.ask(cx, slot, port);
            }
            ConnectRequest::Partial if !connection.hangup => {}
            _ => self.kill(cx, slot),
        }
    }

    /// Asks the guest for a host client's connection to this port, in which nothing was sent so
    /// far.
    pub(super) fn ask(&mut self, cx: &mut Context<'_>, slot: Slot, port: u32) {
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
