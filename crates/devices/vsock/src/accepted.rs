//! Host clients' connections that the guest has accepted, and those that it accepts while a
//! transport reset is pending.

use rustix::net::{SendFlags, send};
use virtio::worker::Context;

use crate::connection::State;
use crate::muxer::{Muxer, reset_of};
use crate::table::Slot;

impl Muxer {
    /// The guest has accepted a host client's connection.
    pub(crate) fn accepted_by_guest(&mut self, cx: &mut Context<'_>, slot: Slot) {
        if !self.is_reset_pending {
            return self.establish(cx, slot);
        }
        self.table.set_deadline(slot, None);
        if let Some(connection) = self.table.get(slot) {
            connection.state = State::Held;
        }
    }

    /// Requests all held connections again, as the guest has handled the transport reset, which may
    /// have ended them. Their clients have no reply yet, and their data is still in their sockets.
    pub(crate) fn request_held_again(&mut self, cx: &mut Context<'_>) {
        for slot in self.held() {
            self.reset_in_guest(slot);
            let port = self.table.get(slot).and_then(|connection| connection.key).map(|key| key.guest_port);
            self.table.forget_key(slot);
            if let Some(port) = port {
                self.request_from_guest(cx, slot, port);
            }
        }
    }

    /// Establishes all held connections, as the guest has not handled the transport reset in time.
    pub(crate) fn establish_held(&mut self, cx: &mut Context<'_>) {
        for slot in self.held() {
            self.establish(cx, slot);
            self.schedule(cx, slot);
        }
    }

    fn held(&mut self) -> Vec<Slot> {
        let mut slots = self.table.all();
        slots.retain(|&slot| self.table.get(slot).is_some_and(|connection| connection.state == State::Held));
        slots
    }

    /// Resets a connection in the guest, where it may exist, and drops the data that the guest has
    /// sent on it.
    fn reset_in_guest(&mut self, slot: Slot) {
        if let Some(connection) = self.table.get(slot) {
            let reset = reset_of(connection);
            connection.restart();
            self.queue_reset(reset);
        }
    }

    /// Sends the client its `OK` reply, and lets data flow.
    pub(crate) fn establish(&mut self, cx: &mut Context<'_>, slot: Slot) {
        self.table.set_deadline(slot, None);
        let Some(connection) = self.table.get(slot) else { return };
        connection.state = State::Established;
        connection.readable = true;
        let (Some(key), Some(socket)) = (connection.key, &connection.socket) else { return };
        let reply = format!("OK {}\n", key.host_port);
        let flags = SendFlags::NOSIGNAL | SendFlags::DONTWAIT;
        // The socket cannot be full, as nothing was written to it before.
        if send(socket, reply.as_bytes(), flags) != Ok(reply.len()) {
            return self.kill(cx, slot);
        }
        // Data that the guest has sent while the connection was held.
        if !connection.is_flushed() {
            let outcome = connection.flush();
            self.written(cx, slot, outcome);
        }
    }
}
