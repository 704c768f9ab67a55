//! What packets of the guest do to connections.

use memory::GuestRam;
use rustix::io::Errno;
use rustix::net::{SendFlags, Shutdown, send};

use super::connection::{Connection, Key, PendingPackets, State, WriteOutcome};
use super::guest_io::Segments;
use super::packet::{
    END_OF_MESSAGE, HOST_CID, Header, Op, SHUTDOWN_BOTH, SHUTDOWN_RECEIVE, SHUTDOWN_SEND, SocketKind,
};
use super::muxer::{Reset, Muxer, reset_of};
use super::table::Slot;
use virtio::queue::{Buffers, QueueError};
use virtio::worker::{Context, Nanos};

const MS: Nanos = 1_000_000;
/// How long a host server may take for a connection of the guest.
const CONNECT_TIMEOUT: Nanos = 5_000 * MS;
/// A host server that has no time is tried again after that.
const CONNECT_RETRY_INTERVAL: Nanos = 10 * MS;
/// How often servers are tried again in one go.
const CONNECTS_PER_RETRY: usize = 64;
/// How long the host may take for what the guest sent before it was done.
const LINGER_TIMEOUT: Nanos = 60_000 * MS;

impl Muxer {
    /// Handles a packet of the guest; `data` is as long as the header says.
    pub(super) fn packet(
        &mut self,
        cx: &mut Context<'_>,
        header: &Header,
        data: &Buffers<'_>,
    ) -> Result<(), QueueError> {
        // Until the driver has handled a reset it may have the CID of before, and so does what it
        // accepts.
        let former = self.is_reset_pending && Op::of(header.op.get()) != Some(Op::Request);
        if header.src_cid.get() != self.guest_cid && !former {
            // Nobody would take the answer.
            self.shared.stats.malformed_count.add(1);
            return Ok(());
        }
        match self.signal(cx, header) {
            Some(slot) => self.data(cx, slot, data, header.flags.get()),
            None => Ok(()),
        }
    }

    /// Does what a packet's header says. The connection, if the packet is data for one that is open.
    fn signal(&mut self, cx: &mut Context<'_>, header: &Header) -> Option<Slot> {
        let op = Op::of(header.op.get());
        let kind = SocketKind::of(header.kind.get())
            .filter(|&kind| kind == SocketKind::Stream || self.seqpacket);
        let key = Key { host_port: header.dst_port.get(), guest_port: header.src_port.get() };
        let (Some(op), Some(kind), HOST_CID) = (op, kind, header.dst_cid.get()) else {
            self.refuse(header);
            return None;
        };
        if op == Op::Request {
            self.request(cx, header, key, kind);
            return None;
        }
        let found = self.table.find(key);
        let found = found.filter(|&slot| self.table.get(slot).is_some_and(|c| c.kind == kind));
        let Some((slot, connection)) = found.and_then(|slot| Some((slot, self.table.get(slot)?))) else {
            // The event ends a connection from before the reset, with an error. A reset of it here
            // would look like an orderly end to a program that reads, should the driver handle it
            // first.
            if !self.is_reset_pending {
                self.refuse(header);
            }
            return None;
        };
        if op == Op::Rst {
            self.reset_by_guest(cx, slot);
            return None;
        }
        if connection.credit.update_peer(header).is_err() {
            self.kill(cx, slot);
            return None;
        }
        let state = connection.state;
        if state == State::Established && connection.credit_requests > 0 && connection.sendable() > 0 {
            connection.credit_requests = 0;
            self.table.set_deadline(slot, None);
        }
        let connection = self.table.get(slot)?;
        match (op, state) {
            (Op::Rw, State::Established | State::Held) => return Some(slot),
            (Op::Response, State::Requested) => self.taken(cx, slot),
            (Op::CreditRequest, State::Established | State::Held) => connection.pending.credit_update = true,
            (Op::Shutdown, State::Held) => {
                // The guest ended it by itself: no reset will.
                self.opened(cx, slot);
                self.shutdown_by_guest(cx, slot, header.flags.get());
            }
            (Op::Shutdown, State::Established | State::Requested | State::Closing) => {
                self.shutdown_by_guest(cx, slot, header.flags.get());
            }
            // Its header said all; or it was sent before the guest heard that the host is done.
            (Op::CreditUpdate, State::Established | State::Held)
            | (Op::Rw | Op::CreditUpdate | Op::CreditRequest, State::Closing) => {}
            _ => self.kill(cx, slot),
        }
        self.schedule(cx, slot);
        None
    }

    /// A packet that is shorter than its header says: the connection, if there is one, cannot be trusted any more.
    pub(super) fn broken_packet(&mut self, cx: &mut Context<'_>, header: &Header) {
        let key = Key { host_port: header.dst_port.get(), guest_port: header.src_port.get() };
        let is_ours = header.src_cid.get() == self.guest_cid && header.dst_cid.get() == HOST_CID;
        if let Some(slot) = self.table.find(key).filter(|_| is_ours) {
            self.kill(cx, slot);
        }
    }

    /// Answers a packet to something that does not exist. Resets are not answered.
    fn refuse(&mut self, header: &Header) {
        if header.op.get() != Op::Rst as u16 {
            self.queue_reset(Reset {
                src_cid: header.dst_cid.get(),
                key: Key { host_port: header.dst_port.get(), guest_port: header.src_port.get() },
                kind: header.kind.get(),
            });
        }
    }

    /// The guest wants to connect to the host.
    fn request(&mut self, cx: &mut Context<'_>, header: &Header, key: Key, kind: SocketKind) {
        if let Some(slot) = self.table.find(key) {
            // It has forgotten the connection that it had.
            return self.kill(cx, slot);
        }
        let Some(slot) = self.table.add(kind, State::Connecting) else {
            self.shared.stats.conns_refused.add(1);
            return self.refuse(header);
        };
        self.shared.stats.conns_added.add(1);
        self.table.set_key(slot, key);
        if let Some(connection) = self.table.get(slot)
            && connection.credit.update_peer(header).is_err()
        {
            return self.kill(cx, slot);
        }
        // Who waits already comes first.
        if self.table.first_waiting((key.host_port, kind)).is_some() || !self.dial(cx, slot) {
            self.table.wait_for_server(slot);
            let now = cx.now();
            self.table.set_deadline(slot, Some(now.saturating_add(CONNECT_TIMEOUT)));
            self.connect_retry_at = self.connect_retry_at.or(Some(now.saturating_add(CONNECT_RETRY_INTERVAL)));
        }
    }

    /// Tries servers again that had no time: for each of them, those that wait in their order, until it has none again.
    pub(super) fn retry_connects(&mut self, cx: &mut Context<'_>) {
        let mut left = CONNECTS_PER_RETRY;
        for _ in 0..self.table.servers() {
            // Where there are many, each has its turn.
            let Some(server) = self.table.next_server_after(self.last_retried).filter(|_| left > 0) else { break };
            self.last_retried = Some(server);
            while left > 0
                && let Some(slot) = self.table.first_waiting(server)
            {
                left -= 1;
                if !self.dial(cx, slot) {
                    break;
                }
            }
        }
        let again = cx.now().saturating_add(CONNECT_RETRY_INTERVAL);
        self.connect_retry_at = (self.table.servers() > 0).then_some(again);
    }

    /// Tries to reach whoever serves the port that the guest wants. False if they have no time for it.
    fn dial(&mut self, cx: &mut Context<'_>, slot: Slot) -> bool {
        let Some(connection) = self.table.get(slot) else { return true };
        let Some((port, kind)) = connection.server() else { return true };
        match self.sockets.dial(port, kind) {
            Ok(socket) if self.is_below_fd_limit(&socket) => {
                if self.adopt(cx, slot, socket) {
                    self.table.stop_waiting(slot);
                    self.table.set_deadline(slot, None);
                    if let Some(connection) = self.table.get(slot) {
                        connection.state = State::Established;
                        connection.pending.response = true;
                        connection.readable = true;
                    }
                    self.table.enqueue(slot);
                } else {
                    self.kill(cx, slot);
                }
            }
            Err(Errno::AGAIN) => return false,
            _ => self.refuse_connection(cx, slot),
        }
        true
    }

    /// The guest took a host client's connection.
    fn taken(&mut self, cx: &mut Context<'_>, slot: Slot) {
        if !self.is_reset_pending {
            return self.opened(cx, slot);
        }
        self.table.set_deadline(slot, None);
        if let Some(connection) = self.table.get(slot) {
            connection.state = State::Held;
        }
    }

    /// The guest has handled the reset of all connections. Those that it took before that may have
    /// ended with it: they are asked for again. Their clients have not been answered, and what they
    /// sent is still in their sockets.
    pub(super) fn request_again(&mut self, cx: &mut Context<'_>) {
        for slot in self.held() {
            self.abandon_attempt(slot);
            let port = self.table.get(slot).and_then(|connection| connection.key).map(|key| key.guest_port);
            self.table.forget_key(slot);
            if let Some(port) = port {
                self.ask(cx, slot, port);
            }
        }
    }

    /// The guest has not handled the reset for too long: connections that it took are as good as
    /// any.
    pub(super) fn release_held(&mut self, cx: &mut Context<'_>) {
        for slot in self.held() {
            self.opened(cx, slot);
            self.schedule(cx, slot);
        }
    }

    fn held(&mut self) -> Vec<Slot> {
        let mut slots = self.table.all();
        slots.retain(|&slot| self.table.get(slot).is_some_and(|connection| connection.state == State::Held));
        slots
    }

    /// Ends the guest's side of a connection that it took, if it still has it, and what was kept of
    /// it.
    fn abandon_attempt(&mut self, slot: Slot) {
        if let Some(connection) = self.table.get(slot) {
            let reset = reset_of(connection);
            connection.restart();
            self.queue_reset(reset);
        }
    }

    /// A host client is answered: it is connected.
    fn opened(&mut self, cx: &mut Context<'_>, slot: Slot) {
        self.table.set_deadline(slot, None);
        let Some(connection) = self.table.get(slot) else { return };
        connection.state = State::Established;
        connection.readable = true;
        let (Some(key), Some(socket)) = (connection.key, &connection.socket) else { return };
        let answer = format!("OK {}\n", key.host_port);
        let flags = SendFlags::NOSIGNAL | SendFlags::DONTWAIT;
        // Nothing was written to the socket so far: it has room.
        if send(socket, answer.as_bytes(), flags) != Ok(answer.len()) {
            return self.kill(cx, slot);
        }
        // What the guest sent while it was held.
        if !connection.is_flushed() {
            let written = connection.flush();
            self.written(cx, slot, written);
        }
    }

    /// The guest sends data.
    fn data(
        &mut self,
        cx: &mut Context<'_>,
        slot: Slot,
        data: &Buffers<'_>,
        flags: u32,
    ) -> Result<(), QueueError> {
        let Some(connection) = self.table.get(slot) else { return Ok(()) };
        if connection.guest_send_shut || connection.credit.record_received(data.len()).is_err() {
            self.kill(cx, slot);
            return Ok(());
        }
        self.shared.stats.tx_bytes_count.add(data.len().into());
        if connection.state == State::Held {
            copy(&mut self.scratch, &self.ram, data)?;
            match connection.kind {
                SocketKind::Stream => connection.buffer(&self.scratch),
                SocketKind::SeqPacket => connection.buffer_message(&self.scratch, flags & END_OF_MESSAGE != 0),
            }
            return Ok(());
        }
        let written = match connection.kind {
            _ if connection.host_recv_shut => {
                connection.credit.record_forwarded(data.len());
                WriteOutcome::PeerClosed
            }
            SocketKind::Stream => stream(connection, &mut self.segments, &mut self.scratch, &self.ram, data)?,
            SocketKind::SeqPacket => {
                copy(&mut self.scratch, &self.ram, data)?;
                connection.buffer_message(&self.scratch, flags & END_OF_MESSAGE != 0);
                if connection.blocked { WriteOutcome::Bytes(0) } else { connection.flush() }
            }
        };
        self.written(cx, slot, written);
        self.schedule(cx, slot);
        Ok(())
    }

    /// The guest ends one or both directions.
    fn shutdown_by_guest(&mut self, cx: &mut Context<'_>, slot: Slot, flags: u32) {
        let Some(connection) = self.table.get(slot) else { return };
        if flags & SHUTDOWN_SEND != 0 {
            connection.shut_guest_send();
        }
        connection.guest_recv_shut |= flags & SHUTDOWN_RECEIVE != 0;
        if connection.guest_send_shut && connection.guest_recv_shut {
            let reset = reset_of(connection);
            self.queue_reset(reset);
            return self.linger(cx, slot);
        }
        if flags & SHUTDOWN_BOTH != 0 && connection.state == State::Requested {
            return self.kill(cx, slot);
        }
        if connection.guest_send_shut && connection.is_flushed() {
            connection.shut(Shutdown::Write);
        }
        if connection.guest_recv_shut {
            connection.shut(Shutdown::Read);
            connection.rx_message = (Vec::new(), 0);
            connection.close_if_peer_gone();
        }
    }

    /// The guest has no such connection (any more).
    fn reset_by_guest(&mut self, cx: &mut Context<'_>, slot: Slot) {
        match self.table.get(slot) {
            // It ended its direction in good order before.
            Some(connection) if connection.guest_send_shut => self.linger(cx, slot),
            _ => self.remove(cx, slot),
        }
    }

    /// The guest is done with a connection; what it sent still goes to the host.
    fn linger(&mut self, cx: &mut Context<'_>, slot: Slot) {
        self.table.forget_key(slot);
        let deadline = cx.now().saturating_add(LINGER_TIMEOUT);
        match self.table.get(slot) {
            Some(connection) if !connection.is_flushed() && connection.socket.is_some() => {
                connection.state = State::Lingering;
                connection.pending = PendingPackets::default();
                connection.rx_message = (Vec::new(), 0);
                self.table.set_deadline(slot, Some(deadline));
            }
            _ => self.remove(cx, slot),
        }
    }
}

/// Writes a packet's data to a stream, straight from guest memory; keeps what the socket does not take.
fn stream(
    connection: &mut Connection,
    segments: &mut Segments,
    scratch: &mut Vec<u8>,
    ram: &GuestRam,
    data: &Buffers<'_>,
) -> Result<WriteOutcome, QueueError> {
    let mut sent = 0;
    if connection.is_flushed() && !data.is_empty() {
        segments.clear();
        segments.push(data, data.len())?;
        let Some(socket) = &connection.socket else { return Ok(WriteOutcome::Failed) };
        match segments.send(socket) {
            Ok(taken) => sent = taken,
            Err(Errno::AGAIN) => {}
            Err(Errno::PIPE) => {
                connection.credit.record_forwarded(data.len());
                return Ok(connection.shut_host_recv());
            }
            Err(_) => return Ok(WriteOutcome::Failed),
        }
        connection.credit.record_forwarded(sent);
    }
    if let Some((_, rest)) = data.split_at(sent).filter(|(_, rest)| !rest.is_empty()) {
        copy(scratch, ram, &rest)?;
        connection.buffer(scratch);
    }
    Ok(WriteOutcome::Bytes(sent))
}

/// Copies a packet's data to `scratch`. It is no more than the guest has credit for.
fn copy(scratch: &mut Vec<u8>, ram: &GuestRam, data: &Buffers<'_>) -> Result<(), QueueError> {
    scratch.clear();
    scratch.resize(data.len() as usize, 0);
    data.read(ram, scratch).map(drop)
}
