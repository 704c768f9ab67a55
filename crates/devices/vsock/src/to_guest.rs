//! Filling the guest's buffers: resets, then whoever stands in line, one turn each.

use rustix::io::Errno;

use super::credit::Window;
use super::packet::{END_OF_MESSAGE, HEADER_LEN, Header, Op, SHUTDOWN_BOTH, SocketKind};
use super::switch::{Switch, message_room};
use super::table::Slot;
use virtio::queue::{Chain, Queue, QueueError};
use virtio::worker::Context;
use zerocopy::IntoBytes;

/// Bytes of data that a connection gets rid of in one turn.
pub(super) const QUANTUM: u32 = 64 << 10;
/// Bytes that are read at first from a connection of which nothing is known.
const LEAST_APPETITE: u32 = 4 << 10;
/// Chains that one read fills at most.
const MAX_CHAINS: usize = 32;
/// A packet without data counts as so many bytes of a turn, and so does a buffer that is thrown away: the guest may make new ones meanwhile.
const PACKET_COST: u32 = 1 << 10;

/// How filling ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Filled {
    /// Nobody has anything for the guest.
    Idle,
    /// There is more, and the guest has no buffer for it.
    Starved,
    /// There is more, and others of the worker should get their turn.
    Turn,
}

/// How one connection's turn ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Served {
    /// It has nothing more, for now.
    Done,
    /// It has more.
    More,
    /// The guest has no buffer.
    Starved,
}

/// The queue to the guest.
pub(super) struct ToGuest {
    pub(super) queue: Queue,
    chains: Vec<Chain>,
    rooms: [u32; MAX_CHAINS],
}

impl ToGuest {
    pub(super) fn new(queue: Queue) -> Self {
        ToGuest { queue, chains: (0..MAX_CHAINS).map(|_| Chain::new()).collect(), rooms: [0; MAX_CHAINS] }
    }

    /// Gives the guest what there is for it, as far as it has buffers and `budget` (bytes) goes.
    pub(super) fn fill(
        &mut self,
        switch: &mut Switch,
        cx: &mut Context<'_>,
        budget: &mut u32,
    ) -> Result<Filled, QueueError> {
        let filled = self.fill_in_order(switch, cx, budget)?;
        // Who found no buffer because the budget was spent on bad ones goes on in the next turn.
        Ok(if filled == Filled::Starved && *budget == 0 { Filled::Turn } else { filled })
    }

    fn fill_in_order(
        &mut self,
        switch: &mut Switch,
        cx: &mut Context<'_>,
        budget: &mut u32,
    ) -> Result<Filled, QueueError> {
        while let Some(reset) = switch.resets.front() {
            if *budget == 0 {
                return Ok(Filled::Turn);
            }
            let header = reset.header(switch.guest_cid);
            if self.next_chain(switch, HEADER_LEN, budget)?.is_none() {
                return Ok(Filled::Starved);
            }
            self.write_packet(switch, &header, &[])?;
            switch.resets.pop_front();
            spend(budget, 0);
        }
        while switch.table.has_line() {
            if *budget == 0 {
                return Ok(Filled::Turn);
            }
            let Some(slot) = switch.table.next() else { break };
            match self.serve(switch, cx, slot, budget)? {
                Served::Done => {}
                Served::More => switch.table.queue(slot),
                Served::Starved => {
                    switch.table.queue_first(slot);
                    return Ok(Filled::Starved);
                }
            }
        }
        // A connection that was served may have been reset over it.
        Ok(if switch.resets.is_empty() { Filled::Idle } else { Filled::Turn })
    }

    /// One connection's turn.
    fn serve(
        &mut self,
        switch: &mut Switch,
        cx: &mut Context<'_>,
        slot: Slot,
        budget: &mut u32,
    ) -> Result<Served, QueueError> {
        let Some(connection) = switch.table.get(slot) else { return Ok(Served::Done) };
        let first = [(connection.owed.request, Op::Request), (connection.owed.response, Op::Response)];
        if let Some((_, op)) = first.into_iter().find(|(is_owed, _)| *is_owed) {
            if !self.send(switch, slot, op, 0, budget)? {
                return Ok(Served::Starved);
            }
            if let Some(connection) = switch.table.get(slot) {
                (connection.owed.request, connection.owed.response) = (false, false);
            }
            spend(budget, 0);
        }
        let mut more = self.data(switch, cx, slot, budget)?;
        if more == Served::Starved {
            return Ok(more);
        }
        // After the data, whose headers tell the credit, too.
        while let Some((op, flags)) = switch.table.get(slot).and_then(|connection| {
            if connection.credit_update_due() {
                return Some((Op::CreditUpdate, 0));
            }
            if std::mem::take(&mut connection.owed.credit_request) {
                return Some((Op::CreditRequest, 0));
            }
            connection.shutdown_due().map(|flags| (Op::Shutdown, flags))
        }) {
            if !self.send(switch, slot, op, flags, budget)? {
                return Ok(Served::Starved);
            }
            spend(budget, 0);
            let Some(connection) = switch.table.get(slot) else { break };
            match op {
                Op::CreditUpdate => connection.owed.credit_update = false,
                Op::Shutdown => connection.told = flags,
                _ => {}
            }
            if connection.told == SHUTDOWN_BOTH {
                switch.close(cx, slot);
                more = Served::Done;
            }
        }
        switch.watch_stall(cx, slot);
        Ok(more)
    }

    /// Data of one connection, at most a turn's.
    fn data(
        &mut self,
        switch: &mut Switch,
        cx: &mut Context<'_>,
        slot: Slot,
        budget: &mut u32,
    ) -> Result<Served, QueueError> {
        let Some(connection) = switch.table.get(slot).filter(|c| c.has_data()) else {
            return Ok(Served::Done);
        };
        if connection.sendable() == 0 {
            return Ok(Served::Done);
        }
        match connection.kind {
            SocketKind::Stream => self.stream(switch, cx, slot, budget),
            SocketKind::SeqPacket => self.message(switch, cx, slot, budget),
        }
    }

    /// Reads from a stream straight into the guest's buffers, as many of them as one read may fill.
    fn stream(
        &mut self,
        switch: &mut Switch,
        cx: &mut Context<'_>,
        slot: Slot,
        budget: &mut u32,
    ) -> Result<Served, QueueError> {
        let Some(connection) = switch.table.get(slot) else { return Ok(Served::Done) };
        connection.appetite = connection.appetite.clamp(LEAST_APPETITE, QUANTUM);
        let (limit, window) = (connection.appetite, connection.credit.window());
        let count = self.take_chains(switch, limit, window, budget)?;
        if count == 0 {
            return Ok(Served::Starved);
        }
        let offered = switch.segments.len();
        let Some(connection) = switch.table.get(slot) else { return Ok(Served::Done) };
        let received = match &connection.socket {
            Some(socket) => switch.segments.receive(socket),
            None => Err(Errno::NOTCONN),
        };
        let (got, may_be_more) = match received {
            Ok((got @ 1.., may_be_more)) => (got, may_be_more),
            other => {
                self.give_back(0, count)?;
                return Ok(self.no_data(switch, cx, slot, other.map(drop)));
            }
        };
        connection.readable = may_be_more || got == offered || connection.hangup;
        if got == offered {
            connection.appetite = (connection.appetite * 4).min(QUANTUM);
        } else if got < connection.appetite / 4 {
            connection.appetite /= 2;
        }
        let mut left = got;
        let mut used = 0;
        while left > 0 {
            let len = self.rooms[used].min(left);
            let mut header = connection.header(Op::Rw, switch.guest_cid);
            header.len = len.into();
            self.write(used, &header)?;
            self.queue.add_used(self.chains[used].head(), HEADER_LEN + len)?;
            connection.credit.send(len);
            (left, used) = (left - len, used + 1);
        }
        let more = connection.readable && connection.sendable() > 0;
        self.give_back(used, count)?;
        switch.shared.stats.rx_bytes_count.add(got.into());
        switch.shared.stats.rx_packets_count.add(used as u64);
        spend(budget, got);
        Ok(if more { Served::More } else { Served::Done })
    }

    /// There was no data to read: none yet, none any more, or the socket is broken.
    #[expect(clippy::unused_self, reason = "it is a step of the same work")]
    fn no_data(
        &self,
        switch: &mut Switch,
        cx: &mut Context<'_>,
        slot: Slot,
        result: Result<(), Errno>,
    ) -> Served {
        let Some(connection) = switch.table.get(slot) else { return Served::Done };
        connection.readable = false;
        match result {
            Err(Errno::AGAIN) => {}
            Ok(()) => {
                // Here is its end, whether or not the event has come.
                (connection.host_done, connection.hangup) = (true, true);
                connection.settle();
            }
            Err(_) => {
                switch.shared.stats.rx_read_fails.add(1);
                switch.kill(cx, slot);
            }
        }
        Served::Done
    }

    /// Sends the guest a piece of a message.
    fn message(
        &mut self,
        switch: &mut Switch,
        cx: &mut Context<'_>,
        slot: Slot,
        budget: &mut u32,
    ) -> Result<Served, QueueError> {
        let Some(connection) = switch.table.get(slot) else { return Ok(Served::Done) };
        if connection.to_guest.0.is_empty() {
            match connection.read_message(message_room(&mut switch.scratch)) {
                Ok(Some(())) => {}
                // An empty message, not the end.
                Ok(None) if connection.may_have_more() => {
                    spend(budget, 0);
                    return Ok(Served::More);
                }
                other => return Ok(self.no_data(switch, cx, slot, other.map(drop))),
            }
        }
        let Some(connection) = switch.table.get(slot) else { return Ok(Served::Done) };
        // Now that its length is known, it may have to wait.
        let sendable = connection.sendable();
        if sendable == 0 {
            return Ok(Served::Done);
        }
        let (message, sent) = std::mem::take(&mut connection.to_guest);
        let rest = &message[sent as usize..];
        let Some(room) = self.next_room(switch, budget)? else {
            if let Some(connection) = switch.table.get(slot) {
                connection.to_guest = (message, sent);
            }
            return Ok(Served::Starved);
        };
        let len = room.min(sendable).min(rest.len() as u32);
        let piece = &rest[..len as usize];
        let is_last = piece.len() == rest.len();
        let Some(connection) = switch.table.get(slot) else { return Ok(Served::Done) };
        let mut header = connection.header(Op::Rw, switch.guest_cid);
        header.len = len.into();
        header.flags = if is_last { END_OF_MESSAGE } else { 0 }.into();
        connection.credit.send(len);
        self.write_packet(switch, &header, piece)?;
        switch.shared.stats.rx_bytes_count.add(len.into());
        spend(budget, len);
        let Some(connection) = switch.table.get(slot) else { return Ok(Served::Done) };
        connection.to_guest = if is_last { (Vec::new(), 0) } else { (message, sent + len) };
        let more = connection.has_data() && connection.sendable() > 0;
        Ok(if more { Served::More } else { Served::Done })
    }

    /// Takes chains until they have room for `limit` bytes of data, or as many as `window` allows
    /// in so many packets, which becomes `switch.segments`. Returns how many. None: the guest has
    /// none, or `budget` was spent on those that it threw away.
    fn take_chains(
        &mut self,
        switch: &mut Switch,
        limit: u32,
        window: Window,
        budget: &mut u32,
    ) -> Result<usize, QueueError> {
        switch.segments.clear();
        let mut count = 0;
        while count < MAX_CHAINS {
            let limit = limit.min(window.bytes(count as u32 + 1));
            if switch.segments.len() >= limit {
                break;
            }
            let chain = &mut self.chains[count];
            if !self.queue.pop(chain)? {
                break;
            }
            let payload = chain.writable().split_at(HEADER_LEN).map(|(_, payload)| payload);
            let room = match payload {
                Some(payload) => switch.segments.push(&payload, limit - switch.segments.len())?,
                None => 0,
            };
            if room == 0 {
                // Too small, or too scattered for one read. Chains go back in order, so it is thrown away only as the first.
                if count > 0 {
                    self.queue.rewind(&self.chains[count])?;
                    break;
                }
                self.throw_away(switch, budget)?;
                if *budget == 0 {
                    break;
                }
                continue;
            }
            self.rooms[count] = room;
            count += 1;
        }
        Ok(count)
    }

    /// Gives the chains from `used` to `count` back, last first.
    fn give_back(&mut self, used: usize, count: usize) -> Result<(), QueueError> {
        self.chains[used..count].iter().rev().try_for_each(|chain| self.queue.rewind(chain))
    }

    /// Takes the next chain that has room for data; how much. It is `self.chains[0]`.
    fn next_room(&mut self, switch: &Switch, budget: &mut u32) -> Result<Option<u32>, QueueError> {
        self.next_chain(switch, HEADER_LEN + 1, budget).map(|room| room.map(|room| room - HEADER_LEN))
    }

    /// Takes the next chain with room for `least` bytes, throwing smaller ones away as far as `budget` goes.
    fn next_chain(
        &mut self,
        switch: &Switch,
        least: u32,
        budget: &mut u32,
    ) -> Result<Option<u32>, QueueError> {
        while self.queue.pop(&mut self.chains[0])? {
            let room = self.chains[0].writable().len();
            if room >= least {
                return Ok(Some(room));
            }
            self.throw_away(switch, budget)?;
            if *budget == 0 {
                break;
            }
        }
        Ok(None)
    }

    /// Gives the guest the chain that was taken, with nothing in it.
    fn throw_away(&mut self, switch: &Switch, budget: &mut u32) -> Result<(), QueueError> {
        switch.shared.stats.malformed_count.add(1);
        spend(budget, 0);
        self.queue.add_used(self.chains[0].head(), 0)
    }

    /// Sends a packet without data. False if the guest has no buffer; then the header is not made, which tells our account of credit.
    fn send(
        &mut self,
        switch: &mut Switch,
        slot: Slot,
        op: Op,
        flags: u32,
        budget: &mut u32,
    ) -> Result<bool, QueueError> {
        if self.next_chain(switch, HEADER_LEN, budget)?.is_none() {
            return Ok(false);
        }
        let guest_cid = switch.guest_cid;
        let mut header = switch.table.get(slot).map(|c| c.header(op, guest_cid)).unwrap_or_default();
        header.flags = flags.into();
        self.write_packet(switch, &header, &[])?;
        Ok(true)
    }

    /// Fills the chain that was taken.
    fn write_packet(&mut self, switch: &Switch, header: &Header, data: &[u8]) -> Result<(), QueueError> {
        self.write(0, header)?;
        if let Some((_, payload)) = self.chains[0].writable().split_at(HEADER_LEN) {
            payload.write(self.queue.ram(), data)?;
        }
        self.queue.add_used(self.chains[0].head(), HEADER_LEN + data.len() as u32)?;
        switch.shared.stats.rx_packets_count.add(1);
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
