//! Packets from the guest: what they do to connections.

use std::os::fd::AsFd;

use memory::GuestRam;
use memory::iovec::{Access, GuestIoVec};
use rustix::io::Errno;
use rustix::net::Shutdown;
use virtio::queue::{Buffers, QueueError};
use virtio::worker::{Context, Nanos};

use crate::connection::{Connection, Key, PendingPackets, RxMessage, State, WriteOutcome};
use crate::guest_io;
use crate::muxer::{MS, Muxer, reset_of};
use crate::packet::{
    END_OF_MESSAGE, HOST_CID, Header, Op, SHUTDOWN_BOTH, SHUTDOWN_RECEIVE, SHUTDOWN_SEND, SocketKind,
};
use crate::table::Slot;

/// How long the host may take to read data that the guest sent before it ended the connection.
const LINGER_TIMEOUT: Nanos = 60_000 * MS;

impl Muxer {
    /// Handles a packet of the guest. `data` has the length that the header says.
    pub(crate) fn handle_packet(
        &mut self,
        cx: &mut Context<'_>,
        header: &Header,
        data: &Buffers<'_>,
    ) -> Result<(), QueueError> {
        // Until the driver has handled a transport reset it may use its former CID, except for new
        // connections.
        let may_be_former = self.is_reset_pending && Op::of(header.op.get()) != Some(Op::Request);
        if header.src_cid.get() != self.guest_cid && !may_be_former {
            // A reset would not reach the sender.
            self.shared.stats.malformed_count.add(1);
            return Ok(());
        }
        match self.handle_header(cx, header) {
            Some(slot) => self.handle_data(cx, slot, data, header.flags.get()),
            None => Ok(()),
        }
    }

    /// Handles a packet's header. Returns the connection if the packet is data that it can take.
    fn handle_header(&mut self, cx: &mut Context<'_>, header: &Header) -> Option<Slot> {
        let op = Op::of(header.op.get());
        let kind =
            SocketKind::of(header.kind.get()).filter(|&kind| kind == SocketKind::Stream || self.seqpacket);
        let key = Key { host_port: header.dst_port.get(), guest_port: header.src_port.get() };
        let (Some(op), Some(kind), HOST_CID) = (op, kind, header.dst_cid.get()) else {
            self.reply_reset(header);
            return None;
        };
        if op == Op::Request {
            self.handle_request(cx, header, key, kind);
            return None;
        }
        let found = self.table.find(key);
        let found = found.filter(|&slot| self.table.get(slot).is_some_and(|c| c.kind == kind));
        let Some((slot, connection)) = found.and_then(|slot| Some((slot, self.table.get(slot)?))) else {
            // The transport reset ends a connection from before it, with an error. If the driver
            // handled a reset packet first, a program that reads would see an orderly end.
            if !self.is_reset_pending {
                self.reply_reset(header);
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
            (Op::Response, State::Requested) => self.accepted_by_guest(cx, slot),
            (Op::CreditRequest, State::Established | State::Held) => connection.pending.credit_update = true,
            (Op::Shutdown, State::Held) => {
                // The guest itself ends it, so the transport reset does not have to.
                self.establish(cx, slot);
                self.shutdown_by_guest(cx, slot, header.flags.get());
            }
            (Op::Shutdown, State::Established | State::Requested | State::Closing) => {
                self.shutdown_by_guest(cx, slot, header.flags.get());
            }
            // The first needs no more than its header, which was handled. The others may have been
            // sent before the guest received the shutdown.
            (Op::CreditUpdate, State::Established | State::Held)
            | (Op::Rw | Op::CreditUpdate | Op::CreditRequest, State::Closing) => {}
            _ => self.kill(cx, slot),
        }
        self.schedule(cx, slot);
        None
    }

    /// Handles a packet that is shorter than its header says: resets the connection that it names.
    pub(crate) fn handle_truncated_packet(&mut self, cx: &mut Context<'_>, header: &Header) {
        let key = Key { host_port: header.dst_port.get(), guest_port: header.src_port.get() };
        let is_ours = header.src_cid.get() == self.guest_cid && header.dst_cid.get() == HOST_CID;
        if let Some(slot) = self.table.find(key).filter(|_| is_ours) {
            self.kill(cx, slot);
        }
    }

    /// Handles data of the guest.
    fn handle_data(
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
                SocketKind::SeqPacket => {
                    connection.buffer_message(&self.scratch, flags & END_OF_MESSAGE != 0);
                }
            }
            return Ok(());
        }
        let written = match connection.kind {
            _ if connection.host_recv_shut => {
                connection.credit.record_forwarded(data.len());
                WriteOutcome::PeerClosed
            }
            SocketKind::Stream => {
                write_stream(connection, &mut self.iovec, &mut self.scratch, &self.ram, data)?
            }
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

    /// The guest ends one or both directions of a connection.
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
            connection.rx_message = RxMessage::default();
            connection.close_if_peer_gone();
        }
    }

    /// The guest has reset a connection.
    fn reset_by_guest(&mut self, cx: &mut Context<'_>, slot: Slot) {
        match self.table.get(slot) {
            // It shut down its sending side before, so all of its data is still wanted.
            Some(connection) if connection.guest_send_shut => self.linger(cx, slot),
            _ => self.remove(cx, slot),
        }
    }

    /// The guest is done with a connection. The data that it has sent is still written to the host.
    fn linger(&mut self, cx: &mut Context<'_>, slot: Slot) {
        self.table.forget_key(slot);
        let deadline = cx.now().saturating_add(LINGER_TIMEOUT);
        match self.table.get(slot) {
            Some(connection) if !connection.is_flushed() && connection.socket.is_some() => {
                connection.state = State::Lingering;
                connection.pending = PendingPackets::default();
                connection.rx_message = RxMessage::default();
                self.table.set_deadline(slot, Some(deadline));
            }
            _ => self.remove(cx, slot),
        }
    }
}

/// Writes a packet's data to a stream socket, directly from guest memory. Buffers what the socket
/// does not take.
fn write_stream(
    connection: &mut Connection,
    iovec: &mut GuestIoVec,
    scratch: &mut Vec<u8>,
    ram: &GuestRam,
    data: &Buffers<'_>,
) -> Result<WriteOutcome, QueueError> {
    let mut sent = 0;
    if connection.is_flushed() && !data.is_empty() {
        iovec.clear();
        guest_io::push(iovec, ram, data, data.len(), Access::Read)?;
        let Some(socket) = &connection.socket else { return Ok(WriteOutcome::Failed) };
        match iovec.send(socket.as_fd()) {
            Ok(taken) => sent = taken as u32,
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

/// Copies a packet's data to `scratch`. Its length is bounded by the guest's credit.
fn copy(scratch: &mut Vec<u8>, ram: &GuestRam, data: &Buffers<'_>) -> Result<(), QueueError> {
    scratch.clear();
    scratch.resize(data.len() as usize, 0);
    data.read(ram, scratch).map(drop)
}
