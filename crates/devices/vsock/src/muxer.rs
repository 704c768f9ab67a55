//! All that there is between the queues and the host's sockets, and how connections begin and end in it.
//!
//! What the guest's packets do to it is in [`from_guest`](super::from_guest), what the host's events do in
//! [`from_host`](super::from_host).

use std::collections::VecDeque;
use std::os::fd::{AsRawFd, OwnedFd};
use std::sync::Arc;

use memory::GuestRam;
use rustix::net::Shutdown;
use rustix::process::{Resource, getrlimit};

use super::Shared;
use super::connection::{Connection, Key, MAX_MESSAGE, State, WriteOutcome};
use super::guest_io::Segments;
use super::packet::{HOST_CID, Header, Op, SocketKind};
use super::listener::HostSockets;
use super::table::{MAX_CONNECTIONS, ServerKey, Slot, Table};
use virtio::worker::{Context, Interest, Nanos};

const MS: Nanos = 1_000_000;
/// How long the guest may take to forget a connection that the host is done with.
const CLOSE_TIMEOUT: Nanos = 10_000 * MS;
/// How long a guest may have no room before it is requests for some; each time twice as long as before.
const CREDIT_REQUEST_DELAY: Nanos = 200 * MS;
/// How often that gets longer.
const MAX_DOUBLINGS: u32 = 8;

/// The last descriptors that a process may have are not for connections.
const RESERVED_FDS: u64 = 64;
/// Resets that wait to be told; those above it are not told.
const MAX_RESETS: usize = 2 * MAX_CONNECTIONS;

/// Tokens of listeners come after those of connections.
pub(super) const FIRST_LISTENER: u32 = MAX_CONNECTIONS as u32;

/// The guest is to hear that there is no such connection.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Reset {
    pub(super) src_cid: u64,
    pub(super) key: Key,
    pub(super) kind: u16,
}

impl Reset {
    pub(super) fn header(self, guest_cid: u64) -> Header {
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

/// Everything but the queues.
pub(super) struct Muxer {
    pub(super) guest_cid: u64,
    pub(super) shared: Arc<Shared>,
    pub(super) sockets: HostSockets,
    pub(super) table: Table,
    pub(super) resets: VecDeque<Reset>,
    pub(super) segments: Segments,
    pub(super) scratch: Vec<u8>,
    pub(super) ram: GuestRam,
    pub(super) seqpacket: bool,
    /// For each listener, whether somebody may wait at it.
    pub(super) waiting: Vec<bool>,
    /// Host clients are turned away: nobody serves them.
    pub(super) is_closed: bool,
    /// The guest was told of a reset of all connections, and may not have handled it.
    pub(super) is_reset_pending: bool,
    /// Descriptors ran out: when to accept again.
    pub(super) accept_retry_at: Option<Nanos>,
    /// When to try servers again that had no time, and the one that was tried last.
    pub(super) connect_retry_at: Option<Nanos>,
    pub(super) last_retried: Option<ServerKey>,
    /// Descriptors from this number on are not for connections.
    fd_limit: u64,
}

impl Muxer {
    pub(super) fn new(
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
            segments: Segments::new(ram.clone()),
            scratch: Vec::new(),
            ram,
            seqpacket,
            waiting: vec![true; sockets.listeners.len()],
            sockets,
            is_closed: false,
            is_reset_pending: false,
            accept_retry_at: None,
            connect_retry_at: None,
            last_retried: None,
            fd_limit: fd_limit.saturating_sub(RESERVED_FDS),
        }
    }

    /// Puts a connection in line if there is anything for the guest.
    pub(super) fn schedule(&mut self, cx: &mut Context<'_>, slot: Slot) {
        if self.table.get(slot).is_some_and(|connection| connection.has_packets()) {
            self.table.enqueue(slot);
        }
        self.watch_stall(cx, slot);
    }

    /// A guest that has no room usually says when it has some. If it does not, it will be requests.
    pub(super) fn watch_stall(&mut self, cx: &mut Context<'_>, slot: Slot) {
        let stalled = self.table.get(slot).filter(|c| c.deadline.is_none() && c.is_stalled());
        if let Some(requests) = stalled.map(|c| c.credit_requests) {
            let deadline = cx.now().saturating_add(CREDIT_REQUEST_DELAY << requests.min(MAX_DOUBLINGS));
            self.table.set_deadline(slot, Some(deadline));
        }
    }

    /// The guest had no room for some time.
    fn request_credit(&mut self, cx: &mut Context<'_>, slot: Slot) {
        if let Some(connection) = self.table.get(slot).filter(|c| c.is_stalled()) {
            connection.pending.credit_request = true;
            connection.credit_requests = connection.credit_requests.saturating_add(1);
            self.schedule(cx, slot);
        }
    }

    pub(super) fn queue_reset(&mut self, reset: Reset) {
        // A guest that asks for resets and does not take them does without.
        if self.resets.len() < MAX_RESETS {
            self.resets.push_back(reset);
        }
    }

    /// What follows from a write to a host socket.
    pub(super) fn written(&mut self, cx: &mut Context<'_>, slot: Slot, written: WriteOutcome) {
        let Some(connection) = self.table.get(slot) else { return };
        if written == WriteOutcome::Failed {
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

    /// What is due by now.
    pub(super) fn timers(&mut self, cx: &mut Context<'_>) {
        let now = cx.now();
        if self.accept_retry_at.is_some_and(|at| at <= now) {
            self.accept_retry_at = None;
        }
        if self.connect_retry_at.is_some_and(|at| at <= now) {
            self.retry_connects(cx);
        }
        while let Some(slot) = self.table.expired(now) {
            match self.table.get(slot).map(|connection| connection.state) {
                Some(State::Connecting) => self.refuse_connection(cx, slot),
                Some(State::Established) => self.request_credit(cx, slot),
                Some(_) => self.kill(cx, slot),
                None => {}
            }
        }
    }

    /// When [`Muxer::timers`] is to be called.
    pub(super) fn next_timer(&self) -> Option<Nanos> {
        let connect_retry_at = self.connect_retry_at.filter(|_| self.table.servers() > 0);
        [self.accept_retry_at, connect_retry_at, self.table.next_deadline()].into_iter().flatten().min()
    }

    /// Time in which nobody could do anything is over.
    pub(super) fn postpone(&mut self, by: Nanos) {
        self.table.postpone(by);
    }

    /// Whether there are descriptors left for connections.
    pub(super) fn is_below_fd_limit(&self, socket: &OwnedFd) -> bool {
        u64::from(socket.as_raw_fd().cast_unsigned()) < self.fd_limit
    }

    /// Gives a connection its socket. False if that cannot be watched.
    pub(super) fn adopt(&mut self, cx: &mut Context<'_>, slot: Slot, socket: OwnedFd) -> bool {
        let socket = Arc::new(socket);
        let watched = cx.watch_shared(slot, &socket, Interest::READ).is_ok();
        if let Some(connection) = self.table.get(slot).filter(|_| watched) {
            connection.socket = Some(socket);
        }
        watched
    }

    /// Closes the socket of a connection.
    pub(super) fn close_socket(&mut self, cx: &mut Context<'_>, slot: Slot) {
        if let Some(connection) = self.table.get(slot)
            && connection.socket.take().is_some()
        {
            connection.blocked = false;
            cx.unwatch(slot);
        }
    }

    /// The guest was told that the host is done: it has some time to forget the connection.
    pub(super) fn close(&mut self, cx: &mut Context<'_>, slot: Slot) {
        self.close_socket(cx, slot);
        let deadline = cx.now().saturating_add(CLOSE_TIMEOUT);
        self.table.set_deadline(slot, Some(deadline));
        if let Some(connection) = self.table.get(slot) {
            connection.state = State::Closing;
        }
    }

    /// Ends a connection; the guest, if it knows it, is told.
    pub(super) fn kill(&mut self, cx: &mut Context<'_>, slot: Slot) {
        self.shared.stats.conns_killed.add(1);
        self.end(cx, slot);
    }

    /// The guest does not get the connection that it wants.
    pub(super) fn refuse_connection(&mut self, cx: &mut Context<'_>, slot: Slot) {
        self.shared.stats.conns_refused.add(1);
        self.end(cx, slot);
    }

    fn end(&mut self, cx: &mut Context<'_>, slot: Slot) {
        if let Some(connection) = self.table.get(slot)
            && connection.key.is_some()
            && !connection.pending.request
        {
            let reset = reset_of(connection);
            self.queue_reset(reset);
        }
        self.remove(cx, slot);
    }

    /// Forgets a connection.
    pub(super) fn remove(&mut self, cx: &mut Context<'_>, slot: Slot) {
        self.close_socket(cx, slot);
        if self.table.remove(slot).is_some() {
            self.shared.stats.conns_removed.add(1);
            // There is a descriptor more.
            self.accept_retry_at = None;
        }
    }

    /// Forgets all connections, and tells nobody.
    pub(super) fn clear(&mut self, cx: &mut Context<'_>) {
        for slot in self.table.all() {
            self.remove(cx, slot);
        }
        self.resets.clear();
    }
}

/// The reset that ends a connection.
pub(super) fn reset_of(connection: &Connection) -> Reset {
    let key = connection.key.unwrap_or(Key { host_port: 0, guest_port: 0 });
    Reset { src_cid: HOST_CID, key, kind: connection.kind as u16 }
}

/// Whether all that is kept is the beginning of a message.
fn has_partial_message_only(connection: &Connection) -> bool {
    connection.kind == SocketKind::SeqPacket && !connection.has_whole_message()
}

/// Room for the longest message.
pub(super) fn message_buffer(scratch: &mut Vec<u8>) -> &mut [u8] {
    scratch.resize(MAX_MESSAGE as usize, 0);
    scratch
}
