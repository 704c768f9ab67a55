//! All connections: by slot, by ports and by deadline. Also the ready queue of connections with
//! packets for the guest, and the connections that wait for a host server.
//!
//! # Invariants
//!
//! - A slot is in the ready queue at most once, even if another connection has taken it meanwhile.
//!   Only slots of existing connections wait for a server.
//! - `reserved` is the sum of [`Connection::max_buffered`] of all connections.

use std::collections::{BTreeMap, BTreeSet, HashMap, VecDeque};
use std::ops::Bound;
use std::sync::atomic::{AtomicU32, Ordering};

use virtio::worker::Nanos;

use crate::connection::{Connection, Key, MAX_MESSAGE, ServerKey, State};
use crate::packet::SocketKind;

/// Maximum number of connections of a device, including those that are being opened or closed.
pub const MAX_CONNECTIONS: usize = 4096;

/// Maximum number of bytes that all connections together buffer.
pub const MAX_BUFFERED: u64 = 128 << 20;

/// Credit of a stream while the reserved memory is at most [`PLENTY`].
const FULL_CREDIT: u32 = 256 << 10;
/// Credit of a stream beyond that.
const SMALL_CREDIT: u32 = 16 << 10;
/// Reserved memory in bytes above which streams get [`SMALL_CREDIT`].
const PLENTY: u64 = 32 << 20;

/// First host port of host clients, and the number of such ports.
const FIRST_PORT: u32 = 1 << 30;
const PORTS: u32 = 1 << 30;

/// Index of a connection, and the token of its socket at the worker.
pub(crate) type Slot = u32;

/// All connections of a device.
#[derive(Debug, Default)]
pub(crate) struct Table {
    slots: Vec<Option<Connection>>,
    free: Vec<Slot>,
    /// For each slot, whether it is in `ready_queue`.
    in_ready_queue: Vec<bool>,
    ready_queue: VecDeque<Slot>,
    keys: HashMap<Key, Slot>,
    deadlines: BTreeSet<(Nanos, Slot)>,
    /// For each server with a full backlog, the connections that wait for it, by ticket.
    waiting: BTreeMap<ServerKey, BTreeMap<u64, Slot>>,
    next_ticket: u64,
    reserved: u64,
}

impl Table {
    /// Adds a connection. `None` if there are too many, or too much memory is reserved.
    pub(crate) fn add(&mut self, kind: SocketKind, state: State) -> Option<Slot> {
        let credit = match kind {
            SocketKind::Stream if self.reserved + u64::from(FULL_CREDIT) <= PLENTY => FULL_CREDIT,
            SocketKind::Stream => SMALL_CREDIT,
            SocketKind::SeqPacket => MAX_MESSAGE,
        };
        let connection = Connection::new(kind, state, credit);
        if self.len() == MAX_CONNECTIONS || self.reserved + connection.max_buffered() > MAX_BUFFERED {
            return None;
        }
        self.reserved += connection.max_buffered();
        let connection = Some(connection);
        Some(match self.free.pop() {
            Some(slot) => {
                self.slots[slot as usize] = connection;
                slot
            }
            None => {
                self.slots.push(connection);
                self.in_ready_queue.push(false);
                self.slots.len() as Slot - 1
            }
        })
    }

    /// Number of connections.
    pub(crate) fn len(&self) -> usize {
        self.slots.len() - self.free.len()
    }

    /// The connection in this slot.
    pub(crate) fn get(&mut self, slot: Slot) -> Option<&mut Connection> {
        self.slots.get_mut(slot as usize)?.as_mut()
    }

    /// The slot of the connection with these ports.
    pub(crate) fn find(&self, key: Key) -> Option<Slot> {
        self.keys.get(&key).copied()
    }

    /// Removes a connection.
    pub(crate) fn remove(&mut self, slot: Slot) -> Option<Connection> {
        self.stop_waiting(slot);
        self.forget_key(slot);
        self.set_deadline(slot, None);
        let connection = self.slots.get_mut(slot as usize)?.take()?;
        self.free.push(slot);
        self.reserved -= connection.max_buffered();
        Some(connection)
    }

    /// The slots of all connections.
    pub(crate) fn all(&self) -> Vec<Slot> {
        (0..).zip(&self.slots).filter(|(_, c)| c.is_some()).map(|(slot, _)| slot).collect()
    }

    /// Sets the ports of a connection. No other connection may have them.
    pub(crate) fn set_key(&mut self, slot: Slot, key: Key) {
        if let Some(connection) = self.get(slot) {
            connection.key = Some(key);
            self.keys.insert(key, slot);
        }
    }

    /// Removes the ports of a connection, so that another one may have them.
    pub(crate) fn forget_key(&mut self, slot: Slot) {
        if let Some(key) = self.get(slot).and_then(|connection| connection.key.take()) {
            self.keys.remove(&key);
        }
    }

    /// Ports for a host client's connection to this port of the guest. `next` is the index of the
    /// next host port, which is advanced.
    pub(crate) fn new_key(&self, guest_port: u32, next: &AtomicU32) -> Key {
        loop {
            let port = next.load(Ordering::Relaxed) % PORTS;
            next.store((port + 1) % PORTS, Ordering::Relaxed);
            let key = Key { host_port: FIRST_PORT + port, guest_port };
            // Ends, as there are more ports than connections.
            if !self.keys.contains_key(&key) {
                return key;
            }
        }
    }

    /// Sets or clears the deadline of a connection.
    pub(crate) fn set_deadline(&mut self, slot: Slot, deadline: Option<Nanos>) {
        let Some(connection) = self.get(slot) else { return };
        let old = std::mem::replace(&mut connection.deadline, deadline);
        if let Some(old) = old {
            self.deadlines.remove(&(old, slot));
        }
        if let Some(deadline) = deadline {
            self.deadlines.insert((deadline, slot));
        }
    }

    /// The earliest deadline.
    pub(crate) fn next_deadline(&self) -> Option<Nanos> {
        self.deadlines.first().map(|&(at, _)| at)
    }

    /// A connection whose deadline has passed. The deadline is cleared.
    pub(crate) fn expired(&mut self, now: Nanos) -> Option<Slot> {
        let &(at, slot) = self.deadlines.first()?;
        (at <= now).then(|| self.set_deadline(slot, None)).map(|()| slot)
    }

    /// Moves all deadlines by the duration of a pause.
    pub(crate) fn postpone(&mut self, by: Nanos) {
        for slot in self.all() {
            if let Some(connection) = self.get(slot) {
                let deadline = connection.deadline.map(|at| at.saturating_add(by));
                self.set_deadline(slot, deadline);
            }
        }
    }

    /// Appends a connection, whose ports are known, to those that wait for its host server.
    pub(crate) fn wait_for_server(&mut self, slot: Slot) {
        let ticket = self.next_ticket;
        let Some(connection) = self.get(slot) else { return };
        let Some(server) = connection.server().filter(|_| connection.ticket.is_none()) else { return };
        connection.ticket = Some(ticket);
        self.next_ticket += 1;
        self.waiting.entry(server).or_default().insert(ticket, slot);
    }

    /// The connection no longer waits for a host server.
    pub(crate) fn stop_waiting(&mut self, slot: Slot) {
        let Some(connection) = self.get(slot) else { return };
        let (Some(server), Some(ticket)) = (connection.server(), connection.ticket.take()) else { return };
        if let Some(tickets) = self.waiting.get_mut(&server) {
            tickets.remove(&ticket);
            if tickets.is_empty() {
                self.waiting.remove(&server);
            }
        }
    }

    /// The connection that has waited for this server for the longest time.
    pub(crate) fn first_waiting(&self, server: ServerKey) -> Option<Slot> {
        self.waiting.get(&server)?.values().next().copied()
    }

    /// Number of servers that connections wait for.
    pub(crate) fn servers(&self) -> usize {
        self.waiting.len()
    }

    /// The server after `last`, in round-robin order, that connections wait for.
    pub(crate) fn next_server_after(&self, last: Option<ServerKey>) -> Option<ServerKey> {
        let after =
            last.and_then(|last| self.waiting.range((Bound::Excluded(last), Bound::Unbounded)).next());
        after.or_else(|| self.waiting.first_key_value()).map(|(server, _)| *server)
    }

    /// Appends a slot to the ready queue, unless it is there.
    pub(crate) fn enqueue(&mut self, slot: Slot) {
        let in_ready_queue = &mut self.in_ready_queue[slot as usize];
        if !*in_ready_queue {
            *in_ready_queue = true;
            self.ready_queue.push_back(slot);
        }
    }

    /// Puts a slot back at the front of the ready queue, unless it is there.
    pub(crate) fn enqueue_front(&mut self, slot: Slot) {
        let in_ready_queue = &mut self.in_ready_queue[slot as usize];
        if !*in_ready_queue {
            *in_ready_queue = true;
            self.ready_queue.push_front(slot);
        }
    }

    /// Takes the first slot from the ready queue. Its connection may be gone.
    pub(crate) fn dequeue(&mut self) -> Option<Slot> {
        let slot = self.ready_queue.pop_front()?;
        self.in_ready_queue[slot as usize] = false;
        Some(slot)
    }

    /// Whether the ready queue has entries.
    pub(crate) fn has_ready(&self) -> bool {
        !self.ready_queue.is_empty()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn stream(table: &mut Table) -> Option<Slot> {
        table.add(SocketKind::Stream, State::AwaitingConnect)
    }

    #[test]
    fn connections_and_their_credit_are_bounded() {
        let mut table = Table::default();
        let slots: Vec<_> = (0..MAX_CONNECTIONS).map(|_| stream(&mut table).unwrap()).collect();
        assert_eq!(stream(&mut table), None);
        assert_eq!(table.get(slots[0]).unwrap().credit.buf_alloc(), FULL_CREDIT);
        assert_eq!(table.get(slots[MAX_CONNECTIONS - 1]).unwrap().credit.buf_alloc(), SMALL_CREDIT);
        assert!(table.reserved <= MAX_BUFFERED);
        for slot in slots {
            table.remove(slot).unwrap();
        }
        assert_eq!((table.len(), table.reserved), (0, 0));
        let messages = (0..MAX_CONNECTIONS)
            .filter_map(|_| table.add(SocketKind::SeqPacket, State::AwaitingConnect))
            .count();
        assert_eq!(messages, 682, "each buffers messages in both directions, and the lengths of the guest's");
    }

    #[test]
    fn keys_are_found_until_removed_and_ports_are_unique() {
        let mut table = Table::default();
        let slot = stream(&mut table).unwrap();
        let next = AtomicU32::new(0);
        let key = table.new_key(7, &next);
        assert_eq!(key, Key { host_port: 1 << 30, guest_port: 7 });
        table.set_key(slot, key);
        next.store(0, Ordering::Relaxed);
        assert_eq!(table.new_key(7, &next).host_port, (1 << 30) + 1);
        // The saved index is not checked.
        for last in [PORTS - 1, u32::MAX] {
            next.store(last, Ordering::Relaxed);
            assert_eq!(table.new_key(8, &next).host_port, (1 << 31) - 1);
            assert_eq!(table.new_key(8, &next).host_port, 1 << 30, "another port of the guest");
        }
        assert_eq!(table.find(key), Some(slot));
        table.remove(slot);
        assert_eq!(table.find(key), None);
    }

    #[test]
    fn a_reused_slot_is_in_the_ready_queue_once() {
        let mut table = Table::default();
        for _ in 0..3 {
            let slot = stream(&mut table).unwrap();
            table.enqueue(slot);
            table.remove(slot);
        }
        assert_eq!((table.dequeue(), table.dequeue()), (Some(0), None));
        let (a, b) = (stream(&mut table).unwrap(), stream(&mut table).unwrap());
        table.enqueue(a);
        table.enqueue(b);
        assert_eq!(table.dequeue(), Some(a));
        table.enqueue_front(a);
        table.enqueue(a);
        assert_eq!((table.dequeue(), table.dequeue(), table.dequeue()), (Some(a), Some(b), None));
    }

    #[test]
    fn deadlines_expire_in_order_and_can_be_moved() {
        let mut table = Table::default();
        let (a, b) = (stream(&mut table).unwrap(), stream(&mut table).unwrap());
        table.set_deadline(a, Some(20));
        table.set_deadline(b, Some(10));
        table.set_deadline(a, Some(15));
        assert_eq!((table.expired(9), table.next_deadline()), (None, Some(10)));
        table.postpone(100);
        assert_eq!((table.expired(110), table.expired(114), table.expired(115)), (Some(b), None, Some(a)));
        assert_eq!(table.next_deadline(), None);
        table.set_deadline(a, Some(1));
        table.remove(a);
        assert_eq!(table.next_deadline(), None);
    }

    #[test]
    fn waiters_are_served_in_order_and_servers_round_robin() {
        let mut table = Table::default();
        let wait = |table: &mut Table, host_port, guest_port| {
            let slot = stream(table).unwrap();
            table.set_key(slot, Key { host_port, guest_port });
            table.wait_for_server(slot);
            table.wait_for_server(slot);
            slot
        };
        let (a, b, c) = (wait(&mut table, 5, 1), wait(&mut table, 5, 2), wait(&mut table, 7, 1));
        let [five, seven] = [5, 7].map(|port| (port, SocketKind::Stream));
        assert_eq!((table.first_waiting(five), table.first_waiting(seven)), (Some(a), Some(c)));
        table.remove(a);
        // It reuses the free slot, and waits behind the other one.
        let d = wait(&mut table, 5, 3);
        assert_eq!((d, table.first_waiting(five)), (a, Some(b)));
        assert_eq!(
            [None, Some(five), Some(seven)].map(|last| table.next_server_after(last)),
            [Some(five), Some(seven), Some(five)]
        );
        for slot in [b, c, d] {
            table.stop_waiting(slot);
        }
        assert_eq!((table.servers(), table.next_server_after(Some(five))), (0, None));
    }
}
