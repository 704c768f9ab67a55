//! What packets of the guest and events of the host do to connections.

use std::collections::VecDeque;
use std::os::fd::{AsRawFd, OwnedFd};
use std::sync::Arc;

use memory::GuestRam;
use rustix::io::Errno;
use rustix::net::Shutdown;
use rustix::process::{Resource, getrlimit};

use super::Shared;
use super::connection::{Connection, Key, MAX_MESSAGE, Owed, State, Written, peer_is_done, peer_is_gone};
use super::greeting::{self, Greeting};
use super::guest_io::Segments;
use super::packet::{
    END_OF_MESSAGE, HOST_CID, Header, Op, SHUTDOWN_BOTH, SHUTDOWN_RECEIVE, SHUTDOWN_SEND, SocketKind,
};
use super::socket::HostSockets;
use super::table::{MAX_CONNECTIONS, Slot, Table};
use crate::queue::{Buffers, QueueError};
use crate::worker::{Context, Event, Interest, Nanos};

const MS: Nanos = 1_000_000;
/// How long a host client may take to say where it wants to go.
const GREETING_PATIENCE: Nanos = 30_000 * MS;
/// How long the guest may take to answer a host client, and a host server to take a connection of the guest.
const ANSWER_PATIENCE: Nanos = 5_000 * MS;
/// How long the guest may take to forget a connection that the host is done with.
const CLOSE_PATIENCE: Nanos = 10_000 * MS;
/// How long the host may take for what the guest sent before it was done.
const LINGER_PATIENCE: Nanos = 60_000 * MS;
/// How long a guest may have no room before it is asked for some.
const STALL_PATIENCE: Nanos = 200 * MS;
/// A host server that has no time is tried again after that.
const DIAL_AGAIN: Nanos = 10 * MS;
/// A process out of descriptors accepts again after that.
const ACCEPT_AGAIN: Nanos = 100 * MS;

/// The last descriptors that a process may have are not for connections.
const RESERVED_FDS: u64 = 64;
/// Host clients that are taken in one go.
const ACCEPTS: usize = 64;
/// Resets that wait to be told; those above it are not told.
const MAX_RESETS: usize = 2 * MAX_CONNECTIONS;

/// Tokens of listeners come after those of connections.
pub(super) const FIRST_LISTENER: u32 = MAX_CONNECTIONS as u32;

/// The guest is to hear that there is no such connection.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Reset {
    src_cid: u64,
    key: Key,
    kind: u16,
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
pub(super) struct Switch {
    pub(super) guest_cid: u64,
    pub(super) shared: Arc<Shared>,
    pub(super) sockets: HostSockets,
    pub(super) table: Table,
    pub(super) resets: VecDeque<Reset>,
    pub(super) segments: Segments,
    pub(super) scratch: Vec<u8>,
    ram: GuestRam,
    with_messages: bool,
    /// For each listener, whether somebody may wait at it.
    waiting: Vec<bool>,
    /// Descriptors ran out: when to accept again.
    accept_at: Option<Nanos>,
    /// Descriptors from this number on are not for connections.
    fd_limit: u64,
}

impl Switch {
    pub(super) fn new(
        guest_cid: u32,
        shared: Arc<Shared>,
        sockets: HostSockets,
        ram: GuestRam,
        with_messages: bool,
    ) -> Self {
        let fd_limit = getrlimit(Resource::Nofile).current.unwrap_or(u64::MAX);
        Switch {
            guest_cid: guest_cid.into(),
            shared,
            table: Table::default(),
            resets: VecDeque::new(),
            segments: Segments::new(ram.clone()),
            scratch: Vec::new(),
            ram,
            with_messages,
            waiting: vec![true; sockets.listeners.len()],
            sockets,
            accept_at: None,
            fd_limit: fd_limit.saturating_sub(RESERVED_FDS),
        }
    }

    // --- the guest's packets ---

    /// Handles a packet of the guest; `data` is as long as the header says.
    pub(super) fn packet(
        &mut self,
        cx: &mut Context<'_>,
        header: &Header,
        data: &Buffers<'_>,
    ) -> Result<(), QueueError> {
        if header.src_cid.get() != self.guest_cid {
            // Nobody would take the answer.
            self.shared.stats.malformed_count.add(1);
            return Ok(());
        }
        let op = Op::of(header.op.get());
        let kind = SocketKind::of(header.kind.get())
            .filter(|&kind| kind == SocketKind::Stream || self.with_messages);
        let key = Key { host_port: header.dst_port.get(), guest_port: header.src_port.get() };
        let found = self.table.find(key);
        let (Some(op), Some(kind), HOST_CID) = (op, kind, header.dst_cid.get()) else {
            return Ok(self.refuse(header));
        };
        if op == Op::Request {
            return Ok(self.request(cx, header, key, kind));
        }
        let Some(slot) = found else { return Ok(self.refuse(header)) };
        let Some(connection) = self.table.get(slot).filter(|c| c.kind == kind) else {
            return Ok(self.refuse(header));
        };
        if op == Op::Rst {
            return Ok(self.reset_by_guest(cx, slot));
        }
        if connection.credit.learn(header).is_err() {
            return Ok(self.kill(cx, slot));
        }
        match (op, connection.state) {
            (Op::Response, State::Requested) => self.opened(cx, slot),
            (Op::Rw, State::Open) => return self.data(cx, slot, data, header.flags.get()),
            // It may have sent this before it heard.
            (Op::Rw, State::Closing) | (Op::CreditUpdate, State::Open | State::Closing) => {}
            (Op::CreditRequest, State::Open) => connection.owed.credit_update = true,
            (Op::CreditRequest, State::Closing) => {}
            (Op::Shutdown, State::Open | State::Requested | State::Closing) => {
                self.shutdown_by_guest(cx, slot, header.flags.get());
            }
            _ => self.kill(cx, slot),
        }
        self.queue(cx, slot);
        Ok(())
    }

    /// A packet that is shorter than its header says: the connection, if there is one, cannot be trusted any more.
    pub(super) fn broken_packet(&mut self, cx: &mut Context<'_>, header: &Header) {
        let key = Key { host_port: header.dst_port.get(), guest_port: header.src_port.get() };
        let is_ours = header.src_cid.get() == self.guest_cid && header.dst_cid.get() == HOST_CID;
        if let Some(slot) = self.table.find(key).filter(|_| is_ours) {
            self.kill(cx, slot);
        }
    }

    /// Puts a connection in line if there is anything for the guest.
    fn queue(&mut self, cx: &mut Context<'_>, slot: Slot) {
        if self.table.get(slot).is_some_and(|connection| connection.wants_turn()) {
            self.table.queue(slot);
        }
        self.watch_stall(cx, slot);
    }

    /// A guest that has no room usually says when it has some. If it does not, it will be asked.
    pub(super) fn watch_stall(&mut self, cx: &mut Context<'_>, slot: Slot) {
        if self.table.get(slot).is_some_and(|c| c.deadline.is_none() && c.is_stalled()) {
            let deadline = cx.now().saturating_add(STALL_PATIENCE);
            self.table.set_deadline(slot, Some(deadline));
        }
    }

    /// The guest had no room for some time.
    fn ask_for_credit(&mut self, cx: &mut Context<'_>, slot: Slot) {
        if let Some(connection) = self.table.get(slot).filter(|c| c.is_stalled()) {
            connection.owed.credit_request = true;
            self.queue(cx, slot);
        }
    }

    /// Answers a packet to something that does not exist. Resets are not answered.
    fn refuse(&mut self, header: &Header) {
        if header.op.get() != Op::Rst as u16 {
            self.owe_reset(Reset {
                src_cid: header.dst_cid.get(),
                key: Key { host_port: header.dst_port.get(), guest_port: header.src_port.get() },
                kind: header.kind.get(),
            });
        }
    }

    fn owe_reset(&mut self, reset: Reset) {
        // A guest that asks for resets and does not take them does without.
        if self.resets.len() < MAX_RESETS {
            self.resets.push_back(reset);
        }
    }

    /// The guest wants to connect to the host.
    fn request(&mut self, cx: &mut Context<'_>, header: &Header, key: Key, kind: SocketKind) {
        if let Some(slot) = self.table.find(key) {
            // It has forgotten the connection that it had.
            return self.kill(cx, slot);
        }
        let give_up = cx.now().saturating_add(ANSWER_PATIENCE);
        let Some(slot) = self.table.add(kind, State::Dialing { give_up }) else {
            self.shared.stats.conns_refused.add(1);
            return self.refuse(header);
        };
        self.shared.stats.conns_added.add(1);
        self.table.set_key(slot, key);
        if let Some(connection) = self.table.get(slot)
            && connection.credit.learn(header).is_err()
        {
            return self.kill(cx, slot);
        }
        self.dial(cx, slot);
    }

    /// Tries to reach whoever serves the port that the guest wants.
    fn dial(&mut self, cx: &mut Context<'_>, slot: Slot) {
        let Some(connection) = self.table.get(slot) else { return };
        let (State::Dialing { give_up }, Some(key)) = (connection.state, connection.key) else { return };
        match self.sockets.dial(key.host_port, connection.kind) {
            Ok(socket) if self.is_affordable(&socket) => {
                if self.adopt(cx, slot, socket) {
                    self.table.set_deadline(slot, None);
                    if let Some(connection) = self.table.get(slot) {
                        connection.state = State::Open;
                        connection.owed.response = true;
                        connection.readable = true;
                    }
                    self.table.queue(slot);
                } else {
                    self.kill(cx, slot);
                }
            }
            Err(Errno::AGAIN) if cx.now() < give_up => {
                let again = cx.now().saturating_add(DIAL_AGAIN).min(give_up);
                self.table.set_deadline(slot, Some(again));
            }
            _ => {
                self.shared.stats.conns_refused.add(1);
                self.kill(cx, slot);
            }
        }
    }

    /// The guest took a host client's connection.
    fn opened(&mut self, cx: &mut Context<'_>, slot: Slot) {
        self.table.set_deadline(slot, None);
        let Some(connection) = self.table.get(slot) else { return };
        connection.state = State::Open;
        connection.readable = true;
        let (Some(key), Some(socket)) = (connection.key, &connection.socket) else { return };
        let answer = format!("OK {}\n", key.host_port);
        let flags = rustix::net::SendFlags::NOSIGNAL | rustix::net::SendFlags::DONTWAIT;
        // Nothing was written to the socket so far: it has room.
        if rustix::net::send(socket, answer.as_bytes(), flags) != Ok(answer.len()) {
            self.kill(cx, slot);
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
        if connection.guest_done || connection.credit.receive(data.len()).is_err() {
            return Ok(self.kill(cx, slot));
        }
        self.shared.stats.tx_bytes_count.add(data.len().into());
        let written = match connection.kind {
            _ if connection.host_deaf => {
                connection.credit.forward(data.len());
                Written::Deaf
            }
            SocketKind::Stream => stream(connection, &mut self.segments, &mut self.scratch, &self.ram, data)?,
            SocketKind::SeqPacket => {
                copy(&mut self.scratch, &self.ram, data)?;
                connection.keep_message(&self.scratch, flags & END_OF_MESSAGE != 0);
                if connection.blocked { Written::Bytes(0) } else { connection.flush() }
            }
        };
        self.written(cx, slot, written);
        self.queue(cx, slot);
        Ok(())
    }

    /// What follows from a write to a host socket.
    fn written(&mut self, cx: &mut Context<'_>, slot: Slot, written: Written) {
        let Some(connection) = self.table.get(slot) else { return };
        if written == Written::Failed {
            self.shared.stats.tx_write_fails.add(1);
            return self.kill(cx, slot);
        }
        let blocked = !connection.is_flushed() && !is_waiting_for_more(connection);
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
            } else if connection.guest_done {
                connection.shut(Shutdown::Write);
            }
        }
    }

    /// The guest ends one or both directions.
    fn shutdown_by_guest(&mut self, cx: &mut Context<'_>, slot: Slot, flags: u32) {
        let Some(connection) = self.table.get(slot) else { return };
        connection.guest_done |= flags & SHUTDOWN_SEND != 0;
        connection.guest_deaf |= flags & SHUTDOWN_RECEIVE != 0;
        if connection.guest_done && connection.guest_deaf {
            let reset = reset_of(connection);
            self.owe_reset(reset);
            return self.linger(cx, slot);
        }
        if flags & SHUTDOWN_BOTH != 0 && connection.state == State::Requested {
            return self.kill(cx, slot);
        }
        if connection.guest_done && connection.is_flushed() {
            connection.shut(Shutdown::Write);
        }
        if connection.guest_deaf {
            connection.shut(Shutdown::Read);
            connection.to_guest = (Vec::new(), 0);
        }
    }

    /// The guest has no such connection (any more).
    fn reset_by_guest(&mut self, cx: &mut Context<'_>, slot: Slot) {
        match self.table.get(slot) {
            // It ended its direction in good order before.
            Some(connection) if connection.guest_done => self.linger(cx, slot),
            _ => self.remove(cx, slot),
        }
    }

    /// The guest is done with a connection; what it sent still goes to the host.
    fn linger(&mut self, cx: &mut Context<'_>, slot: Slot) {
        self.table.forget_key(slot);
        let deadline = cx.now().saturating_add(LINGER_PATIENCE);
        match self.table.get(slot) {
            Some(connection) if !connection.is_flushed() && connection.socket.is_some() => {
                connection.state = State::Lingering;
                connection.owed = Owed::default();
                connection.to_guest = (Vec::new(), 0);
                self.table.set_deadline(slot, Some(deadline));
            }
            _ => self.remove(cx, slot),
        }
    }

    // --- the host's events ---

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
        connection.hangup |= event.hangup;
        match connection.state {
            State::Greeting => self.greet(cx, slot),
            State::Requested if event.hangup => {
                if is_gone(connection) {
                    self.kill(cx, slot);
                }
            }
            State::Requested | State::Dialing { .. } | State::Closing => {}
            State::Open | State::Lingering => {
                connection.readable |= event.readable || event.hangup;
                if event.hangup && connection.host_done && !connection.host_deaf && is_gone(connection) {
                    connection.deafen();
                }
                if connection.blocked && (event.writable || event.hangup) {
                    let written = connection.flush();
                    self.written(cx, slot, written);
                }
                self.queue(cx, slot);
            }
        }
    }

    /// Looks at every descriptor as if something had happened at it.
    pub(super) fn look_at_all(&mut self, cx: &mut Context<'_>) {
        self.waiting.fill(true);
        for token in self.table.all() {
            let Some(connection) = self.table.get(token) else { continue };
            let hangup = connection.socket.as_ref().is_some_and(peer_is_done);
            self.ready(cx, Event { token, readable: true, writable: true, hangup });
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
        if self.accept_at.is_some() {
            return false;
        }
        for at in 0..self.waiting.len() {
            for _ in 0..ACCEPTS {
                if !self.waiting[at] {
                    break;
                }
                match self.sockets.listeners[at].accept() {
                    Ok(socket) => {
                        let kind = self.sockets.listeners[at].kind();
                        self.welcome(cx, socket, kind);
                    }
                    Err(Errno::AGAIN) => self.waiting[at] = false,
                    Err(Errno::MFILE | Errno::NFILE | Errno::NOMEM | Errno::NOBUFS) => {
                        self.accept_at = Some(cx.now().saturating_add(ACCEPT_AGAIN));
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
    fn welcome(&mut self, cx: &mut Context<'_>, socket: OwnedFd, kind: SocketKind) {
        let slot = self.is_affordable(&socket).then(|| self.table.add(kind, State::Greeting)).flatten();
        let Some(slot) = slot else {
            // It hears it by being closed.
            self.shared.stats.conns_refused.add(1);
            return;
        };
        self.shared.stats.conns_added.add(1);
        if !self.adopt(cx, slot, socket) {
            return self.kill(cx, slot);
        }
        let deadline = cx.now().saturating_add(GREETING_PATIENCE);
        self.table.set_deadline(slot, Some(deadline));
        self.greet(cx, slot);
    }

    /// A host client may have said where it wants to go.
    fn greet(&mut self, cx: &mut Context<'_>, slot: Slot) {
        let Some(connection) = self.table.get(slot) else { return };
        let Some(socket) = &connection.socket else { return };
        match greeting::read(socket, connection.kind) {
            Greeting::Port(port) if connection.kind == SocketKind::Stream || self.with_messages => {
                connection.state = State::Requested;
                connection.owed.request = true;
                let key = self.table.new_key(port);
                self.table.set_key(slot, key);
                let deadline = cx.now().saturating_add(ANSWER_PATIENCE);
                self.table.set_deadline(slot, Some(deadline));
                self.table.queue(slot);
            }
            Greeting::Partial if !connection.hangup => {}
            _ => self.kill(cx, slot),
        }
    }

    /// What is due by now.
    pub(super) fn timers(&mut self, cx: &mut Context<'_>) {
        let now = cx.now();
        if self.accept_at.is_some_and(|at| at <= now) {
            self.accept_at = None;
        }
        while let Some(slot) = self.table.expired(now) {
            match self.table.get(slot).map(|connection| connection.state) {
                Some(State::Dialing { .. }) => self.dial(cx, slot),
                Some(State::Open) => self.ask_for_credit(cx, slot),
                Some(_) => self.kill(cx, slot),
                None => {}
            }
        }
    }

    /// When [`Switch::timers`] is to be called.
    pub(super) fn next_timer(&self) -> Option<Nanos> {
        [self.accept_at, self.table.next_deadline()].into_iter().flatten().min()
    }

    /// Time in which nobody could do anything is over.
    pub(super) fn postpone(&mut self, by: Nanos) {
        self.table.postpone(by);
    }

    // --- beginnings and ends ---

    /// Whether there are descriptors left for connections.
    fn is_affordable(&self, socket: &OwnedFd) -> bool {
        u64::from(socket.as_raw_fd().cast_unsigned()) < self.fd_limit
    }

    /// Gives a connection its socket. False if that cannot be watched.
    fn adopt(&mut self, cx: &mut Context<'_>, slot: Slot, socket: OwnedFd) -> bool {
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
        let deadline = cx.now().saturating_add(CLOSE_PATIENCE);
        self.table.set_deadline(slot, Some(deadline));
        if let Some(connection) = self.table.get(slot) {
            connection.state = State::Closing;
        }
    }

    /// Ends a connection; the guest, if it knows it, is told.
    pub(super) fn kill(&mut self, cx: &mut Context<'_>, slot: Slot) {
        self.shared.stats.conns_killed.add(1);
        if let Some(connection) = self.table.get(slot)
            && connection.key.is_some()
            && !connection.owed.request
        {
            let reset = reset_of(connection);
            self.owe_reset(reset);
        }
        self.remove(cx, slot);
    }

    /// Forgets a connection.
    pub(super) fn remove(&mut self, cx: &mut Context<'_>, slot: Slot) {
        self.close_socket(cx, slot);
        if self.table.remove(slot).is_some() {
            self.shared.stats.conns_removed.add(1);
            // There is a descriptor more.
            self.accept_at = None;
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

fn reset_of(connection: &Connection) -> Reset {
    let key = connection.key.unwrap_or(Key { host_port: 0, guest_port: 0 });
    Reset { src_cid: HOST_CID, key, kind: connection.kind as u16 }
}

fn is_gone(connection: &Connection) -> bool {
    connection.socket.as_ref().is_none_or(peer_is_gone)
}

/// Whether all that is kept is the beginning of a message.
fn is_waiting_for_more(connection: &Connection) -> bool {
    connection.kind == SocketKind::SeqPacket && !connection.has_whole_message()
}

/// Writes a packet's data to a stream, straight from guest memory; keeps what the socket does not take.
fn stream(
    connection: &mut Connection,
    segments: &mut Segments,
    scratch: &mut Vec<u8>,
    ram: &GuestRam,
    data: &Buffers<'_>,
) -> Result<Written, QueueError> {
    let mut sent = 0;
    if connection.is_flushed() && !data.is_empty() {
        segments.clear();
        segments.push(data, data.len())?;
        let Some(socket) = &connection.socket else { return Ok(Written::Failed) };
        match segments.send(socket) {
            Ok(taken) => sent = taken,
            Err(Errno::AGAIN) => {}
            Err(Errno::PIPE) => {
                connection.credit.forward(data.len());
                return Ok(connection.deafen());
            }
            Err(_) => return Ok(Written::Failed),
        }
        connection.credit.forward(sent);
    }
    if let Some((_, rest)) = data.split_at(sent).filter(|(_, rest)| !rest.is_empty()) {
        copy(scratch, ram, &rest)?;
        connection.keep(scratch);
    }
    Ok(Written::Bytes(sent))
}

/// Copies a packet's data to `scratch`. It is no more than the guest has credit for.
fn copy(scratch: &mut Vec<u8>, ram: &GuestRam, data: &Buffers<'_>) -> Result<(), QueueError> {
    scratch.clear();
    scratch.resize(data.len() as usize, 0);
    data.read(ram, scratch).map(drop)
}

/// Room for the longest message.
pub(super) fn message_room(scratch: &mut Vec<u8>) -> &mut [u8] {
    scratch.resize(MAX_MESSAGE as usize, 0);
    scratch
}
