//! Filling the guest's buffers: resets first, then a turn for each connection in the ready queue.

use std::os::fd::AsFd;

use memory::iovec::Access;
use rustix::io::Errno;
use virtio::queue::{Chain, Queue, QueueError};
use virtio::worker::Context;
use zerocopy::IntoBytes;

use crate::credit::Window;
use crate::guest_io;
use crate::muxer::{Muxer, message_buffer};
use crate::packet::{END_OF_MESSAGE, HEADER_LEN, Header, Op, SHUTDOWN_BOTH, SocketKind};
use crate::table::Slot;

/// Maximum number of bytes that a connection sends in one turn.
pub(crate) const QUANTUM: u32 = 64 << 10;
/// Minimum number of bytes to read at once, and what the first read asks for.
const MIN_READ: u32 = 4 << 10;
/// Maximum number of chains that one read fills.
const MAX_CHAINS: usize = 32;
/// Minimum cost of a packet, in bytes of the budget. A discarded buffer costs as much, as the guest
/// may add new ones meanwhile.
pub(crate) const PACKET_COST: u32 = 1 << 10;

/// Why filling has ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum FillOutcome {
    /// There are no more packets.
    Idle,
    /// There are more packets, and the guest has no buffer for them.
    NoBuffers,
    /// There are more packets, and other tasks of the worker should run first.
    Yield,
}

/// How the turn of one connection has ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum ServeOutcome {
    /// It has no more packets for now.
    Done,
    /// It has more packets.
    More,
    /// The guest has no buffer.
    NoBuffers,
}

/// The RX queue.
pub(crate) struct ToGuest {
    pub(crate) queue: Queue,
    /// Chains that were taken for one packet or one read. Reused.
    chains: Vec<Chain>,
    /// Bytes of data that each of them takes.
    capacities: [u32; MAX_CHAINS],
}

impl ToGuest {
    pub(crate) fn new(queue: Queue) -> Self {
        ToGuest {
            queue,
            chains: (0..MAX_CHAINS).map(|_| Chain::new()).collect(),
            capacities: [0; MAX_CHAINS],
        }
    }

    /// Sends the guest packets until there are no more, it has no buffers or `budget` (bytes) is
    /// spent.
    pub(crate) fn fill(
        &mut self,
        muxer: &mut Muxer,
        cx: &mut Context<'_>,
        budget: &mut u32,
    ) -> Result<FillOutcome, QueueError> {
        let filled = self.fill_in_order(muxer, cx, budget)?;
        // If the budget was spent on unusable buffers, there may be usable ones.
        Ok(if filled == FillOutcome::NoBuffers && *budget == 0 { FillOutcome::Yield } else { filled })
    }

    fn fill_in_order(
        &mut self,
        muxer: &mut Muxer,
        cx: &mut Context<'_>,
        budget: &mut u32,
    ) -> Result<FillOutcome, QueueError> {
        while let Some(reset) = muxer.resets.front() {
            if *budget == 0 {
                return Ok(FillOutcome::Yield);
            }
            let header = reset.header(muxer.guest_cid);
            if self.next_chain(muxer, HEADER_LEN, budget)?.is_none() {
                return Ok(FillOutcome::NoBuffers);
            }
            self.write_packet(muxer, &header, &[])?;
            muxer.resets.pop_front();
            spend(budget, 0);
        }
        while muxer.table.has_ready() {
            if *budget == 0 {
                return Ok(FillOutcome::Yield);
            }
            let Some(slot) = muxer.table.dequeue() else { break };
            match self.serve(muxer, cx, slot, budget)? {
                ServeOutcome::Done => {}
                ServeOutcome::More => muxer.table.enqueue(slot),
                ServeOutcome::NoBuffers => {
                    muxer.table.enqueue_front(slot);
                    return Ok(FillOutcome::NoBuffers);
                }
            }
        }
        // Serving a connection may have reset it.
        Ok(if muxer.resets.is_empty() { FillOutcome::Idle } else { FillOutcome::Yield })
    }

    /// Gives one connection its turn.
    fn serve(
        &mut self,
        muxer: &mut Muxer,
        cx: &mut Context<'_>,
        slot: Slot,
        budget: &mut u32,
    ) -> Result<ServeOutcome, QueueError> {
        let Some(connection) = muxer.table.get(slot) else { return Ok(ServeOutcome::Done) };
        let first = [(connection.pending.request, Op::Request), (connection.pending.response, Op::Response)];
        if let Some((_, op)) = first.into_iter().find(|(is_owed, _)| *is_owed) {
            if !self.send(muxer, slot, op, 0, budget)? {
                return Ok(ServeOutcome::NoBuffers);
            }
            if let Some(connection) = muxer.table.get(slot) {
                (connection.pending.request, connection.pending.response) = (false, false);
            }
            spend(budget, 0);
        }
        let mut more = self.send_data(muxer, cx, slot, budget)?;
        if more == ServeOutcome::NoBuffers {
            return Ok(more);
        }
        // After the data, because its headers carry the credit, too.
        while let Some((op, flags)) = muxer.table.get(slot).and_then(|connection| {
            if connection.credit_update_due() {
                return Some((Op::CreditUpdate, 0));
            }
            if std::mem::take(&mut connection.pending.credit_request) {
                return Some((Op::CreditRequest, 0));
            }
            connection.shutdown_due().map(|flags| (Op::Shutdown, flags))
        }) {
            if !self.send(muxer, slot, op, flags, budget)? {
                return Ok(ServeOutcome::NoBuffers);
            }
            spend(budget, 0);
            let Some(connection) = muxer.table.get(slot) else { break };
            match op {
                Op::CreditUpdate => connection.pending.credit_update = false,
                Op::Shutdown => connection.sent_shutdown = flags,
                _ => {}
            }
            if connection.sent_shutdown == SHUTDOWN_BOTH {
                muxer.close(cx, slot);
                more = ServeOutcome::Done;
            }
        }
        muxer.watch_stall(cx, slot);
        Ok(more)
    }

    /// Sends data of one connection, for at most one turn.
    fn send_data(
        &mut self,
        muxer: &mut Muxer,
        cx: &mut Context<'_>,
        slot: Slot,
        budget: &mut u32,
    ) -> Result<ServeOutcome, QueueError> {
        let Some(connection) = muxer.table.get(slot).filter(|c| c.has_data()) else {
            return Ok(ServeOutcome::Done);
        };
        if connection.sendable() == 0 {
            return Ok(ServeOutcome::Done);
        }
        match connection.kind {
            SocketKind::Stream => self.send_stream(muxer, cx, slot, budget),
            SocketKind::SeqPacket => self.send_message(muxer, cx, slot, budget),
        }
    }

    /// Reads from a stream socket directly into the guest's buffers, several of them at once.
    fn send_stream(
        &mut self,
        muxer: &mut Muxer,
        cx: &mut Context<'_>,
        slot: Slot,
        budget: &mut u32,
    ) -> Result<ServeOutcome, QueueError> {
        let Some(connection) = muxer.table.get(slot) else { return Ok(ServeOutcome::Done) };
        connection.read_size = connection.read_size.clamp(MIN_READ, QUANTUM);
        let (limit, window) = (connection.read_size, connection.credit.window());
        let count = self.take_chains(muxer, limit, window, budget)?;
        if count == 0 {
            return Ok(ServeOutcome::NoBuffers);
        }
        let offered = muxer.iovec.len() as u32;
        let Some(connection) = muxer.table.get(slot) else { return Ok(ServeOutcome::Done) };
        let received = match &connection.socket {
            Some(socket) => muxer.iovec.receive(socket.as_fd()),
            None => Err(Errno::NOTCONN),
        };
        let (got, may_be_more) = match received {
            // The kernel stops before data that follows passed descriptors, which are dropped.
            Ok(received) if received.len > 0 => (received.len as u32, received.dropped_descriptors),
            other => {
                self.return_chains(0, count)?;
                return Ok(self.no_data(muxer, cx, slot, other.map(drop)));
            }
        };
        muxer.iovec.mark_dirty(&muxer.ram, got.into());
        connection.readable = may_be_more || got == offered || connection.hangup;
        if got == offered {
            connection.read_size = (connection.read_size * 4).min(QUANTUM);
        } else if got < connection.read_size / 4 {
            connection.read_size /= 2;
        }
        let mut left = got;
        let mut used = 0;
        while left > 0 {
            let len = self.capacities[used].min(left);
            let mut header = connection.header(Op::Rw, muxer.guest_cid);
            header.len = len.into();
            self.write(used, &header)?;
            self.queue.add_used(self.chains[used].head(), HEADER_LEN + len)?;
            connection.credit.record_sent(len);
            (left, used) = (left - len, used + 1);
        }
        let more = connection.readable && connection.sendable() > 0;
        self.return_chains(used, count)?;
        muxer.shared.stats.rx_bytes_count.add(got.into());
        muxer.shared.stats.rx_packets_count.add(used as u64);
        spend(budget, got);
        Ok(if more { ServeOutcome::More } else { ServeOutcome::Done })
    }

    /// Handles a read that returned no data: an empty socket, the end, or an error.
    #[expect(clippy::unused_self, reason = "a step of sending, next to the others")]
    fn no_data(
        &self,
        muxer: &mut Muxer,
        cx: &mut Context<'_>,
        slot: Slot,
        result: Result<(), Errno>,
    ) -> ServeOutcome {
        let Some(connection) = muxer.table.get(slot) else { return ServeOutcome::Done };
        connection.readable = false;
        match result {
            Err(Errno::AGAIN) => {}
            Ok(()) => {
                // The end, even if its event has not arrived yet.
                (connection.host_send_shut, connection.hangup) = (true, true);
                connection.close_if_peer_gone();
            }
            Err(_) => {
                muxer.shared.stats.rx_read_fails.add(1);
                muxer.kill(cx, slot);
            }
        }
        ServeOutcome::Done
    }

    /// Sends the guest one packet of a message.
    fn send_message(
        &mut self,
        muxer: &mut Muxer,
        cx: &mut Context<'_>,
        slot: Slot,
        budget: &mut u32,
    ) -> Result<ServeOutcome, QueueError> {
        let Some(connection) = muxer.table.get(slot) else { return Ok(ServeOutcome::Done) };
        if connection.rx_message.data.is_empty() {
            match connection.read_message(message_buffer(&mut muxer.scratch)) {
                Ok(Some(())) => {}
                // An empty message, not the end.
                Ok(None) if connection.may_have_more() => {
                    spend(budget, 0);
                    return Ok(ServeOutcome::More);
                }
                other => return Ok(self.no_data(muxer, cx, slot, other.map(drop))),
            }
        }
        let Some(connection) = muxer.table.get(slot) else { return Ok(ServeOutcome::Done) };
        // Its length is known now, and there may be too little credit for it.
        let sendable = connection.sendable();
        if sendable == 0 {
            return Ok(ServeOutcome::Done);
        }
        let mut message = std::mem::take(&mut connection.rx_message);
        let Some(capacity) = self.next_data_chain(muxer, budget)? else {
            if let Some(connection) = muxer.table.get(slot) {
                connection.rx_message = message;
            }
            return Ok(ServeOutcome::NoBuffers);
        };
        let rest = &message.data[message.sent as usize..];
        let len = capacity.min(sendable).min(rest.len() as u32);
        let piece = &rest[..len as usize];
        let is_last = piece.len() == rest.len();
        let Some(connection) = muxer.table.get(slot) else { return Ok(ServeOutcome::Done) };
        let mut header = connection.header(Op::Rw, muxer.guest_cid);
        header.len = len.into();
        header.flags = if is_last { END_OF_MESSAGE } else { 0 }.into();
        connection.credit.record_sent(len);
        self.write_packet(muxer, &header, piece)?;
        muxer.shared.stats.rx_bytes_count.add(len.into());
        spend(budget, len);
        let Some(connection) = muxer.table.get(slot) else { return Ok(ServeOutcome::Done) };
        if !is_last {
            message.sent += len;
            connection.rx_message = message;
        }
        let more = connection.has_data() && connection.sendable() > 0;
        Ok(if more { ServeOutcome::More } else { ServeOutcome::Done })
    }

    /// Takes chains until they hold `limit` bytes of data, or as many as `window` allows in that
    /// number of packets. `muxer.iovec` becomes their space for data. Returns the number of
    /// chains. It is 0 if the guest has none, or `budget` was spent on discarded ones.
    fn take_chains(
        &mut self,
        muxer: &mut Muxer,
        limit: u32,
        window: Window,
        budget: &mut u32,
    ) -> Result<usize, QueueError> {
        muxer.iovec.clear();
        let mut count = 0;
        while count < MAX_CHAINS {
            let limit = limit.min(window.bytes(count as u32 + 1));
            if muxer.iovec.len() as u32 >= limit {
                break;
            }
            let chain = &mut self.chains[count];
            if !self.queue.pop(chain)? {
                break;
            }
            let payload = chain.writable().split_at(HEADER_LEN).map(|(_, payload)| payload);
            let capacity = match payload {
                Some(payload) => {
                    let limit = limit - muxer.iovec.len() as u32;
                    let access = Access::WriteUnmarked;
                    guest_io::push(&mut muxer.iovec, &muxer.ram, &payload, limit, access)?
                }
                None => 0,
            };
            if capacity == 0 {
                // Too small, or in too many pieces for one read. Chains are returned in order, so
                // it is discarded only if it is the first.
                if count > 0 {
                    self.queue.rewind(&self.chains[count])?;
                    break;
                }
                self.discard_chain(muxer, budget)?;
                if *budget == 0 {
                    break;
                }
                continue;
            }
            self.capacities[count] = capacity;
            count += 1;
        }
        Ok(count)
    }

    /// Puts the chains from `used` to `count` back in the queue, last first.
    fn return_chains(&mut self, used: usize, count: usize) -> Result<(), QueueError> {
        self.chains[used..count].iter().rev().try_for_each(|chain| self.queue.rewind(chain))
    }

    /// Takes the next chain that holds data into `self.chains[0]`. Returns how many bytes it holds.
    fn next_data_chain(&mut self, muxer: &Muxer, budget: &mut u32) -> Result<Option<u32>, QueueError> {
        self.next_chain(muxer, HEADER_LEN + 1, budget)
            .map(|capacity| capacity.map(|capacity| capacity - HEADER_LEN))
    }

    /// Takes the next chain of at least `least` bytes into `self.chains[0]`. Discards smaller ones,
    /// within `budget`. Returns its length.
    fn next_chain(&mut self, muxer: &Muxer, least: u32, budget: &mut u32) -> Result<Option<u32>, QueueError> {
        while self.queue.pop(&mut self.chains[0])? {
            let capacity = self.chains[0].writable().len();
            if capacity >= least {
                return Ok(Some(capacity));
            }
            self.discard_chain(muxer, budget)?;
            if *budget == 0 {
                break;
            }
        }
        Ok(None)
    }

    /// Returns `self.chains[0]` to the guest unused.
    fn discard_chain(&mut self, muxer: &Muxer, budget: &mut u32) -> Result<(), QueueError> {
        muxer.shared.stats.malformed_count.add(1);
        spend(budget, 0);
        self.queue.add_used(self.chains[0].head(), 0)
    }

    /// Sends a packet without data. False if the guest has no buffer. In that case no header is
    /// made, as making one records the credit in it as sent.
    fn send(
        &mut self,
        muxer: &mut Muxer,
        slot: Slot,
        op: Op,
        flags: u32,
        budget: &mut u32,
    ) -> Result<bool, QueueError> {
        if self.next_chain(muxer, HEADER_LEN, budget)?.is_none() {
            return Ok(false);
        }
        let guest_cid = muxer.guest_cid;
        let mut header = muxer.table.get(slot).map(|c| c.header(op, guest_cid)).unwrap_or_default();
        header.flags = flags.into();
        self.write_packet(muxer, &header, &[])?;
        Ok(true)
    }

    /// Writes a packet to `self.chains[0]`.
    fn write_packet(&mut self, muxer: &Muxer, header: &Header, data: &[u8]) -> Result<(), QueueError> {
        self.write(0, header)?;
        if let Some((_, payload)) = self.chains[0].writable().split_at(HEADER_LEN) {
            payload.write(self.queue.ram(), data)?;
        }
        self.queue.add_used(self.chains[0].head(), HEADER_LEN + data.len() as u32)?;
        muxer.shared.stats.rx_packets_count.add(1);
        Ok(())
    }

    fn write(&self, at: usize, header: &Header) -> Result<(), QueueError> {
        self.chains[at].writable().write(self.queue.ram(), header.as_bytes()).map(drop)
    }
}

/// Subtracts the cost of a packet with `bytes` of data from the budget.
fn spend(budget: &mut u32, bytes: u32) {
    *budget = budget.saturating_sub(bytes.max(PACKET_COST));
}
