//! One connection, and what goes on between it and its host socket.

use std::os::fd::{AsFd, OwnedFd};
use std::sync::Arc;

use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::io::{Errno, ioctl_fionread};
use rustix::net::{RecvFlags, SendAncillaryBuffer, SendFlags, Shutdown, recv, sendmsg, shutdown};

use super::tx_buf::TxBuf;
use super::credit::Credit;
use super::packet::{HOST_CID, Header, Op, SHUTDOWN_RECEIVE, SHUTDOWN_SEND, SocketKind};
use super::table::ServerKey;
use virtio::worker::Nanos;

/// Longest message, either way. It has to be whole before it goes on.
pub(super) const MAX_MESSAGE: u32 = 64 << 10;

/// A connection's name, once it has one.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub(super) struct Key {
    pub(super) host_port: u32,
    pub(super) guest_port: u32,
}

/// How far a connection is in its life.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum State {
    /// A host client is there and has not said where it wants to go.
    AwaitingConnect,
    /// The guest wants it, and whoever serves the port has no time yet.
    Connecting,
    /// The guest is credit_requests and has not answered.
    Requested,
    /// The guest took it, maybe before it handled a reset of all connections, which would end it:
    /// the client is not answered yet.
    Held,
    /// Data flows.
    Established,
    /// The host is done with it, the guest was sent_shutdown, and has not forgotten it yet.
    Closing,
    /// The guest is done with it; the host still takes what the guest has sent.
    Lingering,
}

/// Packets without data that the guest is pending.
#[expect(clippy::struct_excessive_bools, reason = "each is a packet, and any of them may be pending")]
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub(super) struct PendingPackets {
    pub(super) request: bool,
    pub(super) response: bool,
    pub(super) credit_update: bool,
    pub(super) credit_request: bool,
}

/// What came of writing to a host socket.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum WriteOutcome {
    /// So many bytes went; the socket takes no more for now if it is fewer than there were.
    Bytes(u32),
    /// Whoever is there takes nothing any more.
    PeerClosed,
    /// It is broken.
    Failed,
}

/// A connection.
#[expect(clippy::struct_excessive_bools, reason = "each side ends each direction by itself")]
#[derive(Debug)]
pub(super) struct Connection {
    pub(super) kind: SocketKind,
    pub(super) state: State,
    pub(super) key: Option<Key>,
    pub(super) credit: Credit,
    pub(super) deadline: Option<Nanos>,
    /// Its ticket at the server that it waits for.
    pub(super) ticket: Option<u64>,
    /// None where there is none yet or any more.
    pub(super) socket: Option<Arc<OwnedFd>>,
    pub(super) pending: PendingPackets,
    /// What the guest sent and the socket has not taken.
    tx_buf: TxBuf,
    /// A message that the guest gets in pieces, and how much of it went.
    pub(super) rx_message: (Vec<u8>, u32),
    /// The socket takes nothing for now, and is watched for when it does.
    pub(super) blocked: bool,
    /// The socket may have something to read.
    pub(super) readable: bool,
    /// Its peer hung up, wholly or in part, which a read will tell after what it sent.
    pub(super) hangup: bool,
    /// How much to read at once: what the last reads were like.
    pub(super) read_size: u32,
    /// The host sends no more, and all it sent was given to the guest.
    pub(super) host_send_shut: bool,
    /// The host takes no more.
    pub(super) host_recv_shut: bool,
    /// The guest sends no more.
    pub(super) guest_send_shut: bool,
    /// The guest takes no more.
    pub(super) guest_recv_shut: bool,
    /// How often in a row the guest was credit_requests for room.
    pub(super) credit_requests: u32,
    /// Flags of the last `SHUTDOWN` that the guest got.
    pub(super) sent_shutdown: u32,
}

impl Connection {
    pub(super) fn new(kind: SocketKind, state: State, promised: u32) -> Self {
        Connection {
            kind,
            state,
            key: None,
            credit: Credit::new(promised),
            deadline: None,
            ticket: None,
            socket: None,
            pending: PendingPackets::default(),
            tx_buf: TxBuf::new(promised),
            rx_message: (Vec::new(), 0),
            blocked: false,
            readable: false,
            hangup: false,
            read_size: 0,
            host_send_shut: false,
            host_recv_shut: false,
            guest_send_shut: false,
            guest_recv_shut: false,
            credit_requests: 0,
            sent_shutdown: 0,
        }
    }

    /// The host server that a connection of the guest goes to.
    pub(super) fn server(&self) -> Option<ServerKey> {
        self.key.map(|key| (key.host_port, self.kind))
    }

    /// The most bytes that it can be made to keep.
    pub(super) fn max_buffered(&self) -> u64 {
        let from_guest = u64::from(self.credit.buf_alloc());
        match self.kind {
            SocketKind::Stream => from_guest,
            // With the lengths of messages, and one that the guest gets in pieces.
            SocketKind::SeqPacket => 2 * from_guest + u64::from(MAX_MESSAGE),
        }
    }

    /// A header to the guest, with the account of credit.
    pub(super) fn header(&mut self, op: Op, guest_cid: u64) -> Header {
        let key = self.key.unwrap_or(Key { host_port: 0, guest_port: 0 });
        let mut header = Header {
            src_cid: HOST_CID.into(),
            dst_cid: guest_cid.into(),
            src_port: key.host_port.into(),
            dst_port: key.guest_port.into(),
            kind: (self.kind as u16).into(),
            op: (op as u16).into(),
            ..Header::default()
        };
        self.credit.fill_header(&mut header);
        header
    }

    /// Whether there is data for the guest, as far as is known, that may be sent.
    pub(super) fn has_data(&self) -> bool {
        let more = !self.rx_message.0.is_empty() || (self.readable && !self.host_send_shut);
        self.state == State::Established && more && !self.guest_recv_shut
    }

    /// The flags of the `SHUTDOWN` that the guest should get, if it has not got them.
    pub(super) fn shutdown_due(&self) -> Option<u32> {
        let send = if self.host_send_shut { SHUTDOWN_SEND } else { 0 };
        let receive = if self.host_recv_shut { SHUTDOWN_RECEIVE } else { 0 };
        let flags = send | receive;
        (self.state == State::Established && flags & !self.sent_shutdown != 0).then_some(flags)
    }

    /// How much data the guest may be sent now.
    pub(super) fn sendable(&self) -> u32 {
        match (self.kind, self.rx_message.0.len() as u32, self.rx_message.1) {
            // The rest of a message follows, whatever it is cut into: no guest reads a message that
            // is not whole.
            (SocketKind::SeqPacket, _, 1..) => self.credit.free(),
            // A message begins when there is room for all of it, or when there will not be more.
            (SocketKind::SeqPacket, len @ 1.., 0) => {
                let window = self.credit.window();
                if window.is_idle() || window.bytes(1) >= len { self.credit.free() } else { 0 }
            }
            _ => self.credit.sendable(),
        }
    }

    /// Whether there is data that the guest has no room for.
    pub(super) fn is_stalled(&self) -> bool {
        self.has_data() && self.sendable() == 0
    }

    /// Whether the guest should hear how much room it has.
    pub(super) fn credit_update_due(&self) -> bool {
        let due = self.pending.credit_update || self.credit.is_update_due(self.tx_buf.has_partial());
        self.state == State::Established && due
    }

    /// Whether the guest is pending anything that it could get now.
    pub(super) fn has_packets(&self) -> bool {
        self.pending != PendingPackets::default()
            || self.credit_update_due()
            || (self.has_data() && self.sendable() > 0)
            || self.shutdown_due().is_some()
    }

    /// Forgets all that the guest said on it: it will be credit_requests for it again.
    pub(super) fn restart(&mut self) {
        self.tx_buf.clear();
        self.credit = Credit::new(self.credit.buf_alloc());
        self.pending = PendingPackets::default();
    }

    /// The guest sends no more: a message that is not whole never will be.
    pub(super) fn shut_guest_send(&mut self) {
        self.guest_send_shut = true;
        self.credit.record_forwarded(self.tx_buf.remove_partial());
    }

    /// Whether the socket may have more after a read of nothing: that was an empty message then, and not the end.
    pub(super) fn may_have_more(&self) -> bool {
        let Some(socket) = &self.socket else { return false };
        // What the peer sent before it was done is still there.
        !is_peer_send_shut(socket) || ioctl_fionread(socket).is_ok_and(|left| left > 0)
    }

    /// Whether all that the guest sent went to the host.
    pub(super) fn is_flushed(&self) -> bool {
        self.tx_buf.is_empty()
    }

    /// Whether there is a message to write.
    pub(super) fn has_whole_message(&self) -> bool {
        self.tx_buf.has_message()
    }

    /// Keeps what the socket did not take.
    pub(super) fn buffer(&mut self, data: &[u8]) {
        self.tx_buf.add(data);
    }

    /// Keeps a piece of a message, which may be its last.
    pub(super) fn buffer_message(&mut self, data: &[u8], is_last: bool) {
        self.tx_buf.add_piece(data, is_last);
    }

    /// Writes what was kept, as far as the socket takes it.
    pub(super) fn flush(&mut self) -> WriteOutcome {
        let mut sent = 0;
        while let Some(len) = self.next_write() {
            match self.write(len) {
                Ok(0) | Err(Errno::AGAIN) => break,
                Ok(written) => {
                    match self.kind {
                        SocketKind::Stream => self.tx_buf.remove(written),
                        SocketKind::SeqPacket => self.tx_buf.remove_message(),
                    }
                    sent += written as u32;
                }
                Err(Errno::PIPE) => return self.shut_host_recv(),
                Err(_) => return WriteOutcome::Failed,
            }
        }
        self.credit.record_forwarded(sent);
        WriteOutcome::Bytes(sent)
    }

    /// Forgets what is kept for a host that does not want it.
    pub(super) fn shut_host_recv(&mut self) -> WriteOutcome {
        self.host_recv_shut = true;
        self.credit.record_forwarded(self.tx_buf.clear());
        WriteOutcome::PeerClosed
    }

    /// Where the host is gone and nothing that it sent is left or wanted, both its directions are over.
    pub(super) fn close_if_peer_gone(&mut self) {
        let is_read = self.host_send_shut || self.guest_recv_shut;
        if self.hangup && is_read && !self.host_recv_shut && self.is_peer_gone() {
            self.host_send_shut = true;
            self.shut_host_recv();
        }
    }

    /// Whether whoever is at the other end of the socket has closed it, both directions.
    pub(super) fn is_peer_gone(&self) -> bool {
        self.socket.as_ref().is_none_or(peer_is_gone)
    }

    /// How many of the bytes that are kept go in one write.
    fn next_write(&self) -> Option<usize> {
        match self.kind {
            SocketKind::Stream => Some(self.tx_buf.len()).filter(|&len| len > 0),
            SocketKind::SeqPacket => self.tx_buf.first_message(),
        }
    }

    fn write(&self, len: usize) -> Result<usize, Errno> {
        let socket = self.socket.as_ref().ok_or(Errno::PIPE)?;
        let slices = self.tx_buf.first(len);
        let flags = SendFlags::NOSIGNAL | SendFlags::DONTWAIT;
        sendmsg(socket, &slices, &mut SendAncillaryBuffer::default(), flags)
    }

    /// Reads the next message from the socket, by way of `scratch`, which has room for the longest. `Ok(None)`: it is empty, or the end.
    pub(super) fn read_message(&mut self, scratch: &mut [u8]) -> Result<Option<()>, Errno> {
        let socket = self.socket.as_ref().ok_or(Errno::NOTCONN)?;
        let (_, len) = recv(socket, &mut *scratch, RecvFlags::DONTWAIT | RecvFlags::TRUNC)?;
        let message = scratch.get(..len).ok_or(Errno::MSGSIZE)?;
        self.rx_message = (message.to_vec(), 0);
        Ok((len > 0).then_some(()))
    }

    /// Ends one direction of the socket.
    pub(super) fn shut(&self, direction: Shutdown) {
        if let Some(socket) = &self.socket {
            // Where the peer is gone, there is nothing to end.
            let _ = shutdown(socket, direction);
        }
    }
}

/// Whether whoever is at the other end has closed it, both directions.
fn peer_is_gone(socket: impl AsFd) -> bool {
    state_of(socket).intersects(PollFlags::HUP | PollFlags::ERR)
}

/// Whether whoever is at the other end sends no more.
pub(super) fn is_peer_send_shut(socket: impl AsFd) -> bool {
    state_of(socket).intersects(PollFlags::RDHUP | PollFlags::HUP | PollFlags::ERR)
}

fn state_of(socket: impl AsFd) -> PollFlags {
    let mut fds = [PollFd::new(&socket, PollFlags::RDHUP)];
    // The call can fail in no way that says something about the socket.
    let _ = poll(&mut fds, Some(&Timespec { tv_sec: 0, tv_nsec: 0 }));
    fds[0].revents()
}
