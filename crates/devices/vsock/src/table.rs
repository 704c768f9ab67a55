//! All connections: by ports, by deadline, and the lines of those that have something for the guest and of those that wait_for_server for a host server.
//!
//! # Invariants
//!
//! - A slot is in the line for the guest at most once, whoever has it. Only a connection that there is waits for a server.
//! - `reserved` is the sum of what all connections can be made to keep.

use std::collections::{BTreeMap, BTreeSet, HashMap, VecDeque};
use std::ops::Bound;
use std::sync::atomic::{AtomicU32, Ordering};

use super::connection::{Connection, Key, MAX_MESSAGE, State};
use super::packet::SocketKind;
use virtio::worker::Nanos;

/// The most connections of a device, those that begin or end included.
pub const MAX_CONNECTIONS: usize = 4096;

/// The most bytes that all connections together can be made to keep.
pub const MAX_BUFFERED: u64 = 128 << 20;

/// Credit of a stream while there is plenty.
const FULL_CREDIT: u32 = 256 << 10;
/// Credit of a stream when connections can be made to keep [`PLENTY`].
const SMALL_CREDIT: u32 = 16 << 10;
const PLENTY: u64 = 32 << 20;

/// The first port that host clients get, and how many there are.
const FIRST_PORT: u32 = 1 << 30;
const PORTS: u32 = 1 << 30;

/// A connection's place, and its token at the worker.
pub(super) type Slot = u32;

/// Whoever serves a port on the host.
pub(super) type ServerKey = (u32, SocketKind);

/// The connections.
#[derive(Debug, Default)]
pub(super) struct Table {
    slots: Vec<Option<Connection>>,
    free: Vec<Slot>,
    /// Which slots are in the line.
    in_ready_queue: Vec<bool>,
    ready_queue: VecDeque<Slot>,
    keys: HashMap<Key, Slot>,
    deadlines: BTreeSet<(Nanos, Slot)>,
    /// For each server that has no time, who waits for it, by their turn.
    waiting: BTreeMap<ServerKey, BTreeMap<u64, Slot>>,
    next_ticket: u64,
    reserved: u64,
}

impl Table {
    /// Adds a connection; None if there is no room.
    pub(super) fn add(&mut self, kind: SocketKind, state: State) -> Option<Slot> {
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

    /// How many there are.
    pub(super) fn len(&self) -> usize {
        self.slots.len() - self.free.len()
    }

    /// A connection.
    pub(super) fn get(&mut self, slot: Slot) -> Option<&mut Connection> {
        self.slots.get_mut(slot as usize)?.as_mut()
    }

    /// The connection of these ports.
    pub(super) fn find(&self, key: Key) -> Option<Slot> {
        self.keys.get(&key).copied()
    }

    /// Takes a connection out.
    pub(super) fn remove(&mut self, slot: Slot) -> Option<Connection> {
        self.stop_waiting(slot);
        self.forget_key(slot);
        self.set_deadline(slot, None);
        let connection = self.slots.get_mut(slot as usize)?.take()?;
        self.free.push(slot);
        self.reserved -= connection.max_buffered();
        Some(connection)
    }

    /// The slots of all connections.
    pub(super) fn all(&self) -> Vec<Slot> {
        (0..).zip(&self.slots).filter(|(_, c)| c.is_some()).map(|(slot, _)| slot).collect()
    }

    /// Gives a connection its name, which is free.
    pub(super) fn set_key(&mut self, slot: Slot, key: Key) {
        if let Some(connection) = self.get(slot) {
            connection.key = Some(key);
            self.keys.insert(key, slot);
        }
    }

    /// Takes a connection's name away: the guest may use its port again.
    pub(super) fn forget_key(&mut self, slot: Slot) {
        if let Some(key) = self.get(slot).and_then(|connection| connection.key.take()) {
            self.keys.remove(&key);
        }
    }

    /// A name for a host client's connection to this port of the guest; `next` is whose turn it is among the host's ports.
    pub(super) fn new_key(&self, guest_port: u32, next: &AtomicU32) -> Key {
        loop {
            let turn = next.load(Ordering::Relaxed) % PORTS;
            next.store((turn + 1) % PORTS, Ordering::Relaxed);
            let key = Key { host_port: FIRST_PORT + turn, guest_port };
            // There are many more ports than connections.
            if !self.keys.contains_key(&key) {
                return key;
            }
        }
    }

    /// Sets when a connection has waited long enough.
    pub(super) fn set_deadline(&mut self, slot: Slot, deadline: Option<Nanos>) {
        let Some(connection) = self.get(slot) else { return };
        let old = std::mem::replace(&mut connection.deadline, deadline);
        if let Some(old) = old {
            self.deadlines.remove(&(old, slot));
        }
        if let Some(deadline) = deadline {
            self.deadlines.insert((deadline, slot));
        }
    }

    /// The first deadline.
    pub(super) fn next_deadline(&self) -> Option<Nanos> {
        self.deadlines.first().map(|&(at, _)| at)
    }

    /// A connection that has waited long enough; its deadline is no more.
    pub(super) fn expired(&mut self, now: Nanos) -> Option<Slot> {
        let &(at, slot) = self.deadlines.first()?;
        (at <= now).then(|| self.set_deadline(slot, None)).map(|()| slot)
    }

    /// All deadlines come later: time in which nobody could do anything does not count.
    pub(super) fn postpone(&mut self, by: Nanos) {
        for slot in self.all() {
            if let Some(connection) = self.get(slot) {
                let deadline = connection.deadline.map(|at| at.saturating_add(by));
                self.set_deadline(slot, deadline);
            }
        }
    }

    /// Lets a connection, which has a name, wait_for_server for the server that it wants.
    pub(super) fn wait_for_server(&mut self, slot: Slot) {
        let turn = self.next_ticket;
        let Some(connection) = self.get(slot) else { return };
        let Some(server) = connection.server().filter(|_| connection.ticket.is_none()) else { return };
        connection.ticket = Some(turn);
        self.next_ticket += 1;
        self.waiting.entry(server).or_default().insert(turn, slot);
    }

    /// A connection waits no more.
    pub(super) fn stop_waiting(&mut self, slot: Slot) {
        let Some(connection) = self.get(slot) else { return };
        let (Some(server), Some(turn)) = (connection.server(), connection.ticket.take()) else { return };
        if let Some(line) = self.waiting.get_mut(&server) {
            line.remove(&turn);
            if line.is_empty() {
                self.waiting.remove(&server);
            }
        }
    }

    /// Who waits for this server, and came first.
    pub(super) fn first_waiting(&self, server: ServerKey) -> Option<Slot> {
        self.waiting.get(&server)?.values().next().copied()
    }

    /// How many servers are waited for.
    pub(super) fn servers(&self) -> usize {
        self.waiting.len()
    }

    /// The next server that is waited for after this one, in a circle.
    pub(super) fn next_server_after(&self, last: Option<ServerKey>) -> Option<ServerKey> {
        let after =
            last.and_then(|last| self.waiting.range((Bound::Excluded(last), Bound::Unbounded)).next());
        after.or_else(|| self.waiting.first_key_value()).map(|(server, _)| *server)
    }

    /// Puts a connection at the end of the line, unless it stands in it.
    pub(super) fn enqueue(&mut self, slot: Slot) {
        let in_ready_queue = &mut self.in_ready_queue[slot as usize];
        if !*in_ready_queue {
            *in_ready_queue = true;
            self.ready_queue.push_back(slot);
        }
    }

    /// Puts a connection back where it came from.
    pub(super) fn enqueue_front(&mut self, slot: Slot) {
        let in_ready_queue = &mut self.in_ready_queue[slot as usize];
        if !*in_ready_queue {
            *in_ready_queue = true;
            self.ready_queue.push_front(slot);
        }
    }

    /// Whose turn it is. The connection may be gone.
    pub(super) fn dequeue(&mut self) -> Option<Slot> {
        let slot = self.ready_queue.pop_front()?;
        self.in_ready_queue[slot as usize] = false;
        Some(slot)
    }

    /// Whether anybody stands in line.
    pub(super) fn has_ready(&self) -> bool {
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
    fn there_is_room_for_so_many_and_their_credit_is_bounded() {
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
        let messages =
            (0..MAX_CONNECTIONS).filter_map(|_| table.add(SocketKind::SeqPacket, State::AwaitingConnect)).count();
        assert_eq!(messages, 682, "each keeps messages both ways, and the lengths of those from the guest");
    }

    #[test]
    fn names_are_found_until_they_are_forgotten_and_ports_are_not_given_twice() {
        let mut table = Table::default();
        let slot = stream(&mut table).unwrap();
        let next = AtomicU32::new(0);
        let key = table.new_key(7, &next);
        assert_eq!(key, Key { host_port: 1 << 30, guest_port: 7 });
        table.set_key(slot, key);
        next.store(0, Ordering::Relaxed);
        assert_eq!(table.new_key(7, &next).host_port, (1 << 30) + 1);
        // A saved device may say anything.
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
    fn a_slot_stands_in_line_once_whoever_has_it() {
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
    fn deadlines_come_in_order_and_can_be_moved() {
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
    fn who_came_first_is_the_first_that_waits_and_servers_come_in_a_circle() {
        let mut table = Table::default();
        let wait_for_server = |table: &mut Table, host_port, guest_port| {
            let slot = stream(table).unwrap();
            table.set_key(slot, Key { host_port, guest_port });
            table.wait_for_server(slot);
            table.wait_for_server(slot);
            slot
        };
        let (a, b, c) = (wait_for_server(&mut table, 5, 1), wait_for_server(&mut table, 5, 2), wait_for_server(&mut table, 7, 1));
        let [five, seven] = [5, 7].map(|port| (port, SocketKind::Stream));
        assert_eq!((table.first_waiting(five), table.first_waiting(seven)), (Some(a), Some(c)));
        table.remove(a);
        // It has the slot that was free, and comes after the other.
        let d = wait_for_server(&mut table, 5, 3);
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
