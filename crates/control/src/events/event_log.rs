//! [`EventLog`] and [`Subscription`]: events from the main thread to the streams of clients.
//!
//! # The text of a stream
//!
//! Server-sent events (HTML, 9.2): for each event `id:`, `event:` and `data:`, and an empty line.
//! The id is `PROCESS-NUMBER`: PROCESS is a number of this process, so that a client that comes
//! back after a restart at the same socket does not miss the events of another process.

use std::io::Write;
use std::sync::{Arc, Mutex, OnceLock};
use std::time::{SystemTime, UNIX_EPOCH};

use sync::{EventFd, locked};

use super::event::Event;
use super::ring::{At, Ring};

/// A reader copies events until it has this many bytes, so that the lock is held for a short time.
const BATCH: usize = 4096;

/// The recent events of this process. Clones are the same log.
#[derive(Debug, Clone)]
pub struct EventLog(Arc<Shared>);

#[derive(Debug)]
struct Shared {
    /// The microVM's id.
    id: String,
    /// When the log was created, in microseconds since 1970.
    process: u64,
    state: Mutex<State>,
    /// Wakes the API thread, if there is one.
    wake: OnceLock<EventFd>,
}

#[derive(Debug)]
struct State {
    ring: Ring,
    /// How many subscriptions there are.
    subscriptions: usize,
    /// Whether the last event was published.
    ended: bool,
}

/// One reader's place in a log.
#[derive(Debug)]
pub(crate) struct Subscription {
    log: EventLog,
    /// The number of the event to read next.
    next: u64,
}

/// The outcome of [`Subscription::read`].
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Read {
    /// There was at least one event.
    Some,
    /// There is no event now.
    Nothing,
    /// There will be no more events.
    End,
}

impl EventLog {
    /// The log of the microVM `id`, without events.
    pub fn new(id: &str) -> EventLog {
        let since_epoch = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
        EventLog(Arc::new(Shared {
            id: id.to_owned(),
            process: u64::try_from(since_epoch.as_micros()).unwrap_or(u64::MAX),
            state: Mutex::new(State { ring: Ring::new(), subscriptions: 0, ended: false }),
            wake: OnceLock::new(),
        }))
    }

    /// Adds an event, and wakes the readers. Does not wait for them. After [`Event::Exit`] there
    /// are no more events.
    pub fn publish(&self, event: &Event) {
        let data = event.data(&self.0.id, SystemTime::now());
        let mut state = locked(&self.0.state);
        if state.ended {
            return;
        }
        state.ring.push(event.name(), data);
        state.ended = matches!(event, Event::Exit { .. });
        self.wake(&state);
    }

    /// Counts events that happened and are not known. Readers get an event `lost`.
    pub(crate) fn skip(&self, count: u64) {
        let mut state = locked(&self.0.state);
        if count > 0 && !state.ended {
            state.ring.skip(count);
            self.wake(&state);
        }
    }

    fn wake(&self, state: &State) {
        if state.subscriptions > 0
            && let Some(wake) = self.0.wake.get()
        {
            wake.signal();
        }
    }

    /// Sets what is signalled at each event while there is a reader. Only the first call has an
    /// effect.
    pub(crate) fn set_wake(&self, wake: EventFd) {
        let _ = self.0.wake.set(wake);
    }

    /// A reader of the events after the one whose id is `last_id`. Of all that are kept if there is
    /// none, or if it is not an id of this process. `None` if there are `limit` readers.
    pub(crate) fn subscribe(&self, last_id: Option<&str>, limit: usize) -> Option<Subscription> {
        let mut state = locked(&self.0.state);
        if state.subscriptions >= limit {
            return None;
        }
        state.subscriptions += 1;
        let last = last_id.and_then(|id| self.number_of(id)).filter(|last| *last < state.ring.next());
        Some(Subscription { log: self.clone(), next: last.unwrap_or(0) + 1 })
    }

    /// The number in an event's id, if it is an id of this process.
    fn number_of(&self, id: &str) -> Option<u64> {
        let (process, number) = id.split_once('-')?;
        if process.parse() == Ok(self.0.process) { number.parse().ok() } else { None }
    }

    fn put(&self, out: &mut Vec<u8>, number: u64, name: &str, data: &str) {
        let process = self.0.process;
        write!(out, "id: {process}-{number}\nevent: {name}\ndata: {data}\n\n")
            .expect("a vector takes any bytes");
    }
}

impl Subscription {
    /// Appends the next events to `out`: a few KiB, or one longer event.
    pub(crate) fn read(&mut self, out: &mut Vec<u8>) -> Read {
        let (log, begin) = (&self.log, out.len());
        let state = locked(&log.0.state);
        while out.len() < begin + BATCH {
            match state.ring.at(self.next) {
                At::Event(entry) => {
                    log.put(out, entry.number, entry.name, &entry.data);
                    self.next += 1;
                }
                At::Missing(count) => {
                    self.next += count;
                    // The id is that of the last lost event, so that a client that comes back with
                    // it gets the next one.
                    let id = serde_json::Value::from(log.0.id.as_str());
                    let data = format!(r#"{{"count":{count},"event":"lost","id":{id}}}"#);
                    log.put(out, self.next - 1, "lost", &data);
                }
                At::End if out.len() > begin => return Read::Some,
                At::End if state.ended => return Read::End,
                At::End => return Read::Nothing,
            }
        }
        Read::Some
    }
}

impl Drop for Subscription {
    fn drop(&mut self) {
        locked(&self.log.0.state).subscriptions -= 1;
    }
}

#[cfg(test)]
mod tests {
    use super::super::{ExitReason, MAX_EVENTS};
    use super::*;

    const EXIT: Event = Event::Exit { reason: ExitReason::PowerOff, code: 0 };

    /// What a reader gets now: the id's number, the name and the data of each event.
    fn read(reader: &mut Subscription) -> Vec<(u64, String, serde_json::Value)> {
        let mut text = Vec::new();
        while reader.read(&mut text) == Read::Some {}
        let text = String::from_utf8(text).unwrap();
        let mut events = Vec::new();
        for event in text.split_terminator("\n\n") {
            let lines: Vec<_> = event.lines().collect();
            let [id, name, data] = lines[..] else { panic!("{event}") };
            let number = id.rsplit_once('-').unwrap().1.parse().unwrap();
            assert!(id.starts_with("id: "), "{id}");
            let data = serde_json::from_str(data.strip_prefix("data: ").unwrap()).unwrap();
            events.push((number, name.strip_prefix("event: ").unwrap().to_owned(), data));
        }
        events
    }

    fn numbers(reader: &mut Subscription) -> Vec<u64> {
        read(reader).into_iter().map(|(number, ..)| number).collect()
    }

    #[test]
    fn readers_get_all_events_in_order_and_the_end() {
        let log = EventLog::new("a");
        log.publish(&Event::Paused);
        let mut reader = log.subscribe(None, 1).unwrap();
        log.publish(&Event::Resumed);
        log.publish(&EXIT);
        log.publish(&Event::Paused);
        let events = read(&mut reader);
        let names: Vec<_> = events.iter().map(|(number, name, _)| (*number, name.as_str())).collect();
        assert_eq!(names, [(1, "paused"), (2, "resumed"), (3, "exit")], "nothing comes after the exit");
        assert_eq!(events[2].2["id"], "a");
        assert_eq!(reader.read(&mut Vec::new()), Read::End);
    }

    #[test]
    fn last_event_id_continues_where_the_reader_was() {
        let log = EventLog::new("a");
        (0..3).for_each(|_| log.publish(&Event::Paused));
        let process = log.0.process;
        let after = |id: &str| numbers(&mut log.subscribe(Some(id), 1).unwrap());
        assert_eq!(after(&format!("{process}-1")), [2, 3]);
        assert_eq!(after(&format!("{process}-3")), [0; 0]);
        for other in [
            "",
            "1",
            "-1",
            "x-1",
            &format!("{}-2", process - 1),
            &format!("{process}-4"),
            &format!("{process}-99999999999999999999"),
        ] {
            assert_eq!(after(other), [1, 2, 3], "{other}");
        }
    }

    #[test]
    fn late_and_slow_readers_learn_how_much_they_lost() {
        let log = EventLog::new("a\"");
        let mut slow = log.subscribe(None, 2).unwrap();
        log.publish(&Event::Paused);
        assert_eq!(numbers(&mut slow), [1]);
        let count = MAX_EVENTS as u64 + 11;
        (1..count).for_each(|_| log.publish(&Event::Paused));
        for (reader, lost) in [(&mut slow, 10), (&mut log.subscribe(None, 2).unwrap(), 11)] {
            let events = read(reader);
            let (number, name, data) = &events[0];
            assert_eq!((*number, name.as_str(), &data["count"]), (11, "lost", &lost.into()), "{data}");
            assert_eq!(data["id"], "a\"");
            assert_eq!((events.len(), events[1].0), (MAX_EVENTS + 1, 12));
        }
        let mut back = log.subscribe(Some(&format!("{}-11", log.0.process)), 2).unwrap();
        assert_eq!(numbers(&mut back)[0], 12, "the id of a loss is one to continue from");
    }

    #[test]
    fn skipped_events_are_lost_for_every_reader() {
        let log = EventLog::new("a");
        log.skip(5);
        assert_eq!(read(&mut log.subscribe(None, 1).unwrap())[0].2["count"], 5);
    }

    #[test]
    fn only_so_many_read_at_a_time() {
        let log = EventLog::new("a");
        let first = log.subscribe(None, 2).unwrap();
        let _second = log.subscribe(None, 2).unwrap();
        assert!(log.subscribe(None, 2).is_none());
        drop(first);
        assert!(log.subscribe(None, 2).is_some());
    }

    #[test]
    fn api_thread_is_woken_only_for_readers() {
        let (log, wake) = (EventLog::new("a"), EventFd::new().unwrap());
        log.set_wake(wake.try_clone().unwrap());
        log.publish(&Event::Paused);
        assert_eq!(wake.take(), 0);
        let reader = log.subscribe(None, 1).unwrap();
        log.publish(&Event::Paused);
        assert_eq!(wake.take(), 1);
        drop(reader);
        log.publish(&Event::Paused);
        assert_eq!(wake.take(), 0);
    }

    #[test]
    fn one_read_copies_a_bounded_number_of_bytes() {
        let log = EventLog::new("a");
        (0..MAX_EVENTS)
            .for_each(|_| log.publish(&Event::Snapshot(serde_json::json!({"p": "x".repeat(1000)}))));
        let (mut reader, mut out) = (log.subscribe(None, 1).unwrap(), Vec::new());
        assert_eq!(reader.read(&mut out), Read::Some);
        assert!((BATCH..BATCH + 2000).contains(&out.len()), "{}", out.len());
    }
}
