//! Requests of API clients, cut out of a stream of bytes.

use std::mem;

use vesta_http::{Framing, HeadError, HeadParser, NO_HEADER, Version};

/// Most headers of one request.
pub const MAX_HEADERS: usize = 64;

/// Method of a request. The doc of each says what the API uses it for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Method {
    /// Return a resource.
    Get,
    /// Create or replace a resource, or start an action.
    Put,
    /// Change parts of a resource.
    Patch,
    /// Remove a resource.
    Delete,
}

impl Method {
    /// Its name on the wire.
    pub fn name(self) -> &'static str {
        match self {
            Method::Get => "GET",
            Method::Put => "PUT",
            Method::Patch => "PATCH",
            Method::Delete => "DELETE",
        }
    }

    fn from_name(name: &str) -> Option<Method> {
        [Method::Get, Method::Put, Method::Patch, Method::Delete]
            .into_iter()
            .find(|method| method.name() == name)
    }
}

/// One whole request.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Request {
    /// The method.
    pub method: Method,
    /// The request target without scheme and host: `/path` for `http://host/path`.
    pub path: String,
    /// The version to respond in.
    pub version: Version,
    /// Whether the connection stays open after the response.
    pub keep_alive: bool,
    /// The body; empty if there is none.
    pub body: Vec<u8>,
    /// The value of `Last-Event-ID`: the last event that a client of `GET /events` has.
    pub last_event_id: Option<String>,
}

/// A request that is refused before the API routes it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Refusal {
    /// What is wrong with the request.
    pub error: ProtocolError,
    /// The version to respond in.
    pub version: Version,
    /// Whether the connection stays open after the response. It does only where it is certain where
    /// the next request starts.
    pub keep_alive: bool,
}

/// Why a request is not valid HTTP, or is refused.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum ProtocolError {
    /// The request head is bad or too large.
    #[error(transparent)]
    Head(#[from] HeadError),
    /// A method that no resource has.
    #[error("there is no {method} {path}: methods are GET, PUT, PATCH and DELETE")]
    UnknownMethod {
        /// The method given.
        method: String,
        /// The path given.
        path: String,
    },
    /// The body is larger than the limit. The text is Firecracker's: clients may match it.
    #[error("Request payload with size {size} is larger than the limit of {limit} allowed by server.")]
    PayloadTooLarge {
        /// The value of `Content-Length`.
        size: u64,
        /// Most bytes allowed.
        limit: usize,
    },
}

/// Result of one step of a [`Decoder`].
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Decoded {
    /// The input holds no whole request: push more bytes.
    NeedMore,
    /// The client waits for `100 Continue` before it sends the body (`Expect: 100-continue`).
    Continue(Version),
    /// A request.
    Request(Request),
    /// A request that is refused.
    Refused(Refusal),
}

/// Cuts a stream of bytes into requests.
#[derive(Debug)]
pub struct Decoder {
    max_body: usize,
    /// Bytes that have arrived and belong to no request returned so far.
    input: Vec<u8>,
    head_parser: HeadParser,
    state: State,
}

#[derive(Debug)]
enum State {
    /// The input starts with a request head.
    Head,
    /// The input starts with the body of this head.
    Body(Head),
    /// The input starts with this many bytes of a refused body.
    Discard(u64),
    /// After a fatal error: all input is ignored.
    Dead,
}

#[derive(Debug)]
struct Head {
    method: Method,
    path: String,
    version: Version,
    keep_alive: bool,
    /// Whether the client still waits for `100 Continue`.
    expects_continue: bool,
    /// The value of `Content-Length`; at most `max_body` once checked.
    body_len: u64,
    last_event_id: Option<String>,
}

impl Decoder {
    /// A decoder for a new connection. `max_head` and `max_body` are in bytes.
    pub fn new(max_head: usize, max_body: usize) -> Decoder {
        let head_parser = HeadParser::new(max_head);
        Decoder { max_body, input: Vec::new(), head_parser, state: State::Head }
    }

    /// Adds bytes that arrived. Call it only after [`Decoder::next`] returned
    /// [`Decoded::NeedMore`]: that bounds the memory of the decoder.
    pub fn push(&mut self, bytes: &[u8]) {
        if !matches!(self.state, State::Dead) {
            self.input.extend_from_slice(bytes);
        }
    }

    /// Returns the next request that is complete, or what the decoder needs instead.
    #[expect(clippy::should_implement_trait, reason = "an iterator ends; this asks for more input")]
    pub fn next(&mut self) -> Decoded {
        loop {
            match mem::replace(&mut self.state, State::Dead) {
                State::Head => match self.head() {
                    Ok(Some(head)) => self.state = State::Body(head),
                    Ok(None) => {
                        self.state = State::Head;
                        return Decoded::NeedMore;
                    }
                    Err(refusal) => {
                        if let State::Dead = self.state {
                            self.input = Vec::new();
                        }
                        return Decoded::Refused(refusal);
                    }
                },
                State::Body(head) => return self.body(head),
                State::Discard(remaining) => {
                    let arrived = self.input.len().min(usize::try_from(remaining).unwrap_or(usize::MAX));
                    self.take(arrived);
                    let remaining = remaining - arrived as u64;
                    if remaining > 0 {
                        self.state = State::Discard(remaining);
                        return Decoded::NeedMore;
                    }
                    self.state = State::Head;
                }
                State::Dead => return Decoded::NeedMore,
            }
        }
    }

    /// Takes the head off the input, if it is complete. On an error, the state says whether the
    /// decoder can continue.
    fn head(&mut self) -> Result<Option<Head>, Refusal> {
        let mut headers = [NO_HEADER; MAX_HEADERS];
        let head = match self.head_parser.parse(&self.input, &mut headers) {
            Ok(Some(head)) => head,
            Ok(None) => return Ok(None),
            Err(error) => return Err(fatal(error, Version::Http11)),
        };
        let (version, path) = (head.version, head.path.to_owned());
        let Some(method) = Method::from_name(head.method) else {
            return Err(fatal(
                ProtocolError::UnknownMethod { method: head.method.to_owned(), path },
                version,
            ));
        };
        let framing = head.framing().map_err(|error| fatal(error, version))?;
        let last_event_id = head
            .headers()
            .find(|(name, _)| name.eq_ignore_ascii_case("Last-Event-ID"))
            .map(|(_, value)| String::from_utf8_lossy(value).into_owned());
        let len = head.len;
        self.take(len);
        let Framing { body_len, keep_alive, expects_continue } = framing;
        let head = Head { method, path, version, keep_alive, expects_continue, body_len, last_event_id };
        self.check_body(&head)?;
        Ok(Some(head))
    }

    /// Checks the length of the body against the limit.
    fn check_body(&mut self, head: &Head) -> Result<(), Refusal> {
        if head.body_len <= self.max_body as u64 {
            return Ok(());
        }
        let error = ProtocolError::PayloadTooLarge { size: head.body_len, limit: self.max_body };
        if head.expects_continue {
            // The client may or may not send the body after the refusal: what follows is uncertain.
            return Err(fatal(error, head.version));
        }
        self.state = State::Discard(head.body_len);
        Err(Refusal { error, version: head.version, keep_alive: head.keep_alive })
    }

    /// Takes the body of `head` off the input, if it is complete.
    fn body(&mut self, mut head: Head) -> Decoded {
        if (self.input.len() as u64) < head.body_len {
            // A client whose body is arriving no longer waits.
            let send_continue = mem::take(&mut head.expects_continue) && self.input.is_empty();
            let version = head.version;
            self.state = State::Body(head);
            return if send_continue { Decoded::Continue(version) } else { Decoded::NeedMore };
        }
        let body = self.take(head.body_len as usize);
        self.state = State::Head;
        let Head { method, path, version, keep_alive, last_event_id, .. } = head;
        Decoded::Request(Request { method, path, version, keep_alive, body, last_event_id })
    }

    /// Takes `len` bytes off the front of the input.
    fn take(&mut self, len: usize) -> Vec<u8> {
        if len == 0 {
            return Vec::new();
        }
        let rest = self.input.split_off(len);
        mem::replace(&mut self.input, rest)
    }
}

/// A refusal after which the connection closes.
fn fatal(error: impl Into<ProtocolError>, version: Version) -> Refusal {
    Refusal { error: error.into(), version, keep_alive: false }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    const MAX_HEAD: usize = 512;
    const MAX_BODY: usize = 100;

    /// Decodes `pieces`. Returns all but interim responses, and the most bytes the decoder held at
    /// a time.
    fn decode<'a>(pieces: impl IntoIterator<Item = &'a [u8]>) -> (Vec<Result<Request, Refusal>>, usize) {
        let mut decoder = Decoder::new(MAX_HEAD, MAX_BODY);
        let (mut out, mut most) = (Vec::new(), 0);
        for piece in pieces {
            decoder.push(piece);
            most = most.max(decoder.input.len());
            loop {
                match decoder.next() {
                    Decoded::NeedMore => break,
                    Decoded::Continue(_) => (),
                    Decoded::Request(request) => out.push(Ok(request)),
                    Decoded::Refused(refusal) => out.push(Err(refusal)),
                }
            }
        }
        (out, most)
    }

    fn decode_whole(bytes: &[u8]) -> Vec<Result<Request, Refusal>> {
        decode([bytes]).0
    }

    fn only_request(bytes: &[u8]) -> Request {
        let mut out = decode_whole(bytes);
        assert_eq!(out.len(), 1, "{out:?}");
        out.remove(0).unwrap()
    }

    fn only_refusal(bytes: &[u8]) -> Refusal {
        let mut out = decode_whole(bytes);
        assert_eq!(out.len(), 1, "{out:?}");
        out.remove(0).unwrap_err()
    }

    #[test]
    fn request_has_method_path_and_body() {
        let request =
            only_request(b"PUT /actions HTTP/1.1\r\nHost: localhost\r\ncontent-length: 2\r\n\r\n{}");
        assert_eq!(
            request,
            Request {
                method: Method::Put,
                path: "/actions".into(),
                version: Version::Http11,
                keep_alive: true,
                body: b"{}".to_vec(),
                last_event_id: None,
            }
        );
    }

    #[test]
    fn last_event_id_is_read_from_its_header() {
        let request = only_request(b"GET /events HTTP/1.1\r\nlast-event-id: 7-1 \r\n\r\n");
        assert_eq!(request.last_event_id.as_deref(), Some("7-1"));
    }

    #[test]
    fn scheme_and_host_of_absolute_targets_are_dropped() {
        assert_eq!(only_request(b"GET http://localhost/vm/config HTTP/1.1\r\n\r\n").path, "/vm/config");
        assert_eq!(only_request(b"GET http://localhost HTTP/1.1\r\n\r\n").path, "/");
    }

    #[test]
    fn version_and_connection_header_decide_keep_alive() {
        for (version, header, stays) in [
            ("1.1", "", true),
            ("1.1", "Connection: close\r\n", false),
            ("1.1", "Connection: Upgrade, Close\r\n", false),
            ("1.0", "", false),
            ("1.0", "Connection: Keep-Alive\r\n", true),
            ("1.0", "Connection: keep-alive\r\nConnection: close\r\n", false),
        ] {
            let request = only_request(format!("GET / HTTP/{version}\r\n{header}\r\n").as_bytes());
            assert_eq!(request.keep_alive, stays, "{version} {header}");
        }
    }

    #[test]
    fn requests_after_malformed_input_are_ignored() {
        for garbage in [
            &b"hello\n"[..],
            b"\0\0\0\n",
            b"GET / HTTP/2.0\r\n\r\n",
            b"GET  HTTP/1.1\r\n\r\n",
            b"GET / HTTP/1.1\r\nno colon\r\n\r\n",
            b"GET / HTTP/1.1\r\na: b\r\n folded\r\n\r\n",
        ] {
            let mut stream = garbage.to_vec();
            stream.extend_from_slice(b"GET / HTTP/1.1\r\n\r\n");
            let refusal = only_refusal(&stream);
            assert!(matches!(refusal.error, ProtocolError::Head(HeadError::Malformed(_))), "{refusal:?}");
            assert!(!refusal.keep_alive);
        }
    }

    #[test]
    fn unknown_methods_are_refused_by_name() {
        let refusal = only_refusal(b"POST /vm HTTP/1.1\r\n\r\n");
        let (method, path) = ("POST".into(), "/vm".into());
        assert_eq!(refusal.error, ProtocolError::UnknownMethod { method, path });
        assert!(!refusal.keep_alive);
    }

    #[test]
    fn content_length_must_be_one_decimal_number() {
        for value in ["", "-1", "+1", "0x10", "1 2", "1, 1", "18446744073709551616"] {
            let refusal =
                only_refusal(format!("PUT / HTTP/1.1\r\nContent-Length: {value}\r\n\r\n").as_bytes());
            assert_eq!(refusal.error, HeadError::BadContentLength(value.into()).into());
        }
        let refusal = only_refusal(b"PUT / HTTP/1.1\r\nContent-Length: 1\r\nContent-Length: 2\r\n\r\n");
        assert_eq!(refusal.error, HeadError::BadContentLength("2".into()).into());
        let same_twice = b"PUT / HTTP/1.1\r\nContent-Length: 1\r\nContent-Length: 1\r\n\r\nx";
        assert_eq!(only_request(same_twice).body, b"x");
    }

    #[test]
    fn chunked_bodies_are_refused() {
        let refusal = only_refusal(
            b"PUT / HTTP/1.1\r\nTransfer-Encoding: chunked\r\nContent-Length: 3\r\n\r\n0\r\n\r\n",
        );
        assert_eq!(refusal.error, HeadError::TransferEncoding("chunked".into()).into());
        assert!(!refusal.keep_alive);
    }

    #[test]
    fn next_request_is_read_after_an_oversized_body() {
        let body = "x".repeat(MAX_BODY + 1);
        let stream =
            format!("PUT /a HTTP/1.1\r\nContent-Length: {}\r\n\r\n{body}GET /b HTTP/1.1\r\n\r\n", body.len());
        let out = decode_whole(stream.as_bytes());
        let Ok([Err(refusal), Ok(next)]) = <[_; 2]>::try_from(out) else { panic!() };
        assert_eq!(refusal.error, ProtocolError::PayloadTooLarge { size: 101, limit: 100 });
        assert!(refusal.keep_alive);
        assert_eq!(next.path, "/b");
    }

    #[test]
    fn head_and_body_at_their_limits_are_accepted() {
        let body = "x".repeat(MAX_BODY);
        let fixed = format!("PUT /a HTTP/1.1\r\nContent-Length: {MAX_BODY}\r\nPad: \r\n\r\n");
        let padding = "y".repeat(MAX_HEAD - fixed.len());
        let head = fixed.replace("Pad: ", &format!("Pad: {padding}"));
        assert_eq!(head.len(), MAX_HEAD);
        assert_eq!(only_request(format!("{head}{body}").as_bytes()).body, body.as_bytes());
        let longer = head.replace("Pad: ", "Pad: y");
        assert_eq!(only_refusal(longer.as_bytes()).error, HeadError::TooLong { limit: MAX_HEAD }.into());
    }

    #[test]
    fn headers_over_the_limit_are_refused() {
        let mut decoder = Decoder::new(8192, MAX_BODY);
        decoder.push(format!("GET / HTTP/1.1\r\n{}\r\n", "a: b\r\n".repeat(MAX_HEADERS + 1)).as_bytes());
        let Decoded::Refused(refusal) = decoder.next() else { panic!() };
        assert_eq!(refusal.error, HeadError::TooManyHeaders { limit: MAX_HEADERS }.into());
    }

    #[test]
    fn expect_100_continue_is_answered_once() {
        let mut decoder = Decoder::new(MAX_HEAD, MAX_BODY);
        decoder.push(b"PUT /a HTTP/1.1\r\nExpect: 100-continue\r\nContent-Length: 3\r\n\r\n");
        assert_eq!(decoder.next(), Decoded::Continue(Version::Http11));
        assert_eq!(decoder.next(), Decoded::NeedMore);
        decoder.push(b"ab");
        assert_eq!(decoder.next(), Decoded::NeedMore);
        decoder.push(b"c");
        assert!(matches!(decoder.next(), Decoded::Request(request) if request.body == b"abc"));
    }

    #[test]
    fn oversized_body_with_expect_closes_the_connection() {
        let refusal = only_refusal(b"PUT /a HTTP/1.1\r\nExpect: 100-continue\r\nContent-Length: 101\r\n\r\n");
        assert_eq!(refusal.error, ProtocolError::PayloadTooLarge { size: 101, limit: 100 });
        assert!(!refusal.keep_alive);
    }

    /// Streams of whole requests, broken requests and noise.
    fn stream() -> impl Strategy<Value = Vec<u8>> {
        let line = prop_oneof![
            4 => "(GET|PUT|PATCH|DELETE|POST) /[a-z]{0,8} HTTP/1\\.[01]",
            1 => "[ -~]{0,20}",
        ];
        let header = prop_oneof![
            4 => "[A-Za-z]{1,8}: [ -~]{0,12}",
            2 => prop::sample::select(vec![
                "Expect: 100-continue", "Connection: close", "Connection: keep-alive", "Transfer-Encoding: chunked",
            ]).prop_map(str::to_owned),
            1 => "[ -~]{0,12}",
        ];
        let end = prop::sample::select(vec!["\r\n", "\r\n", "\r\n", "\n", "\r"]);
        let request = (line, prop::collection::vec(header, 0..4), end, 0..120_usize, any::<bool>()).prop_map(
            |(line, headers, end, body_len, has_body)| {
                let mut text = line + end;
                for header in headers {
                    text += &(header + end);
                }
                if has_body {
                    let body = "b".repeat(body_len);
                    text += &["Content-Length: ", &body_len.to_string(), end, end, &body].concat();
                } else {
                    text += end;
                }
                text.into_bytes()
            },
        );
        let noise = prop::collection::vec(any::<u8>(), 0..40);
        prop::collection::vec(prop_oneof![8 => request, 1 => noise], 0..6).prop_map(|parts| parts.concat())
    }

    proptest! {
        #[test]
        fn cuts_of_the_stream_do_not_change_the_outcome(
            stream in stream(), cuts in prop::collection::vec(any::<prop::sample::Index>(), 0..12),
        ) {
            let whole = decode_whole(&stream);
            prop_assert_eq!(&decode(stream.chunks(1)).0, &whole);
            let mut cuts: Vec<usize> = cuts.iter().map(|cut| cut.index(stream.len() + 1)).collect();
            cuts.extend([0, stream.len()]);
            cuts.sort_unstable();
            let pieces = cuts.windows(2).map(|pair| &stream[pair[0]..pair[1]]);
            prop_assert_eq!(&decode(pieces).0, &whole);
        }

        #[test]
        fn memory_is_bounded_for_noise(
            bytes in prop::collection::vec(any::<u8>(), 0..4096), piece in 1..64_usize,
        ) {
            let (_, most) = decode(bytes.chunks(piece));
            prop_assert!(most <= MAX_HEAD + MAX_BODY + piece, "{most}");
        }

        #[test]
        fn memory_is_bounded_for_request_streams(stream in stream(), piece in 1..64_usize) {
            let (_, most) = decode(stream.chunks(piece));
            prop_assert!(most <= MAX_HEAD + MAX_BODY + piece, "{most}");
        }
    }
}
