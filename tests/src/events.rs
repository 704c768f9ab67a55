//! A client of `GET /events`.

use std::io::{BufRead, BufReader, Write};
use std::os::unix::net::UnixStream;

use anyhow::{Context, Result, ensure};
use serde_json::Value;

use crate::api::ApiClient;

/// A stream of events.
#[derive(Debug)]
pub struct EventStream {
    connection: BufReader<UnixStream>,
}

/// An event.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Event {
    /// Its id, for [`EventStream::open_after`].
    pub id: String,
    /// Its name.
    pub name: String,
    /// Its fields.
    pub data: Value,
}

impl EventStream {
    /// All events that the monitor has kept, and then the new ones.
    pub fn open(api: &ApiClient) -> Result<EventStream> {
        Self::request(api, "")
    }

    /// The events after the one with this id.
    pub fn open_after(api: &ApiClient, id: &str) -> Result<EventStream> {
        Self::request(api, &format!("Last-Event-ID: {id}\r\n"))
    }

    fn request(api: &ApiClient, header: &str) -> Result<EventStream> {
        let mut connection = api.connect()?;
        write!(connection, "GET /events HTTP/1.1\r\n{header}\r\n")?;
        let mut connection = BufReader::new(connection);
        let mut head = String::new();
        while !head.ends_with("\r\n\r\n") {
            ensure!(connection.read_line(&mut head)? > 0, "closed within the head: {head}");
        }
        ensure!(head.starts_with("HTTP/1.1 200 "), "{head}");
        ensure!(head.contains("Content-Type: text/event-stream\r\n"), "{head}");
        Ok(EventStream { connection })
    }

    /// The next event; `None` once the stream has ended. Waits for it as [`ApiClient`] does for a
    /// response.
    pub fn next_event(&mut self) -> Result<Option<Event>> {
        let (mut id, mut name, mut data) = (None, None, None);
        loop {
            let mut line = String::new();
            if self.connection.read_line(&mut line).context("no event")? == 0 {
                ensure!(id.is_none(), "closed within an event");
                return Ok(None);
            }
            match line.trim_end_matches('\n').split_once(": ") {
                Some(("id", value)) => id = Some(value.to_owned()),
                Some(("event", value)) => name = Some(value.to_owned()),
                Some(("data", value)) => data = Some(serde_json::from_str(value)?),
                Some(_) => ensure!(false, "unknown line {line:?}"),
                None if line == "\n" && id.is_some() => break,
                None => ensure!(line == "\n" || line.starts_with(':'), "unknown line {line:?}"),
            }
        }
        let event = id.zip(name).zip(data).map(|((id, name), data)| Event { id, name, data });
        event.context("an event lacks a field").map(Some)
    }

    /// The next event, which must have this name. Returns its fields.
    pub fn expect(&mut self, name: &str) -> Result<Value> {
        let event = self.next_event()?.with_context(|| format!("the stream ended before {name}"))?;
        ensure!(event.name == name, "{event:?} came before {name}");
        Ok(event.data)
    }

    /// All events until the stream ends.
    pub fn rest(mut self) -> Result<Vec<Event>> {
        std::iter::from_fn(|| self.next_event().transpose()).collect()
    }
}
