//! One connection, and the I/O on its host socket.

use std::os::fd::{AsFd, OwnedFd};
use std::sync::Arc;

use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::io::{Errno, ioctl_fionread};
use rustix::net::{RecvFlags, SendAncillaryBuffer, SendFlags, Shutdown, recv, sendmsg, shutdown};
use virtio::worker::Nanos;

use crate::credit::Credit;
use crate::packet::{HOST_CID, Header, Op, SHUTDOWN_RECEIVE, SHUTDOWN_SEND, SocketKind};
use crate::tx_buf::TxBuf;

/// Longest message in bytes, in both directions. A message is buffered until it is complete.
pub(crate) const MAX_MESSAGE: u32 = 64 << 10;

/// The pair of ports that identifies a connection.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub(crate) struct Key {
    pub(crate) host_port: u32,
    pub(crate) guest_port: u32,
}

/// A server on the host: its port and socket type.
pub(crate) type ServerKey = (u32, SocketKind);

/// The state of a connection.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum State {
    /// A host client is connected and has not sent its complete `CONNECT` line.
    AwaitingConnect,
    /// The guest has requested it, and the host server's backlog is full.
    Connecting,
    /// The request is, or will be, sent to the guest, which has not answered it.
    Requested,
    /// The guest has accepted it while a transport reset was pending, which may end it. The client
    /// has no reply yet.
    Held,
    /// Accepted by both sides: data flows.
    Established,
    /// The host is done with it. The guest was sent a full shutdown and has not reset it yet.
    Closing,
    /// The guest is done with it. The host socket still takes data that the guest has sent.
    Lingering,
}

/// Packets without data that are to be sent to the guest.
#[expect(clippy::struct_excessive_bools, reason = "each is a packet, and any of them may be pending")]
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub(crate) struct PendingPackets {
    pub(crate) request: bool,
    pub(crate) response: bool,
    pub(crate) credit_update: bool,
    pub(crate) credit_request: bool,
}

/// The result of writing to a host socket.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum WriteOutcome {
    /// This many bytes were written. If that is not all, the socket is full.
    Bytes(u32),
    /// The host peer receives no more data.
    PeerClosed,
    /// The socket is broken.
    Failed,
}

/// A message that is sent to the guest in pieces. Empty if there is none.
#[derive(Debug, Default)]
pub(crate) struct RxMessage {
    pub(crate) data: Vec<u8>,
    /// How many bytes of it the guest was sent.
    pub(crate) sent: u32,
}

/// A connection.
#[expect(clippy::struct_excessive_bools, reason = "each side ends each direction on its own")]
#[derive(Debug)]
pub(crate) struct Connection {
    pub(crate) kind: SocketKind,
    pub(crate) state: State,
    /// `None` before the ports are known, and after the guest may reuse them.
    pub(crate) key: Option<Key>,
    pub(crate) credit: Credit,
    pub(crate) deadline: Option<Nanos>,
    /// Its place among the connections that wait for the same host server.
    pub(crate) ticket: Option<u64>,
    /// The host socket. `None` before it is connected, and after it is closed.
    pub(crate) socket: Option<Arc<OwnedFd>>,
    pub(crate) pending: PendingPackets,
    /// Data that the guest has sent and the socket has not taken.
    tx_buf: TxBuf,
    pub(crate) rx_message: RxMessage,
    /// The socket is full, and is watched for becoming writable.
    pub(crate) blocked: bool,
    /// The socket may have data to read.
    pub(crate) readable: bool,
    /// The host peer has closed one or both directions. Data that it sent before may be unread.
    pub(crate) hangup: bool,
    /// Bytes to read at once, adapted to what the last reads returned.
    pub(crate) read_size: u32,
    /// The host peer sends no more, and the guest was sent all of its data.
    pub(crate) host_send_shut: bool,
    /// The host peer receives no more.
    pub(crate) host_recv_shut: bool,
    /// The guest sends no more.
    pub(crate) guest_send_shut: bool,
    /// The guest receives no more.
    pub(crate) guest_recv_shut: bool,
    /// Number of credit requests to the guest since it last had credit.
    pub(crate) credit_requests: u32,
    /// Flags of the last `SHUTDOWN` that the guest was sent.
    pub(crate) sent_shutdown: u32,
}

impl Connection {
    pub(crate) fn new(kind: SocketKind, state: State, buf_alloc: u32) -> Self {
        Connection {
            kind,
            state,
            key: None,
            credit: Credit::new(buf_alloc),
            deadline: None,
            ticket: None,
            socket: None,
            pending: PendingPackets::default(),
            tx_buf: TxBuf::new(buf_alloc),
            rx_message: RxMessage::default(),
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

    /// The host server of a connection that the guest has requested.
    pub(crate) fn server(&self) -> Option<ServerKey> {
        self.key.map(|key| (key.host_port, self.kind))
    }

    /// Maximum number of bytes that it buffers.
    pub(crate) fn max_buffered(&self) -> u64 {
        let from_guest = u64::from(self.credit.buf_alloc());
        match self.kind {
            SocketKind::Stream => from_guest,
            // The guest's messages, their lengths, and one message to the guest.
            SocketKind::SeqPacket => 2 * from_guest + u64::from(MAX_MESSAGE),
        }
    }

    /// A header for a packet to the guest, with the current credit.
    pub(crate) fn header(&mut self, op: Op, guest_cid: u64) -> Header {
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

    /// Whether there may be data that the guest wants.
    pub(crate) fn has_data(&self) -> bool {
        let more = !self.rx_message.data.is_empty() || (self.readable && !self.host_send_shut);
        self.state == State::Established && more && !self.guest_recv_shut
    }

    /// The flags of the `SHUTDOWN` to send to the guest, unless it was sent all of them.
    pub(crate) fn shutdown_due(&self) -> Option<u32> {
        let send = if self.host_send_shut { SHUTDOWN_SEND } else { 0 };
        let receive = if self.host_recv_shut { SHUTDOWN_RECEIVE } else { 0 };
        let flags = send | receive;
        (self.state == State::Established && flags & !self.sent_shutdown != 0).then_some(flags)
    }

    /// Bytes of data that may be sent to the guest now.
    pub(crate) fn sendable(&self) -> u32 {
        match (self.kind, self.rx_message.data.len() as u32, self.rx_message.sent) {
            // Packet overhead does not stop a message that has begun: the guest cannot read a
            // message, and so free memory, before it is complete.
            (SocketKind::SeqPacket, _, 1..) => self.credit.free(),
            // A message begins once all of it fits, or if the guest has nothing unread, so that no
            // more memory will become free.
            (SocketKind::SeqPacket, len @ 1.., 0) => {
                let window = self.credit.window();
                if window.is_idle() || window.bytes(1) >= len { self.credit.free() } else { 0 }
            }
            _ => self.credit.sendable(),
        }
    }

    /// Whether there is data that the guest has no credit for.
    pub(crate) fn is_stalled(&self) -> bool {
        self.has_data() && self.sendable() == 0
    }

    /// Whether the guest is to be sent a credit update.
    pub(crate) fn credit_update_due(&self) -> bool {
        let due = self.pending.credit_update || self.credit.is_update_due(self.tx_buf.has_partial());
        self.state == State::Established && due
    }

    /// Whether there is a packet that could be sent to the guest now.
    pub(crate) fn has_packets(&self) -> bool {
        self.pending != PendingPackets::default()
            || self.credit_update_due()
            || (self.has_data() && self.sendable() > 0)
            || self.shutdown_due().is_some()
    }

    /// Drops everything that the guest has sent on it: the connection will be requested again.
    pub(crate) fn restart(&mut self) {
        self.tx_buf.clear();
        self.credit = Credit::new(self.credit.buf_alloc());
        self.pending = PendingPackets::default();
    }

    /// The guest sends no more: drops an incomplete message.
    pub(crate) fn shut_guest_send(&mut self) {
        self.guest_send_shut = true;
        self.credit.record_forwarded(self.tx_buf.remove_partial());
    }

    /// Whether the socket may have more data after a read of 0 bytes. If so, that was an empty
    /// message and not the end.
    pub(crate) fn may_have_more(&self) -> bool {
        let Some(socket) = &self.socket else { return false };
        // Data that the peer sent before it closed is still in the socket.
        !is_peer_send_shut(socket) || ioctl_fionread(socket).is_ok_and(|left| left > 0)
    }

    /// Whether all data of the guest was written to the socket.
    pub(crate) fn is_flushed(&self) -> bool {
        self.tx_buf.is_empty()
    }

    /// Whether there is a complete message to write.
    pub(crate) fn has_whole_message(&self) -> bool {
        self.tx_buf.has_message()
    }

    /// Buffers stream data that the socket did not take.
    pub(crate) fn buffer(&mut self, data: &[u8]) {
        self.tx_buf.add(data);
    }

    /// Buffers a part of a message.
    pub(crate) fn buffer_message(&mut self, data: &[u8], is_last: bool) {
        self.tx_buf.add_piece(data, is_last);
    }

    /// Writes buffered data until the socket is full.
    pub(crate) fn flush(&mut self) -> WriteOutcome {
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

    /// The host peer receives no more: drops buffered data.
    pub(crate) fn shut_host_recv(&mut self) -> WriteOutcome {
        self.host_recv_shut = true;
        self.credit.record_forwarded(self.tx_buf.clear());
        WriteOutcome::PeerClosed
    }

    /// Ends both directions of the host if its peer has closed the socket and none of its data is
    /// left that the guest wants.
    pub(crate) fn close_if_peer_gone(&mut self) {
        let is_read = self.host_send_shut || self.guest_recv_shut;
        if self.hangup && is_read && !self.host_recv_shut && self.is_peer_gone() {
            self.host_send_shut = true;
            self.shut_host_recv();
        }
    }

    /// Whether the host peer has closed both directions of the socket.
    pub(crate) fn is_peer_gone(&self) -> bool {
        self.socket.as_ref().is_none_or(is_closed_by_peer)
    }

    /// Number of buffered bytes for the next write.
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

    /// Reads the next message from the socket into `rx_message`, through `scratch`, which is
    /// [`MAX_MESSAGE`] bytes long. `Ok(None)`: an empty message, or the end. `EMSGSIZE`: the
    /// message is too long.
    pub(crate) fn read_message(&mut self, scratch: &mut [u8]) -> Result<Option<()>, Errno> {
        let socket = self.socket.as_ref().ok_or(Errno::NOTCONN)?;
        let (_, len) = recv(socket, &mut *scratch, RecvFlags::DONTWAIT | RecvFlags::TRUNC)?;
        let message = scratch.get(..len).ok_or(Errno::MSGSIZE)?;
        self.rx_message = RxMessage { data: message.to_vec(), sent: 0 };
        Ok((len > 0).then_some(()))
    }

    /// Ends one direction of the socket.
    pub(crate) fn shut(&self, direction: Shutdown) {
        if let Some(socket) = &self.socket {
            // Fails if the peer is gone, when there is nothing left to end.
            let _ = shutdown(socket, direction);
        }
    }
}

/// Whether the peer of `socket` has closed both directions.
fn is_closed_by_peer(socket: impl AsFd) -> bool {
    poll_hangup(socket).intersects(PollFlags::HUP | PollFlags::ERR)
}

/// Whether the peer of `socket` sends no more.
pub(crate) fn is_peer_send_shut(socket: impl AsFd) -> bool {
    poll_hangup(socket).intersects(PollFlags::RDHUP | PollFlags::HUP | PollFlags::ERR)
}

fn poll_hangup(socket: impl AsFd) -> PollFlags {
    let mut fds = [PollFd::new(&socket, PollFlags::RDHUP)];
    // No error of this call says anything about the socket.
    let _ = poll(&mut fds, Some(&Timespec { tv_sec: 0, tv_nsec: 0 }));
    fds[0].revents()
}
