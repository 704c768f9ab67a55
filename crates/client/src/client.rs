//! [`Client`]: a connection that is kept and replaced, and requests of any kind. Methods for each
//! endpoint are in `endpoints`.

use std::path::{Path, PathBuf};
use std::thread;
use std::time::{Duration, Instant};

use config::InstanceInfo;
use serde::Serialize;
use serde::de::DeserializeOwned;

use crate::connection::Connection;
use crate::error::Error;
use crate::response::Response;

/// Shortest and longest pause between two attempts to reach a monitor that starts.
const PAUSES: (Duration, Duration) = (Duration::from_micros(50), Duration::from_millis(10));

/// Time limits. One that is over is an [`Error::Timeout`].
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Timeouts {
    /// Limit of connecting: 5 s by default.
    pub connect: Duration,
    /// Limit of one request with its answer: 30 s by default.
    pub answer: Duration,
    /// Limit of requests that may read or write a whole memory, or wait for the guest's disks:
    /// start, pause and resume, saving and loading snapshots, and forks. 10 minutes by default.
    pub long: Duration,
}

impl Default for Timeouts {
    fn default() -> Timeouts {
        let (connect, answer, long) =
            (Duration::from_secs(5), Duration::from_secs(30), Duration::from_mins(10));
        Timeouts { connect, answer, long }
    }
}

/// A client of one microVM's API. It connects at its first request.
#[derive(Debug)]
pub struct Client {
    socket: PathBuf,
    timeouts: Timeouts,
    connection: Option<Connection>,
}

/// Whether a request may be carried out twice.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Repeat {
    /// A second time changes nothing.
    Harmless,
    /// A second time does something else, or is refused.
    Never,
}

/// A request: everything but its connection.
#[derive(Debug)]
pub(crate) struct Request<'a> {
    pub(crate) method: &'a str,
    pub(crate) path: &'a str,
    pub(crate) body: Option<String>,
    pub(crate) repeat: Repeat,
    pub(crate) limit: Duration,
}

impl Client {
    /// A client of the API at the Unix socket `socket`, which need not exist yet.
    pub fn new(socket: impl Into<PathBuf>) -> Client {
        Client { socket: socket.into(), timeouts: Timeouts::default(), connection: None }
    }

    /// Sets the time limits.
    #[must_use]
    pub fn with_timeouts(mut self, timeouts: Timeouts) -> Client {
        self.timeouts = timeouts;
        self
    }

    /// The time limits.
    pub fn timeouts(&self) -> Timeouts {
        self.timeouts
    }

    /// The API socket.
    pub fn socket(&self) -> &Path {
        &self.socket
    }

    /// Waits until the monitor answers `GET /`.
    ///
    /// It waits while there is no socket, no monitor listens on it, or all connections are taken
    /// (503). Other errors are returned at once. The caller knows whether the process still runs.
    pub fn wait_until_ready(&mut self, limit: Duration) -> Result<InstanceInfo, Error> {
        let begin = Instant::now();
        loop {
            let error = match self.instance() {
                Ok(info) => return Ok(info),
                Err(error) if error.is_absent() || error.status() == Some(503) => error,
                Err(error) => return Err(error),
            };
            let elapsed = begin.elapsed();
            if elapsed >= limit {
                return Err(error);
            }
            // Nothing notifies of a new socket.
            thread::sleep((elapsed / 16).clamp(PAUSES.0, PAUSES.1));
        }
    }

    /// Sends a `GET` and returns the answer. For endpoints that this client has no method for.
    pub fn get<T: DeserializeOwned>(&mut self, path: &str) -> Result<T, Error> {
        self.ask(&self.request("GET", path, Repeat::Harmless))
    }

    /// Sends a `PUT` that has no answer. It is not repeated.
    pub fn put(&mut self, path: &str, body: &impl Serialize) -> Result<(), Error> {
        self.tell(&self.request("PUT", path, Repeat::Never).with_body(body)?)
    }

    /// Sends a `PATCH` that has no answer. It is not repeated.
    pub fn patch(&mut self, path: &str, body: &impl Serialize) -> Result<(), Error> {
        self.tell(&self.request("PATCH", path, Repeat::Never).with_body(body)?)
    }

    /// Sends any request within `limit` and returns the response, whatever its status. `body` is
    /// sent as it is, with the content type of JSON. It is repeated if it is a `GET`.
    pub fn send(
        &mut self,
        method: &str,
        path: &str,
        body: Option<String>,
        limit: Duration,
    ) -> Result<Response, Error> {
        let repeat = if method == "GET" { Repeat::Harmless } else { Repeat::Never };
        self.exchange(&Request { method, path, body, repeat, limit })
    }

    /// Sends any bytes on the kept connection, or on a new one if there is none, and reads one
    /// response, both within `limit`. Nothing is repeated.
    pub fn send_raw(&mut self, bytes: &[u8], limit: Duration) -> Result<Response, Error> {
        let connection = match self.connection.take() {
            Some(connection) => connection,
            None => self.connect()?,
        };
        self.exchange_on(connection, bytes, limit)
    }

    /// Opens a connection of the caller's own.
    pub fn connect(&self) -> Result<Connection, Error> {
        Connection::open(&self.socket, self.timeouts.connect)
    }

    /// Closes the kept connection. The next request opens another one.
    pub fn disconnect(&mut self) {
        self.connection = None;
    }

    /// A request without a body, with the usual limit.
    pub(crate) fn request<'a>(&self, method: &'a str, path: &'a str, repeat: Repeat) -> Request<'a> {
        Request { method, path, body: None, repeat, limit: self.timeouts.answer }
    }

    /// Sends `request`, whose answer is empty.
    pub(crate) fn tell(&mut self, request: &Request<'_>) -> Result<(), Error> {
        self.accepted(request).map(drop)
    }

    /// Sends `request` and reads its answer.
    pub(crate) fn ask<T: DeserializeOwned>(&mut self, request: &Request<'_>) -> Result<T, Error> {
        let response = self.accepted(request)?;
        serde_json::from_str(&response.body)
            .map_err(|source| Error::Answer { request: request.name(), source })
    }

    /// Sends `request`; the response is a success.
    pub(crate) fn accepted(&mut self, request: &Request<'_>) -> Result<Response, Error> {
        let response = self.exchange(request)?;
        if response.is_success() {
            return Ok(response);
        }
        let (status, fault_message) = (response.status, response.fault_message());
        Err(Error::Refused { request: request.name(), status, fault_message })
    }

    /// Sends `request` on the kept connection. Where the monitor has closed it, sends it on a new
    /// one, if it was not sent, or if to repeat it is harmless.
    fn exchange(&mut self, request: &Request<'_>) -> Result<Response, Error> {
        let bytes = request.bytes();
        let mut sent_before = false;
        if let Some(connection) = self.connection.take() {
            match self.exchange_on(connection, &bytes, request.limit) {
                Err(Error::Closed { request_sent })
                    if !request_sent || request.repeat == Repeat::Harmless =>
                {
                    sent_before = request_sent;
                }
                result => return result,
            }
        }
        let connection = match self.connect() {
            // The first connection may have delivered it.
            Err(Error::Connect { .. }) if sent_before => return Err(Error::Closed { request_sent: true }),
            connected => connected?,
        };
        self.exchange_on(connection, &bytes, request.limit)
    }

    /// Keeps the connection if another request can be sent on it.
    fn exchange_on(
        &mut self,
        mut connection: Connection,
        bytes: &[u8],
        limit: Duration,
    ) -> Result<Response, Error> {
        let response = connection.exchange(bytes, limit)?;
        self.connection = response.keeps_connection().then_some(connection);
        Ok(response)
    }
}

impl Request<'_> {
    /// Sets the body.
    pub(crate) fn with_body(mut self, body: &impl Serialize) -> Result<Self, Error> {
        let json = serde_json::to_string(body);
        self.body = Some(json.map_err(|source| Error::Body { request: self.name(), source })?);
        Ok(self)
    }

    /// Sets the limit.
    pub(crate) fn within(self, limit: Duration) -> Self {
        Request { limit, ..self }
    }

    /// Method and path.
    fn name(&self) -> String {
        format!("{} {}", self.method, self.path)
    }

    fn bytes(&self) -> Vec<u8> {
        let Request { method, path, body, .. } = self;
        let head = format!("{method} {path} HTTP/1.1\r\nHost: localhost\r\nAccept: application/json\r\n");
        match body {
            None => head + "\r\n",
            Some(body) => {
                let len = body.len();
                format!("{head}Content-Type: application/json\r\nContent-Length: {len}\r\n\r\n{body}")
            }
        }
        .into_bytes()
    }
}
