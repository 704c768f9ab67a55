//! `GET /events` over a real socket. The test plays both the clients and the main thread.

use std::io::{BufRead, BufReader, Read, Write};
use std::os::unix::net::UnixStream;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::{Duration, Instant};

use serde_json::{Value, json};
use vesta_control::api::{ApiServer, Limits, Requests};
use vesta_control::events::{Event, EventLog, ExitReason, MAX_EVENTS};
use vesta_control::{Identity, Instance};

/// Longer than anything here takes; a test that waits so long fails.
const TIMEOUT: Duration = Duration::from_secs(30);

const HEAD: &str = "HTTP/1.1 200 \r\nServer: Firecracker API\r\nConnection: close\r\n\
                    Content-Type: text/event-stream\r\n\r\n";

struct Api {
    requests: Requests,
    events: EventLog,
    path: PathBuf,
    _dir: tempfile::TempDir,
}

impl Api {
    fn start(limits: Limits) -> Api {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("api");
        let events = EventLog::new("vm");
        let identity = Identity { id: "vm".into(), app_name: "test", version: "0", api_version: "0" };
        let instance = Arc::new(Instance::new(identity));
        let requests = ApiServer::bind(&path, limits).unwrap().spawn(instance, events.clone()).unwrap();
        Api { requests, events, path, _dir: dir }
    }

    fn connect(&self) -> Client {
        let stream = UnixStream::connect(&self.path).unwrap();
        stream.set_read_timeout(Some(TIMEOUT)).unwrap();
        stream.set_write_timeout(Some(TIMEOUT)).unwrap();
        Client(BufReader::new(stream))
    }

    /// A client whose stream has begun.
    fn watch(&self, header: &str) -> Client {
        let mut client = self.connect();
        client.ask(header);
        assert_eq!(client.head(), HEAD);
        client
    }

    /// Publishes an event that only this number tells from others.
    fn publish(&self, number: u64) {
        self.events.publish(&Event::Snapshot(json!({ "n": number })));
    }
}

struct Client(BufReader<UnixStream>);

impl Client {
    fn ask(&mut self, header: &str) {
        write!(self.0.get_mut(), "GET /events HTTP/1.1\r\n{header}\r\n").unwrap();
    }

    fn head(&mut self) -> String {
        let mut head = String::new();
        while !head.ends_with("\r\n\r\n") {
            assert_ne!(self.0.read_line(&mut head).unwrap(), 0, "closed after {head:?}");
        }
        head
    }

    /// The status of an answer without a stream, and its body.
    fn refusal(&mut self) -> (String, String) {
        let head = self.head();
        let len = head.lines().find_map(|line| line.strip_prefix("Content-Length: ")).unwrap();
        let mut body = vec![0; len.parse().unwrap()];
        self.0.read_exact(&mut body).unwrap();
        (head.split_whitespace().nth(1).unwrap().to_owned(), String::from_utf8(body).unwrap())
    }

    /// The next event: its id, name and data. Comments are skipped.
    fn event(&mut self) -> Option<(String, String, Value)> {
        let mut fields = [const { String::new() }; 3];
        loop {
            let mut line = String::new();
            if self.0.read_line(&mut line).unwrap() == 0 {
                return None;
            }
            match line.trim_end().split_once(": ") {
                Some(("id", id)) => id.clone_into(&mut fields[0]),
                Some(("event", name)) => name.clone_into(&mut fields[1]),
                Some(("data", data)) => data.clone_into(&mut fields[2]),
                _ if line == "\n" && !fields[2].is_empty() => break,
                _ => assert!(line == ":\n" || line == "\n", "{line:?}"),
            }
        }
        let [id, name, data] = fields;
        Some((id, name, serde_json::from_str(&data).unwrap()))
    }

    /// The number of the next event, and the number that was published with it.
    fn number(&mut self) -> (u64, Value) {
        let (id, _, data) = self.event().unwrap();
        (id.rsplit_once('-').unwrap().1.parse().unwrap(), data["n"].clone())
    }
}

#[test]
fn streams_get_past_and_new_events_at_once() {
    let api = Api::start(Limits::default());
    api.publish(100);
    let mut early = api.watch("");
    assert_eq!(early.number(), (1, 100.into()));
    api.publish(101);
    assert_eq!(early.number(), (2, 101.into()));
    let mut late = api.watch("");
    assert_eq!((late.number(), late.number()), ((1, 100.into()), (2, 101.into())));
    api.publish(102);
    let (id, name, data) = early.event().unwrap();
    assert_eq!((name.as_str(), &data["event"], &data["id"]), ("snapshot", &"snapshot".into(), &"vm".into()));
    assert_eq!(late.number(), (3, 102.into()));
    api.publish(103);
    let mut back = api.watch(&format!("Last-Event-ID: {id}\r\n"));
    assert_eq!(back.number(), (4, 103.into()));
}

#[test]
fn streams_end_after_the_exit() {
    let api = Api::start(Limits::default());
    let mut client = api.watch("");
    api.publish(1);
    api.events.publish(&Event::Exit { reason: ExitReason::Signal(15), code: 143 });
    // As the process ends, with nothing in between.
    drop(api.requests);
    assert_eq!(client.event().unwrap().1, "snapshot");
    let (_, name, data) = client.event().unwrap();
    assert_eq!((name.as_str(), &data["signal"], &data["code"]), ("exit", &15.into(), &143.into()));
    assert!(client.event().is_none(), "the connection is closed");
}

#[test]
fn streams_are_bounded_and_leave_connections_for_others() {
    let api = Api::start(Limits::default());
    let mut streams: Vec<_> = (0..4).map(|_| api.watch("")).collect();
    let mut fifth = api.connect();
    // Twice on one connection, which stays open.
    for _ in 0..2 {
        fifth.ask("");
        let (status, body) = fifth.refusal();
        assert_eq!((status.as_str(), body.contains("at most 4")), ("503", true), "{body}");
    }
    write!(fifth.0.get_mut(), "GET /nowhere HTTP/1.1\r\n\r\n").unwrap();
    assert_eq!(fifth.refusal().0, "400");
    // Six connections of ten are left.
    let others: Vec<_> = (0..5).map(|_| api.connect()).collect();
    assert_eq!(api.connect().refusal().0, "503");
    drop(others);
    streams.pop();
    // Nothing tells a client when another one's stream has ended.
    let deadline = Instant::now() + TIMEOUT;
    loop {
        fifth.ask("");
        if fifth.head() == HEAD {
            break;
        }
        assert!(Instant::now() < deadline, "the stream of a client that is gone is still counted");
        fifth = api.connect();
        std::thread::yield_now();
    }
    api.publish(1);
    assert_eq!(fifth.number(), (1, 1.into()));
}

#[test]
fn stalled_reader_loses_events_and_delays_nobody() {
    let api = Api::start(Limits::default());
    let (mut stalled, mut reader) = (api.watch(""), api.watch(""));
    // Far more than a socket takes. The other reader gets all of it.
    let (long, count) = ("x".repeat(64 << 10), 200);
    for number in 1..=count {
        api.events.publish(&Event::Snapshot(json!({ "n": number, "long": long })));
        assert_eq!(reader.number(), (number, number.into()));
    }
    let (mut next, mut lost) = (1, 0);
    while next <= count {
        let (id, name, data) = stalled.event().unwrap();
        let number: u64 = id.rsplit_once('-').unwrap().1.parse().unwrap();
        let missing = if name == "lost" { data["count"].as_u64().unwrap() } else { 0 };
        lost += missing;
        assert_eq!(number, next + missing.saturating_sub(1), "{name}: in order, and all losses counted");
        next = number + 1;
    }
    assert!(lost > 100, "{lost}");
    api.publish(count + 1);
    assert_eq!(stalled.number().0, count + 1);
}

#[test]
fn late_reader_learns_how_many_events_it_lost() {
    let api = Api::start(Limits::default());
    (0..MAX_EVENTS as u64 + 7).for_each(|number| api.publish(number));
    let (_, name, data) = api.watch("").event().unwrap();
    assert_eq!((name.as_str(), &data["count"]), ("lost", &7.into()));
}

#[test]
fn idle_streams_get_comments() {
    let limits = Limits { stream_comment_interval: Duration::from_millis(1), ..Limits::default() };
    let api = Api::start(limits);
    let mut client = api.watch("");
    let mut comments = [0; 9];
    client.0.read_exact(&mut comments).unwrap();
    assert_eq!(&comments, b":\n\n:\n\n:\n\n");
    api.publish(1);
    assert_eq!(client.number(), (1, 1.into()));
}

#[test]
fn input_of_a_stream_is_ignored_until_its_end() {
    let api = Api::start(Limits::default());
    let mut client = api.watch("");
    for _ in 0..100 {
        client.0.get_mut().write_all(&[b'\n'; 4096]).unwrap();
    }
    api.publish(1);
    assert_eq!(client.number(), (1, 1.into()));
    client.0.get_mut().shutdown(std::net::Shutdown::Write).unwrap();
    assert!(client.event().is_none());
}
