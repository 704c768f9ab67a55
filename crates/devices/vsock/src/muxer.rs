//! All state between the queues and the host sockets, and how connections begin and end.
//!
//! The methods for events are in other modules: packets from the guest in `from_guest`, host events
//! in `from_host`, deadlines in `timers`. `to_guest` sends the packets that are due.

use std::collections::VecDeque;
use std::os::fd::{AsRawFd, OwnedFd};
use std::sync::Arc;

use memory::GuestRam;
use memory::iovec::GuestIoVec;
use rustix::net::Shutdown;
use rustix::process::{Resource, getrlimit};
use virtio::worker::{Context, Interest, Nanos};

use crate::connection::{Connection, Key, MAX_MESSAGE, ServerKey, State, WriteOutcome};
use crate::host_sockets::HostSockets;
use crate::packet::{HOST_CID, Header, Op, SocketKind};
use crate::shared::Shared;
use crate::table::{MAX_CONNECTIONS, Slot, Table};

pub(crate) const MS: Nanos = 1_000_000;
/// How long the guest may take to reset a connection that it was sent a full shutdown of.
const CLOSE_TIMEOUT: Nanos = 10_000 * MS;
/// How long the guest may have no credit before it is sent a credit request. Each further request
/// takes twice as long as the last one.
const CREDIT_REQUEST_DELAY: Nanos = 200 * MS;
/// How often the delay is doubled at most.
const MAX_DOUBLINGS: u32 = 8;

/// File descriptors below the process's limit that connections must not take.
const RESERVED_FDS: u64 = 64;
/// Maximum number of resets that wait to be sent. Further ones are dropped.
const MAX_RESETS: usize = 2 * MAX_CONNECTIONS;

/// Token of the first listener. Smaller tokens are slots of connections.
pub(crate) const FIRST_LISTENER: u32 = MAX_CONNECTIONS as u32;

/// A reset that is to be sent to the guest. Its connection need not exist.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Reset {
    pub(crate) src_cid: u64,
    pub(crate) key: Key,
    pub(crate) kind: u16,
}

impl Reset {
    pub(crate) fn header(self, guest_cid: u64) -> Header {
        Header {
            src_cid: self.src_cid.into(),
            dst_cid: guest_cid.into(),
            src_port: self.key.host_port.into(),
            dst_port: self.key.guest_port.into(),
            kind: self.kind.into(),
            op: (Op::Rst as u16).into(),
            ..Header::default()
        }
    }
}

/// All state between the queues and the host sockets.
pub(crate) struct Muxer {
    pub(crate) guest_cid: u64,
    pub(crate) shared: Arc<Shared>,
    pub(crate) sockets: HostSockets,
    pub(crate) table: Table,
    /// Resets that wait to be sent.
    pub(crate) resets: VecDeque<Reset>,
    /// Guest buffers for one socket call. Reused.
    pub(crate) iovec: GuestIoVec,
    /// Buffer for copies of data. Reused.
    pub(crate) scratch: Vec<u8>,
    pub(crate) ram: GuestRam,
    /// `VIRTIO_VSOCK_F_SEQPACKET` was negotiated.
    pub(crate) seqpacket: bool,
    /// For each listener, whether it may have pending connections.
    pub(crate) acceptable: Vec<bool>,
    /// The device is broken: host clients are closed at once.
    pub(crate) is_closed: bool,
    /// The guest was sent a transport reset and may not have handled it yet.
    pub(crate) is_reset_pending: bool,
    /// File descriptors ran out: when to accept again.
    pub(crate) accept_retry_at: Option<Nanos>,
    /// When to retry servers whose backlog was full.
    pub(crate) connect_retry_at: Option<Nanos>,
    /// The server that was retried last.
    pub(crate) last_retried: Option<ServerKey>,
    /// File descriptors from this number on must not be used for connections.
    fd_limit: u64,
}

impl Muxer {
    pub(crate) fn new(
        guest_cid: u32,
        shared: Arc<Shared>,
        sockets: HostSockets,
        ram: GuestRam,
        seqpacket: bool,
    ) -> Self {
        let fd_limit = getrlimit(Resource::Nofile).current.unwrap_or(u64::MAX);
        Muxer {
            guest_cid: guest_cid.into(),
            shared,
            table: Table::default(),
            resets: VecDeque::new(),
            iovec: GuestIoVec::new(),
            scratch: Vec::new(),
            ram,
            seqpacket,
            acceptable: vec![true; sockets.listeners.len()],
            sockets,
            is_closed: false,
            is_reset_pending: false,
            accept_retry_at: None,
            connect_retry_at: None,
            last_retried: None,
            fd_limit: fd_limit.saturating_sub(RESERVED_FDS),
        }
    }

    /// Appends a connection to the ready queue if it has packets for the guest.
    pub(crate) fn schedule(&mut self, cx: &mut Context<'_>, slot: Slot) {
        if self.table.get(slot).is_some_and(|connection| connection.has_packets()) {
            self.table.enqueue(slot);
        }
        self.watch_stall(cx, slot);
    }

    /// Sets a deadline for a credit request if the guest has no credit. Usually the guest sends a
    /// credit update before that.
    pub(crate) fn watch_stall(&mut self, cx: &mut Context<'_>, slot: Slot) {
        let stalled = self.table.get(slot).filter(|c| c.deadline.is_none() && c.is_stalled());
        if let Some(requests) = stalled.map(|c| c.credit_requests) {
            let delay = CREDIT_REQUEST_DELAY << requests.min(MAX_DOUBLINGS);
            let deadline = cx.now().saturating_add(delay);
            self.table.set_deadline(slot, Some(deadline));
        }
    }

    pub(crate) fn queue_reset(&mut self, reset: Reset) {
        // Only a guest that gives no buffers for resets gets this far.
        if self.resets.len() < MAX_RESETS {
            self.resets.push_back(reset);
        }
    }

    /// Answers a packet of a connection that does not exist with a reset, unless it is one itself.
    pub(crate) fn reply_reset(&mut self, header: &Header) {
        if header.op.get() != Op::Rst as u16 {
            self.queue_reset(Reset {
                src_cid: header.dst_cid.get(),
                key: Key { host_port: header.dst_port.get(), guest_port: header.src_port.get() },
                kind: header.kind.get(),
            });
        }
    }

    /// Updates a connection after a write to its host socket.
    pub(crate) fn written(&mut self, cx: &mut Context<'_>, slot: Slot, outcome: WriteOutcome) {
        let Some(connection) = self.table.get(slot) else { return };
        if outcome == WriteOutcome::Failed {
            self.shared.stats.tx_write_fails.add(1);
            return self.kill(cx, slot);
        }
        let blocked = !connection.is_flushed() && !has_partial_message_only(connection);
        if blocked != connection.blocked {
            connection.blocked = blocked;
            let interest = if blocked { Interest::BOTH } else { Interest::READ };
            if cx.change_edge(slot, interest).is_err() {
                return self.kill(cx, slot);
            }
        }
        if connection.is_flushed() {
            if connection.state == State::Lingering {
                self.remove(cx, slot);
            } else if connection.guest_send_shut {
                connection.shut(Shutdown::Write);
            }
        }
    }

    /// Whether this socket is below the file descriptor limit for connections.
    pub(crate) fn is_below_fd_limit(&self, socket: &OwnedFd) -> bool {
        u64::from(socket.as_raw_fd().cast_unsigned()) < self.fd_limit
    }

    /// Sets the host socket of a connection. False if it cannot be watched.
    pub(crate) fn set_socket(&mut self, cx: &mut Context<'_>, slot: Slot, socket: OwnedFd) -> bool {
        let socket = Arc::new(socket);
        let watched = cx.watch_shared(slot, &socket, Interest::READ).is_ok();
        if let Some(connection) = self.table.get(slot).filter(|_| watched) {
            connection.socket = Some(socket);
        }
        watched
    }

    /// Closes the host socket of a connection.
    pub(crate) fn close_socket(&mut self, cx: &mut Context<'_>, slot: Slot) {
        if let Some(connection) = self.table.get(slot)
            && connection.socket.take().is_some()
        {
            connection.blocked = false;
            cx.unwatch(slot);
        }
    }

    /// Closes the host's side of a connection after the guest was sent a full shutdown. The guest
    /// has [`CLOSE_TIMEOUT`] to reset it.
    pub(crate) fn close(&mut self, cx: &mut Context<'_>, slot: Slot) {
        self.close_socket(cx, slot);
        let deadline = cx.now().saturating_add(CLOSE_TIMEOUT);
        self.table.set_deadline(slot, Some(deadline));
        if let Some(connection) = self.table.get(slot) {
            connection.state = State::Closing;
        }
    }

    /// Resets a connection on both sides, and counts it as killed.
    pub(crate) fn kill(&mut self, cx: &mut Context<'_>, slot: Slot) {
        self.shared.stats.conns_killed.add(1);
        self.reset(cx, slot);
    }

    /// Refuses a connection that the guest has requested.
    pub(crate) fn refuse_connection(&mut self, cx: &mut Context<'_>, slot: Slot) {
        self.shared.stats.conns_refused.add(1);
        self.reset(cx, slot);
    }

    fn reset(&mut self, cx: &mut Context<'_>, slot: Slot) {
        // The guest does not know a connection whose request was not sent.
        if let Some(connection) = self.table.get(slot)
            && connection.key.is_some()
            && !connection.pending.request
        {
            let reset = reset_of(connection);
            self.queue_reset(reset);
        }
        self.remove(cx, slot);
    }

    /// Removes a connection without a packet to the guest.
    pub(crate) fn remove(&mut self, cx: &mut Context<'_>, slot: Slot) {
        self.close_socket(cx, slot);
        if self.table.remove(slot).is_some() {
            self.shared.stats.conns_removed.add(1);
            // A file descriptor has become free.
            self.accept_retry_at = None;
        }
    }

    /// Removes all connections without a packet to the guest, and drops all resets.
    pub(crate) fn clear(&mut self, cx: &mut Context<'_>) {
        for slot in self.table.all() {
            self.remove(cx, slot);
        }
        self.resets.clear();
    }
}

/// The reset that ends a connection.
pub(crate) fn reset_of(connection: &Connection) -> Reset {
    let key = connection.key.unwrap_or(Key { host_port: 0, guest_port: 0 });
    Reset { src_cid: HOST_CID, key, kind: connection.kind as u16 }
}

/// Whether nothing is buffered but the beginning of a message.
fn has_partial_message_only(connection: &Connection) -> bool {
    connection.kind == SocketKind::SeqPacket && !connection.has_whole_message()
}

/// Resizes `scratch` to hold the longest message.
pub(crate) fn message_buffer(scratch: &mut Vec<u8>) -> &mut [u8] {
    scratch.resize(MAX_MESSAGE as usize, 0);
    scratch
}
