//! [`Ring`]: the recent events, numbered.

use std::collections::VecDeque;

/// Most events that are kept.
pub const MAX_EVENTS: usize = 64;

/// Most bytes of events that are kept. The newest event is kept even if it is longer.
pub const MAX_BYTES: usize = 128 << 10;

/// An event, ready to be sent.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Entry {
    /// Its number; the first event of a process has 1.
    pub(super) number: u64,
    pub(super) name: &'static str,
    /// A JSON object on one line.
    pub(super) data: String,
}

/// The recent events. The oldest ones are dropped to make place for new ones.
#[derive(Debug)]
pub(super) struct Ring {
    /// Their numbers grow. There are gaps where events were skipped.
    entries: VecDeque<Entry>,
    /// The bytes of their data.
    bytes: usize,
    /// The number of the next event.
    next: u64,
}

/// What a reader finds at its place in a ring.
#[derive(Debug, PartialEq, Eq)]
pub(super) enum At<'a> {
    /// The event with the number that it asked for.
    Event(&'a Entry),
    /// So many events are missing from that number on.
    Missing(u64),
    /// No event has that number yet.
    End,
}

impl Ring {
    /// An empty ring, which has no memory yet.
    pub(super) fn new() -> Ring {
        Ring { entries: VecDeque::new(), bytes: 0, next: 1 }
    }

    /// Adds an event.
    pub(super) fn push(&mut self, name: &'static str, data: String) {
        self.bytes += data.len();
        self.entries.push_back(Entry { number: self.next, name, data });
        self.next += 1;
        while self.entries.len() > MAX_EVENTS || (self.bytes > MAX_BYTES && self.entries.len() > 1) {
            let dropped = self.entries.pop_front();
            self.bytes -= dropped.map_or(0, |entry| entry.data.len());
        }
    }

    /// Gives numbers to `count` events that happened and are not known.
    pub(super) fn skip(&mut self, count: u64) {
        self.next += count;
    }

    /// The number of the next event.
    pub(super) fn next(&self) -> u64 {
        self.next
    }

    /// What is at `number`, which is at least 1.
    pub(super) fn at(&self, number: u64) -> At<'_> {
        let index = self.entries.partition_point(|entry| entry.number < number);
        match self.entries.get(index) {
            Some(entry) if entry.number == number => At::Event(entry),
            Some(entry) => At::Missing(entry.number - number),
            None if number < self.next => At::Missing(self.next - number),
            None => At::End,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn data(ring: &Ring, number: u64) -> &str {
        let At::Event(entry) = ring.at(number) else { panic!("{number}: {:?}", ring.at(number)) };
        &entry.data
    }

    #[test]
    fn ring_keeps_the_last_events() {
        let mut ring = Ring::new();
        assert_eq!(ring.at(1), At::End);
        let count = MAX_EVENTS as u64 + 10;
        (1..=count).for_each(|n| ring.push("n", n.to_string()));
        assert_eq!(ring.at(1), At::Missing(10));
        assert_eq!(ring.at(10), At::Missing(1));
        assert!((11..=count).all(|n| data(&ring, n) == n.to_string()));
        assert_eq!((ring.at(count + 1), ring.next()), (At::End, count + 1));
    }

    #[test]
    fn long_events_displace_more() {
        let mut ring = Ring::new();
        (0..8).for_each(|_| ring.push("n", "x".repeat(MAX_BYTES / 4)));
        assert_eq!(ring.at(1), At::Missing(4));
        assert_eq!(ring.bytes, MAX_BYTES);
        ring.push("n", "y".repeat(2 * MAX_BYTES));
        assert_eq!((ring.at(1), ring.entries.len()), (At::Missing(8), 1));
        assert_eq!(data(&ring, 9).len(), 2 * MAX_BYTES, "the newest is kept");
    }

    #[test]
    fn skipped_events_are_missing_between_others() {
        let mut ring = Ring::new();
        ring.push("n", "a".into());
        ring.skip(3);
        assert_eq!(ring.at(2), At::Missing(3), "at the end too");
        ring.push("n", "b".into());
        assert_eq!((ring.at(2), ring.at(4)), (At::Missing(3), At::Missing(1)));
        assert_eq!(data(&ring, 5), "b");
    }
}
