//! Filling the guest's buffers: resets, then whoever stands in line, one turn each.

use rustix::io::Errno;

use super::credit::Window;
use super::packet::{END_OF_MESSAGE, HEADER_LEN, Header, Op, SHUTDOWN_BOTH, SocketKind};
use super::muxer::{Muxer, message_buffer};
use super::table::Slot;
use virtio::queue::{Chain, Queue, QueueError};
use virtio::worker::Context;
use zerocopy::IntoBytes;

/// Bytes of data that a connection gets rid of in one turn.
pub(super) const QUANTUM: u32 = 64 << 10;
/// Bytes that are read at first from a connection of which nothing is known.
const MIN_READ: u32 = 4 << 10;
/// Chains that one read fills at most.
const MAX_CHAINS: usize = 32;
/// A packet without data counts as so many bytes of a turn, and so does a buffer that is thrown away: the guest may make new ones meanwhile.
const PACKET_COST: u32 = 1 << 10;

/// How filling ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum FillOutcome {
    /// Nobody has anything for the guest.
    Idle,
    /// There is more, and the guest has no buffer for it.
    NoBuffers,
    /// There is more, and others of the worker should get their turn.
    Yield,
}

/// How one connection's turn ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum ServeOutcome {
    /// It has nothing more, for now.
    Done,
    /// It has more.
    More,
    /// The guest has no buffer.
    NoBuffers,
}

/// The queue to the guest.
pub(super) struct ToGuest {
    pub(super) queue: Queue,
    chains: Vec<Chain>,
    capacities: [u32; MAX_CHAINS],
}

impl ToGuest {
    pub(super) fn new(queue: Queue) -> Self {
        ToGuest { queue, chains: (0..MAX_CHAINS).map(|_| Chain::new()).collect(), capacities: [0; MAX_CHAINS] }
    }

    /// Gives the guest what there is for it, as far as it has buffers and `budget` (bytes) goes.
    pub(super) fn fill(
        &mut self,
        muxer: &mut Muxer,
        cx: &mut Context<'_>,
        budget: &mut u32,
    ) -> Result<FillOutcome, QueueError> {
        let filled = self.fill_in_order(muxer, cx, budget)?;
        // Who found no buffer because the budget was spent on bad ones goes on in the next turn.
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
        // A connection that was served may have been reset over it.
        Ok(if muxer.resets.is_empty() { FillOutcome::Idle } else { FillOutcome::Yield })
    }

    /// One connection's turn.
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
        let mut more = self.data(muxer, cx, slot, budget)?;
        if more == ServeOutcome::NoBuffers {
            return Ok(more);
        }
        // After the data, whose headers tell the credit, too.
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

    /// Data of one connection, at most a turn's.
    fn data(
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
            SocketKind::Stream => self.stream(muxer, cx, slot, budget),
            SocketKind::SeqPacket => self.message(muxer, cx, slot, budget),
        }
    }

    /// Reads from a stream straight into the guest's buffers, as many of them as one read may fill.
    fn stream(
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
        let offered = muxer.segments.len();
        let Some(connection) = muxer.table.get(slot) else { return Ok(ServeOutcome::Done) };
        let received = match &connection.socket {
            Some(socket) => muxer.segments.receive(socket),
            None => Err(Errno::NOTCONN),
        };
        let (got, may_be_more) = match received {
            Ok((got @ 1.., may_be_more)) => (got, may_be_more),
            other => {
                self.return_chains(0, count)?;
                return Ok(self.no_data(muxer, cx, slot, other.map(drop)));
            }
        };
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

    /// There was no data to read: none yet, none any more, or the socket is broken.
    #[expect(clippy::unused_self, reason = "it is a step of the same work")]
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
                // Here is its end, whether or not the event has come.
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

    /// Sends the guest a piece of a message.
    fn message(
        &mut self,
        muxer: &mut Muxer,
        cx: &mut Context<'_>,
        slot: Slot,
        budget: &mut u32,
    ) -> Result<ServeOutcome, QueueError> {
        let Some(connection) = muxer.table.get(slot) else { return Ok(ServeOutcome::Done) };
        if connection.rx_message.0.is_empty() {
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
        // Now that its length is known, it may have to wait.
        let sendable = connection.sendable();
        if sendable == 0 {
            return Ok(ServeOutcome::Done);
        }
        let (message, sent) = std::mem::take(&mut connection.rx_message);
        let rest = &message[sent as usize..];
        let Some(room) = self.next_data_chain(muxer, budget)? else {
            if let Some(connection) = muxer.table.get(slot) {
                connection.rx_message = (message, sent);
            }
            return Ok(ServeOutcome::NoBuffers);
        };
        let len = room.min(sendable).min(rest.len() as u32);
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
        connection.rx_message = if is_last { (Vec::new(), 0) } else { (message, sent + len) };
        let more = connection.has_data() && connection.sendable() > 0;
        Ok(if more { ServeOutcome::More } else { ServeOutcome::Done })
    }

    /// Takes chains until they have room for `limit` bytes of data, or as many as `window` allows
    /// in so many packets, which becomes `muxer.segments`. Returns how many. None: the guest has
    /// none, or `budget` was spent on those that it threw away.
    fn take_chains(
        &mut self,
        muxer: &mut Muxer,
        limit: u32,
        window: Window,
        budget: &mut u32,
    ) -> Result<usize, QueueError> {
        muxer.segments.clear();
        let mut count = 0;
        while count < MAX_CHAINS {
            let limit = limit.min(window.bytes(count as u32 + 1));
            if muxer.segments.len() >= limit {
                break;
            }
            let chain = &mut self.chains[count];
            if !self.queue.pop(chain)? {
                break;
            }
            let payload = chain.writable().split_at(HEADER_LEN).map(|(_, payload)| payload);
            let room = match payload {
                Some(payload) => muxer.segments.push(&payload, limit - muxer.segments.len())?,
                None => 0,
            };
            if room == 0 {
                // Too small, or too scattered for one read. Chains go back in order, so it is thrown away only as the first.
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
            self.capacities[count] = room;
            count += 1;
        }
        Ok(count)
    }

    /// Gives the chains from `used` to `count` back, last first.
    fn return_chains(&mut self, used: usize, count: usize) -> Result<(), QueueError> {
        self.chains[used..count].iter().rev().try_for_each(|chain| self.queue.rewind(chain))
    }

    /// Takes the next chain that has room for data; how much. It is `self.chains[0]`.
    fn next_data_chain(&mut self, muxer: &Muxer, budget: &mut u32) -> Result<Option<u32>, QueueError> {
        self.next_chain(muxer, HEADER_LEN + 1, budget).map(|room| room.map(|room| room - HEADER_LEN))
    }

    /// Takes the next chain with room for `least` bytes, throwing smaller ones away as far as `budget` goes.
    fn next_chain(
        &mut self,
        muxer: &Muxer,
        least: u32,
        budget: &mut u32,
    ) -> Result<Option<u32>, QueueError> {
        while self.queue.pop(&mut self.chains[0])? {
            let room = self.chains[0].writable().len();
            if room >= least {
                return Ok(Some(room));
            }
            self.discard_chain(muxer, budget)?;
            if *budget == 0 {
                break;
            }
        }
        Ok(None)
    }

    /// Gives the guest the chain that was taken, with nothing in it.
    fn discard_chain(&mut self, muxer: &Muxer, budget: &mut u32) -> Result<(), QueueError> {
        muxer.shared.stats.malformed_count.add(1);
        spend(budget, 0);
        self.queue.add_used(self.chains[0].head(), 0)
    }

    /// Sends a packet without data. False if the guest has no buffer; then the header is not made, which tells our account of credit.
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

    /// Fills the chain that was taken.
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

/// Takes what `bytes` of data cost off a turn's budget.
fn spend(budget: &mut u32, bytes: u32) {
    *budget = budget.saturating_sub(bytes.max(PACKET_COST));
}
