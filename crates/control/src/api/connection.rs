//! One client's connection: reads and sends without waiting.
//!
//! # Life
//!
//! ```text
//!            a whole request                       the main thread's answer
//!   reading -----------------> with the main thread -----------------------> reading
//!      |
//!      | a request whose end is uncertain
//!      v
//!   lingering ---> closed, when the client closes, or another client needs the slot
//! ```
//!
//! While there is output, it is sent first. A connection that *lingers* is answered and shut down
//! for sending. What the client still sends is read and dropped: one that is writing a body would
//! otherwise get `EPIPE` and never read the answer.

use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::sync::Arc;

use rustix::{
    event::epoll::EventFlags,
    io::Errno,
    net::{RecvFlags, SendFlags, Shutdown, recv, send, shutdown},
};

use super::limits::Limits;
use super::request_log::{self, Outcome, Received};
use super::routes::{Route, Routed, route};
use crate::events::{EventLog, Read, Subscription};
use crate::metrics::{ApiStats, CountedRequest};
use crate::{
    Command, CommandError, Instance, Reply,
    http::{Decoded, Decoder, Request, Response, put_continue, put_event_stream_head},
};

/// Most bytes of one read.
const READ_LEN: usize = 4096;
/// A buffer that grew above this capacity is shrunk when it is empty.
const KEEP_CAPACITY: usize = 4096;
/// Most bytes that are read and dropped while a connection lingers.
const MAX_LINGER: usize = 16 << 20;
/// Most steps (a read, a request, an answer) in one call, so that one busy client does not delay
/// others.
const STEPS_AT_A_TIME: usize = 64;

/// A client's connection.
#[derive(Debug)]
pub(super) struct Connection {
    socket: OwnedFd,
    decoder: Decoder,
    /// The answer that is being sent, of which `sent` bytes are sent.
    output: Vec<u8>,
    sent: usize,
    /// How to answer the request that is with the main thread, if there is one.
    awaited: Option<Awaited>,
    /// Whether the client has shut down its sending side.
    input_ended: bool,
    /// Set when no further request is read.
    linger: Option<Linger>,
    /// The events that are streamed, once the client has asked for them.
    stream: Option<Subscription>,
    instance: Arc<Instance>,
    events: EventLog,
    max_streams: usize,
    stats: Arc<ApiStats>,
}

/// How to answer the request that is with the main thread.
#[derive(Debug)]
struct Awaited {
    deprecated: bool,
    endpoint: Option<CountedRequest>,
    received: Received,
}

/// The end of a connection.
#[derive(Debug, Default)]
struct Linger {
    /// Whether the output is sent, and the sending side shut down.
    shut_down: bool,
    /// Bytes that were read and dropped.
    dropped: usize,
}

/// When to call [`Connection::advance`] again.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Next {
    /// When the socket is ready for these events, for which it was not ready just now. If there are
    /// none, when the main thread has answered.
    When(EventFlags),
    /// Soon, after the other connections.
    Again,
    /// Never: the connection is closed.
    Close,
}

/// The outcome of an attempt to read or to write.
enum Moved {
    /// There may be more to do.
    All,
    /// The socket is not ready.
    Blocked,
    /// The client has closed the connection, or it failed.
    Broken,
}

impl Connection {
    /// `socket` is connected and non-blocking. `instance` is described and `events` are streamed if
    /// the client asks for them.
    pub(super) fn new(
        socket: OwnedFd,
        (instance, events): (Arc<Instance>, EventLog),
        limits: &Limits,
        stats: Arc<ApiStats>,
    ) -> Connection {
        Connection {
            socket,
            decoder: Decoder::new(limits.max_head, limits.max_payload),
            output: Vec::new(),
            sent: 0,
            awaited: None,
            input_ended: false,
            linger: None,
            stream: None,
            instance,
            events,
            max_streams: limits.max_streams,
            stats,
        }
    }

    /// Whether the connection is a stream of events. [`Connection::advance`] sends new ones.
    pub(super) fn is_stream(&self) -> bool {
        self.stream.is_some()
    }

    /// Sends a comment if the connection is a stream whose client has read everything.
    /// [`Connection::advance`] then finds out if the client is gone.
    pub(super) fn put_comment(&mut self) {
        if self.is_stream() && self.output.is_empty() {
            self.output.extend_from_slice(b":\n\n");
        }
    }

    /// Whether the connection only waits for its client to close it.
    pub(super) fn is_lingering(&self) -> bool {
        self.linger.as_ref().is_some_and(|linger| linger.shut_down)
    }

    /// Does what can be done without waiting. A complete command goes to `dispatch`; its answer
    /// comes through [`Connection::answer`].
    pub(super) fn advance(&mut self, mut dispatch: impl FnMut(Command)) -> Next {
        for _ in 0..STEPS_AT_A_TIME {
            match self.flush() {
                Moved::All => (),
                Moved::Blocked => return Next::When(EventFlags::OUT),
                Moved::Broken => return Next::Close,
            }
            if self.linger.is_some() {
                return self.linger();
            }
            if self.awaited.is_some() {
                return Next::When(EventFlags::empty());
            }
            if let Some(stream) = &mut self.stream {
                match stream.read(&mut self.output) {
                    Read::Some => continue,
                    Read::End => return Next::Close,
                    Read::Nothing => {}
                }
                match self.discard_input() {
                    Moved::All => continue,
                    Moved::Blocked => return Next::When(EventFlags::IN),
                    Moved::Broken => return Next::Close,
                }
            }
            match self.decoder.next() {
                Decoded::NeedMore if self.input_ended => return Next::Close,
                Decoded::NeedMore => match self.fill() {
                    Moved::All => (),
                    Moved::Blocked => return Next::When(EventFlags::IN),
                    Moved::Broken => return Next::Close,
                },
                Decoded::Continue => put_continue(&mut self.output),
                Decoded::Request(request) => self.handle(&request, &mut dispatch),
                Decoded::Refused(refusal) => {
                    request_log::refused(&refusal.error.to_string());
                    let response = Response::protocol_error(&refusal.error);
                    self.put(&response, refusal.keep_alive);
                }
                Decoded::Lost => self.linger = Some(Linger::default()),
            }
        }
        Next::Again
    }

    /// Takes the main thread's answer. [`Connection::advance`] sends it.
    pub(super) fn answer(&mut self, result: Result<Reply, CommandError>) {
        let Some(Awaited { deprecated, endpoint, received }) = self.awaited.take() else { return };
        match (&result, received.operation) {
            (Ok(_), Some(operation)) => self.stats.durations.set(operation, received.at.elapsed()),
            (Ok(_), None) => {}
            (Err(_), _) => self.stats.count_failure(endpoint),
        }
        let response = match result {
            Ok(Reply::Empty) => {
                received.answered(Outcome::NoContent);
                Response::no_content()
            }
            Ok(Reply::Json(value)) => {
                received.answered(Outcome::Ok);
                Response::ok(&value)
            }
            Ok(Reply::Text { content_type, body }) => {
                received.answered(Outcome::Ok);
                Response::text(content_type, body)
            }
            Err(error) => {
                let message = error.to_string();
                if error.is_too_large() {
                    received.answered(Outcome::TooLarge(&message));
                    Response::too_large(&message)
                } else {
                    received.answered(Outcome::BadRequest(&message));
                    Response::fault(&message)
                }
            }
        };
        self.put(&response.deprecated(deprecated), true);
    }

    fn handle(&mut self, request: &Request, dispatch: &mut impl FnMut(Command)) {
        let endpoint = CountedRequest::of(request.method, &request.path);
        self.stats.count(endpoint);
        let mut received = Received::log(request);
        match route(request) {
            Ok(Route::Command(Routed { command, deprecated })) => {
                self.stats.deprecated.add(deprecated.into());
                received.is_for(&command, deprecated);
                self.awaited = Some(Awaited { deprecated, endpoint, received });
                match self.instance.answer(&command) {
                    Some(result) => self.answer(result),
                    None => dispatch(command),
                }
            }
            Ok(Route::Events) => self.begin_stream(request, received),
            Err(error) => {
                self.stats.count_failure(endpoint);
                let message = error.to_string();
                received.answered(Outcome::BadRequest(&message));
                self.put(&Response::fault(&message), true);
            }
        }
    }

    /// Makes the connection a stream, unless there are too many.
    fn begin_stream(&mut self, request: &Request, received: Received) {
        self.stream = self.events.subscribe(request.last_event_id.as_deref(), self.max_streams);
        if self.is_stream() {
            received.answered(Outcome::Ok);
            put_event_stream_head(&mut self.output);
        } else {
            let limit = self.max_streams;
            let refused =
                format!("GET /events: {limit} clients read the events already; at most {limit} can");
            received.answered(Outcome::Unavailable(&refused));
            self.put(&Response::unavailable(&refused), true);
        }
    }

    fn put(&mut self, response: &Response, keep_alive: bool) {
        response.put(keep_alive, &mut self.output);
        if !keep_alive {
            self.linger = Some(Linger::default());
        }
    }

    /// Reads and drops what the client sends, until it closes.
    fn linger(&mut self) -> Next {
        let Some(linger) = &mut self.linger else { return Next::Close };
        if !linger.shut_down {
            linger.shut_down = true;
            if self.input_ended || shutdown(&self.socket, Shutdown::Write).is_err() {
                return Next::Close;
            }
        }
        let mut buffer = [0; READ_LEN];
        for _ in 0..STEPS_AT_A_TIME {
            match recv(&self.socket, &mut buffer, RecvFlags::empty()) {
                Ok((len @ 1.., _)) if linger.dropped < MAX_LINGER => linger.dropped += len,
                Err(Errno::INTR) => (),
                Err(Errno::AGAIN) => return Next::When(EventFlags::IN),
                Ok(_) | Err(_) => return Next::Close,
            }
        }
        Next::Again
    }

    /// Sends the output.
    fn flush(&mut self) -> Moved {
        while self.sent < self.output.len() {
            match send(&self.socket, &self.output[self.sent..], SendFlags::NOSIGNAL) {
                Ok(sent) => self.sent += sent,
                Err(Errno::INTR) => (),
                Err(Errno::AGAIN) => return Moved::Blocked,
                Err(_) => return Moved::Broken,
            }
        }
        self.sent = 0;
        self.output.clear();
        self.output.shrink_to(KEEP_CAPACITY);
        Moved::All
    }

    /// Reads and ignores at most [`READ_LEN`] bytes: a stream takes no requests. A client that ends
    /// its input ends the stream.
    fn discard_input(&self) -> Moved {
        let mut buffer = [0; READ_LEN];
        loop {
            return match recv(&self.socket, &mut buffer, RecvFlags::empty()) {
                Ok((1.., _)) => Moved::All,
                Err(Errno::INTR) => continue,
                Err(Errno::AGAIN) => Moved::Blocked,
                Ok((0, _)) | Err(_) => Moved::Broken,
            };
        }
    }

    /// Reads at most [`READ_LEN`] bytes.
    fn fill(&mut self) -> Moved {
        let mut buffer = [0; READ_LEN];
        loop {
            match recv(&self.socket, &mut buffer, RecvFlags::empty()) {
                Ok((0, _)) => self.input_ended = true,
                Ok((len, _)) => self.decoder.push(&buffer[..len]),
                Err(Errno::INTR) => continue,
                Err(Errno::AGAIN) => return Moved::Blocked,
                Err(_) => return Moved::Broken,
            }
            return Moved::All;
        }
    }
}

impl AsFd for Connection {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.socket.as_fd()
    }
}
