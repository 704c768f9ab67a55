//! One connection, and what goes on between it and its host socket.

use std::os::fd::{AsFd, OwnedFd};
use std::sync::Arc;

use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::io::{Errno, ioctl_fionread};
use rustix::net::{RecvFlags, SendAncillaryBuffer, SendFlags, Shutdown, recv, sendmsg, shutdown};

use super::backlog::Backlog;
use super::credit::Credit;
use super::packet::{HOST_CID, Header, Op, SHUTDOWN_RECEIVE, SHUTDOWN_SEND, SocketKind};
use super::table::Server;
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
    Greeting,
    /// The guest wants it, and whoever serves the port has no time yet.
    Dialing,
    /// The guest is asked and has not answered.
    Requested,
    /// The guest took it, maybe before it handled a reset of all connections, which would end it:
    /// the client is not answered yet.
    Held,
    /// Data flows.
    Open,
    /// The host is done with it, the guest was told, and has not forgotten it yet.
    Closing,
    /// The guest is done with it; the host still takes what the guest has sent.
    Lingering,
}

/// Packets without data that the guest is owed.
#[expect(clippy::struct_excessive_bools, reason = "each is a packet, and any of them may be owed")]
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub(super) struct Owed {
    pub(super) request: bool,
    pub(super) response: bool,
    pub(super) credit_update: bool,
    pub(super) credit_request: bool,
}

/// What came of writing to a host socket.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Written {
    /// So many bytes went; the socket takes no more for now if it is fewer than there were.
    Bytes(u32),
    /// Whoever is there takes nothing any more.
    Deaf,
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
    /// Its turn at the server that it waits for.
    pub(super) turn: Option<u64>,
    /// None where there is none yet or any more.
    pub(super) socket: Option<Arc<OwnedFd>>,
    pub(super) owed: Owed,
    /// What the guest sent and the socket has not taken.
    to_host: Backlog,
    /// A message that the guest gets in pieces, and how much of it went.
    pub(super) to_guest: (Vec<u8>, u32),
    /// The socket takes nothing for now, and is watched for when it does.
    pub(super) blocked: bool,
    /// The socket may have something to read.
    pub(super) readable: bool,
    /// Its peer hung up, wholly or in part, which a read will tell after what it sent.
    pub(super) hangup: bool,
    /// How much to read at once: what the last reads were like.
    pub(super) appetite: u32,
    /// The host sends no more, and all it sent was given to the guest.
    pub(super) host_done: bool,
    /// The host takes no more.
    pub(super) host_deaf: bool,
    /// The guest sends no more.
    pub(super) guest_done: bool,
    /// The guest takes no more.
    pub(super) guest_deaf: bool,
    /// How often in a row the guest was asked for room.
    pub(super) asked: u32,
    /// Flags of the last `SHUTDOWN` that the guest got.
    pub(super) told: u32,
}

impl Connection {
    pub(super) fn new(kind: SocketKind, state: State, promised: u32) -> Self {
        Connection {
            kind,
            state,
            key: None,
            credit: Credit::new(promised),
            deadline: None,
            turn: None,
            socket: None,
            owed: Owed::default(),
            to_host: Backlog::new(promised),
            to_guest: (Vec::new(), 0),
            blocked: false,
            readable: false,
            hangup: false,
            appetite: 0,
            host_done: false,
            host_deaf: false,
            guest_done: false,
            guest_deaf: false,
            asked: 0,
            told: 0,
        }
    }

    /// The host server that a connection of the guest goes to.
    pub(super) fn server(&self) -> Option<Server> {
        self.key.map(|key| (key.host_port, self.kind))
    }

    /// The most bytes that it can be made to keep.
    pub(super) fn most_kept(&self) -> u64 {
        let from_guest = u64::from(self.credit.promised());
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
        self.credit.tell(&mut header);
        header
    }

    /// Whether there is data for the guest, as far as is known, that may be sent.
    pub(super) fn has_data(&self) -> bool {
        let more = !self.to_guest.0.is_empty() || (self.readable && !self.host_done);
        self.state == State::Open && more && !self.guest_deaf
    }

    /// The flags of the `SHUTDOWN` that the guest should get, if it has not got them.
    pub(super) fn shutdown_due(&self) -> Option<u32> {
        let send = if self.host_done { SHUTDOWN_SEND } else { 0 };
        let receive = if self.host_deaf { SHUTDOWN_RECEIVE } else { 0 };
        let flags = send | receive;
        (self.state == State::Open && flags & !self.told != 0).then_some(flags)
    }

    /// How much data the guest may be sent now.
    pub(super) fn sendable(&self) -> u32 {
        match (self.kind, self.to_guest.0.len() as u32, self.to_guest.1) {
            // The rest of a message follows, whatever it is cut into: no guest reads a message that
            // is not whole.
            (SocketKind::SeqPacket, _, 1..) => self.credit.payload(),
            // A message begins when there is room for all of it, or when there will not be more.
            (SocketKind::SeqPacket, len @ 1.., 0) => {
                let window = self.credit.window();
                if window.is_idle() || window.bytes(1) >= len { self.credit.payload() } else { 0 }
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
        let due = self.owed.credit_update || self.credit.is_update_due(self.to_host.has_partial());
        self.state == State::Open && due
    }

    /// Whether the guest is owed anything that it could get now.
    pub(super) fn wants_turn(&self) -> bool {
        self.owed != Owed::default()
            || self.credit_update_due()
            || (self.has_data() && self.sendable() > 0)
            || self.shutdown_due().is_some()
    }

    /// Forgets all that the guest said on it: it will be asked for it again.
    pub(super) fn begin_again(&mut self) {
        self.to_host.clear();
        self.credit = Credit::new(self.credit.promised());
        self.owed = Owed::default();
    }

    /// The guest sends no more: a message that is not whole never will be.
    pub(super) fn end_of_guest(&mut self) {
        self.guest_done = true;
        self.credit.forward(self.to_host.remove_partial());
    }

    /// Whether the socket may have more after a read of nothing: that was an empty message then, and not the end.
    pub(super) fn may_have_more(&self) -> bool {
        let Some(socket) = &self.socket else { return false };
        // What the peer sent before it was done is still there.
        !peer_is_done(socket) || ioctl_fionread(socket).is_ok_and(|left| left > 0)
    }

    /// Whether all that the guest sent went to the host.
    pub(super) fn is_flushed(&self) -> bool {
        self.to_host.is_empty()
    }

    /// Whether there is a message to write.
    pub(super) fn has_whole_message(&self) -> bool {
        self.to_host.has_message()
    }

    /// Keeps what the socket did not take.
    pub(super) fn keep(&mut self, data: &[u8]) {
        self.to_host.add(data);
    }

    /// Keeps a piece of a message, which may be its last.
    pub(super) fn keep_message(&mut self, data: &[u8], is_last: bool) {
        self.to_host.add_piece(data, is_last);
    }

    /// Writes what was kept, as far as the socket takes it.
    pub(super) fn flush(&mut self) -> Written {
        let mut sent = 0;
        while let Some(len) = self.next_write() {
            match self.write(len) {
                Ok(0) | Err(Errno::AGAIN) => break,
                Ok(written) => {
                    match self.kind {
                        SocketKind::Stream => self.to_host.remove(written),
                        SocketKind::SeqPacket => self.to_host.remove_message(),
                    }
                    sent += written as u32;
                }
                Err(Errno::PIPE) => return self.deafen(),
                Err(_) => return Written::Failed,
            }
        }
        self.credit.forward(sent);
        Written::Bytes(sent)
    }

    /// Forgets what is kept for a host that does not want it.
    pub(super) fn deafen(&mut self) -> Written {
        self.host_deaf = true;
        self.credit.forward(self.to_host.clear());
        Written::Deaf
    }

    /// Where the host is gone and nothing that it sent is left or wanted, both its directions are over.
    pub(super) fn settle(&mut self) {
        let is_read = self.host_done || self.guest_deaf;
        if self.hangup && is_read && !self.host_deaf && self.is_peer_gone() {
            self.host_done = true;
            self.deafen();
        }
    }

    /// Whether whoever is at the other end of the socket has closed it, both directions.
    pub(super) fn is_peer_gone(&self) -> bool {
        self.socket.as_ref().is_none_or(peer_is_gone)
    }

    /// How many of the bytes that are kept go in one write.
    fn next_write(&self) -> Option<usize> {
        match self.kind {
            SocketKind::Stream => Some(self.to_host.len()).filter(|&len| len > 0),
            SocketKind::SeqPacket => self.to_host.first_message(),
        }
    }

    fn write(&self, len: usize) -> Result<usize, Errno> {
        let socket = self.socket.as_ref().ok_or(Errno::PIPE)?;
        let slices = self.to_host.first(len);
        let flags = SendFlags::NOSIGNAL | SendFlags::DONTWAIT;
        sendmsg(socket, &slices, &mut SendAncillaryBuffer::default(), flags)
    }

    /// Reads the next message from the socket, by way of `scratch`, which has room for the longest. `Ok(None)`: it is empty, or the end.
    pub(super) fn read_message(&mut self, scratch: &mut [u8]) -> Result<Option<()>, Errno> {
        let socket = self.socket.as_ref().ok_or(Errno::NOTCONN)?;
        let (_, len) = recv(socket, &mut *scratch, RecvFlags::DONTWAIT | RecvFlags::TRUNC)?;
        let message = scratch.get(..len).ok_or(Errno::MSGSIZE)?;
        self.to_guest = (message.to_vec(), 0);
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
pub(super) fn peer_is_done(socket: impl AsFd) -> bool {
    state_of(socket).intersects(PollFlags::RDHUP | PollFlags::HUP | PollFlags::ERR)
}

fn state_of(socket: impl AsFd) -> PollFlags {
    let mut fds = [PollFd::new(&socket, PollFlags::RDHUP)];
    // The call can fail in no way that says something about the socket.
    let _ = poll(&mut fds, Some(&Timespec { tv_sec: 0, tv_nsec: 0 }));
    fds[0].revents()
}
