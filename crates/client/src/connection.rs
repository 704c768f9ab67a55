//! [`Connection`]: one connection to an API socket, on which a request is sent and its response
//! read, each within a time limit.

use std::io::{self, ErrorKind, Read, Write};
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::time::{Duration, Instant};

use rustix::net::{AddressFamily, SocketAddrUnix, SocketFlags, SocketType, connect, socket_with, sockopt};

use crate::error::Error;
use crate::response::{ReadError, Response};

/// Shortest time limit that the kernel is asked for: zero would mean none.
const SHORTEST: Duration = Duration::from_millis(1);

/// A connection to an API socket.
///
/// [`Client`](crate::Client) has one and reconnects. A `Connection` by itself is for requests that
/// the client does not send: any bytes are sent as they are.
#[derive(Debug)]
pub struct Connection {
    stream: UnixStream,
    /// The time limits that the socket has now, for reading and writing.
    read_limit: Option<Duration>,
    write_limit: Option<Duration>,
}

impl Connection {
    /// Connects within `limit`. It has to wait only if the monitor does not accept connections.
    ///
    /// `socket` may have at most 107 bytes, the most that fit in an address.
    pub fn open(socket: &Path, limit: Duration) -> Result<Connection, Error> {
        let connected = || -> io::Result<UnixStream> {
            let address = SocketAddrUnix::new(socket)?;
            let fd = socket_with(AddressFamily::UNIX, SocketType::STREAM, SocketFlags::CLOEXEC, None)?;
            // The kernel applies it to connect(2) too.
            sockopt::set_socket_timeout(&fd, sockopt::Timeout::Send, Some(limit.max(SHORTEST)))?;
            connect(&fd, &address)?;
            Ok(fd.into())
        };
        match connected() {
            Ok(stream) => Ok(Connection { stream, read_limit: None, write_limit: Some(limit.max(SHORTEST)) }),
            Err(error) if error.kind() == ErrorKind::WouldBlock => Err(Error::Timeout { limit }),
            Err(source) => Err(Error::Connect { socket: socket.to_owned(), source }),
        }
    }

    /// Sends `request` as it is and reads one response, both within `limit`.
    ///
    /// After an error the connection is not usable any more.
    pub fn exchange(&mut self, request: &[u8], limit: Duration) -> Result<Response, Error> {
        // A limit that is too long for a clock is a day.
        let now = Instant::now();
        let deadline = now.checked_add(limit).unwrap_or(now + Duration::from_hours(24));
        let timer = Timer { limit, deadline };
        match self.send(request, &timer) {
            Ok(()) => self.receive(true, &timer),
            // The monitor closes the connection after some refusals, before it has read all. Its
            // answer is still there.
            Err(Unsent::Closed { request_sent }) => self.receive(request_sent, &timer),
            Err(Unsent::Other(error)) => Err(error),
        }
    }

    /// The socket, for a protocol other than one response for one request.
    pub fn into_stream(self) -> UnixStream {
        self.stream
    }

    fn send(&mut self, mut request: &[u8], timer: &Timer) -> Result<(), Unsent> {
        let len = request.len();
        while !request.is_empty() {
            self.limit_writing(timer)?;
            match self.stream.write(request) {
                Ok(sent) => request = &request[sent..],
                Err(error) => match error.kind() {
                    ErrorKind::Interrupted => {}
                    ErrorKind::WouldBlock => return Err(timer.over().into()),
                    ErrorKind::BrokenPipe | ErrorKind::ConnectionReset => {
                        return Err(Unsent::Closed { request_sent: request.len() < len });
                    }
                    _ => return Err(Error::Io { action: "write", source: error }.into()),
                },
            }
        }
        Ok(())
    }

    fn receive(&mut self, request_sent: bool, timer: &Timer) -> Result<Response, Error> {
        match Response::read(&mut Timed { connection: self, timer }) {
            Ok(response) => Ok(response),
            Err(ReadError::Closed) => Err(Error::Closed { request_sent }),
            Err(ReadError::Io(error)) => Err(match error.kind() {
                ErrorKind::ConnectionReset => Error::Closed { request_sent },
                ErrorKind::WouldBlock | ErrorKind::TimedOut => timer.over(),
                _ => Error::Io { action: "read", source: error },
            }),
            Err(ReadError::Protocol(error)) => Err(error.into()),
        }
    }

    /// Sets the socket's limit for writing, if it differs.
    fn limit_writing(&mut self, timer: &Timer) -> Result<(), Error> {
        let left = timer.left(self.write_limit)?;
        if self.write_limit != Some(left) {
            self.stream.set_write_timeout(Some(left)).map_err(configuring)?;
            self.write_limit = Some(left);
        }
        Ok(())
    }
}

fn configuring(source: io::Error) -> Error {
    Error::Io { action: "configure", source }
}

/// Why a request was not sent completely.
enum Unsent {
    Closed { request_sent: bool },
    Other(Error),
}

impl From<Error> for Unsent {
    fn from(error: Error) -> Unsent {
        Unsent::Other(error)
    }
}

/// The time limit of one exchange.
struct Timer {
    limit: Duration,
    deadline: Instant,
}

impl Timer {
    /// The time that is left, rounded: the socket's limit `now` is kept as long as it is at most
    /// [`SHORTEST`] or a sixteenth of the whole limit too long, so that an exchange that is quick
    /// sets none.
    fn left(&self, now: Option<Duration>) -> Result<Duration, Error> {
        let left = self.deadline.saturating_duration_since(Instant::now());
        if left.is_zero() {
            return Err(self.over());
        }
        let slack = (self.limit / 16).max(SHORTEST);
        let fits = |limit: &Duration| *limit >= left && *limit <= left + slack;
        Ok(now.filter(fits).unwrap_or_else(|| left.max(SHORTEST)))
    }

    fn over(&self) -> Error {
        Error::Timeout { limit: self.limit }
    }
}

/// The stream of a connection, with a limit on the time of all reads together.
struct Timed<'a> {
    connection: &'a mut Connection,
    timer: &'a Timer,
}

impl Read for Timed<'_> {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        let Timed { connection, timer } = self;
        let left = timer.left(connection.read_limit).map_err(|_| ErrorKind::TimedOut)?;
        if connection.read_limit != Some(left) {
            connection.stream.set_read_timeout(Some(left))?;
            connection.read_limit = Some(left);
        }
        connection.stream.read(buffer)
    }
}
