//! One client's connection: reads and sends without waiting.

use std::os::fd::{AsFd, BorrowedFd, OwnedFd};

use rustix::{
    event::epoll::EventFlags,
    io::Errno,
    net::{RecvFlags, SendFlags, recv, send},
};

use super::limits::Limits;
use super::routes::{asks_for_events, route};
use crate::{
    Command, CommandError, Reply,
    events::{EventLog, Read, Subscription},
    http::{Decoded, Decoder, Request, Response, Version, put_continue, put_event_stream_head},
};

/// Most bytes of one read.
const READ_LEN: usize = 4096;
/// A buffer that grew above this capacity is shrunk when it is empty.
const KEEP_CAPACITY: usize = 4096;
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
    /// Whether the connection closes when the output is sent.
    closing: bool,
    /// The events that are streamed, once the client has asked for them.
    stream: Option<Subscription>,
    events: EventLog,
    max_streams: usize,
}

/// How to answer the request that is with the main thread.
#[derive(Debug)]
struct Awaited {
    version: Version,
    keep_alive: bool,
    deprecated: bool,
}

/// When to call [`Connection::advance`] again.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Next {
    /// When the socket is ready for these events. If there are none, when the main thread has
    /// answered.
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
    /// `socket` is connected and non-blocking. `events` are streamed if the client asks for them.
    pub(super) fn new(socket: OwnedFd, events: EventLog, limits: &Limits) -> Connection {
        Connection {
            socket,
            decoder: Decoder::new(limits.max_head, limits.max_payload),
            output: Vec::new(),
            sent: 0,
            awaited: None,
            input_ended: false,
            closing: false,
            stream: None,
            events,
            max_streams: limits.max_streams,
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

    /// Does what can be done without waiting. A complete command goes to `dispatch`; its answer
    /// comes through [`Connection::answer`].
    pub(super) fn advance(&mut self, mut dispatch: impl FnMut(Command)) -> Next {
        for _ in 0..STEPS_AT_A_TIME {
            match self.flush() {
                Moved::All => (),
                Moved::Blocked => return Next::When(EventFlags::OUT),
                Moved::Broken => return Next::Close,
            }
            if self.closing {
                return Next::Close;
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
                Decoded::Continue(version) => put_continue(version, &mut self.output),
                Decoded::Request(request) => self.handle(&request, &mut dispatch),
                Decoded::Refused(refusal) => {
                    let response = Response::protocol_error(&refusal.error);
                    self.put(&response, refusal.version, refusal.keep_alive);
                }
            }
        }
        Next::Again
    }

    /// Takes the main thread's answer. [`Connection::advance`] sends it.
    pub(super) fn answer(&mut self, result: Result<Reply, CommandError>) {
        let Some(Awaited { version, keep_alive, deprecated }) = self.awaited.take() else { return };
        let response = match result {
            Ok(Reply::Empty) => Response::no_content(),
            Ok(Reply::Json(value)) => Response::ok(&value),
            Err(error) if error.is_too_large() => Response::too_large(&error.to_string()),
            Err(error) => Response::fault(&error.to_string()),
        };
        self.put(&response.deprecated(deprecated), version, keep_alive);
    }

    fn handle(&mut self, request: &Request, dispatch: &mut impl FnMut(Command)) {
        let Request { version, keep_alive, .. } = *request;
        match asks_for_events(request) {
            Ok(true) => return self.begin_stream(request),
            Ok(false) => {}
            Err(error) => return self.put(&Response::fault(&error.to_string()), version, keep_alive),
        }
        match route(request) {
            Ok(routed) => {
                self.awaited = Some(Awaited { version, keep_alive, deprecated: routed.deprecated });
                dispatch(routed.command);
            }
            Err(error) => self.put(&Response::fault(&error.to_string()), version, keep_alive),
        }
    }

    /// Makes the connection a stream, unless there are too many.
    fn begin_stream(&mut self, request: &Request) {
        self.stream = self.events.subscribe(request.last_event_id.as_deref(), self.max_streams);
        if self.is_stream() {
            put_event_stream_head(request.version, &mut self.output);
        } else {
            let limit = self.max_streams;
            let refused =
                format!("GET /events: {limit} clients read the events already; at most {limit} can");
            self.put(&Response::unavailable(&refused), request.version, request.keep_alive);
        }
    }

    fn put(&mut self, response: &Response, version: Version, keep_alive: bool) {
        response.put(version, keep_alive, &mut self.output);
        self.closing |= !keep_alive;
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
