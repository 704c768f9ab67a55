//! [`Decoder`]: cuts a stream of bytes into requests.

use std::mem;

use vesta_http::{Framing, HeadError, HeadParser, NO_HEADER};

use super::request::{Method, ProtocolError, Refusal, Request};
use super::skip::{Skip, Skipped};

/// Most headers of one request.
pub const MAX_HEADERS: usize = 64;

/// Result of one step of a [`Decoder`].
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Decoded {
    /// The input holds no whole request: push more bytes.
    NeedMore,
    /// The client asks for `100 Continue` before it sends the body (`Expect: 100-continue`).
    Continue,
    /// A request.
    Request(Request),
    /// A request that is refused.
    Refused(Refusal),
    /// The end of a refused request cannot be found: close the connection.
    Lost,
}

/// Cuts a stream of bytes into requests.
#[derive(Debug)]
pub struct Decoder {
    max_head: usize,
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
    /// The input starts with what remains of a refused request.
    Skip(Skip),
    /// The end of the last request is unknown: all input is ignored.
    Lost,
}

#[derive(Debug)]
struct Head {
    method: Method,
    path: String,
    /// Whether the client is still to get `100 Continue`.
    expects_continue: bool,
    /// The value of `Content-Length`: at most `max_body`.
    body_len: usize,
    last_event_id: Option<String>,
}

impl Decoder {
    /// A decoder for a new connection. `max_head` and `max_body` are in bytes.
    pub fn new(max_head: usize, max_body: usize) -> Decoder {
        let head_parser = HeadParser::new(max_head);
        Decoder { max_head, max_body, input: Vec::new(), head_parser, state: State::Head }
    }

    /// Adds bytes that arrived. Call it only after [`Decoder::next`] returned
    /// [`Decoded::NeedMore`]: that bounds the memory of the decoder.
    pub fn push(&mut self, bytes: &[u8]) {
        if !matches!(self.state, State::Lost) {
            self.input.extend_from_slice(bytes);
        }
    }

    /// Returns the next request that is complete, or what the decoder needs instead.
    #[expect(clippy::should_implement_trait, reason = "an iterator ends; this asks for more input")]
    pub fn next(&mut self) -> Decoded {
        loop {
            match mem::replace(&mut self.state, State::Head) {
                State::Head => match self.head() {
                    Ok(Some(head)) => self.state = State::Body(head),
                    Ok(None) => return Decoded::NeedMore,
                    Err(error) => return Decoded::Refused(self.refuse(error)),
                },
                State::Body(head) => return self.body(head),
                State::Skip(mut skip) => match skip.advance(&mut self.input) {
                    Skipped::All => (),
                    Skipped::NeedMore => {
                        self.state = State::Skip(skip);
                        return Decoded::NeedMore;
                    }
                    Skipped::Lost => {
                        self.lose();
                        return Decoded::Lost;
                    }
                },
                State::Lost => {
                    self.state = State::Lost;
                    return Decoded::Lost;
                }
            }
        }
    }

    /// Takes the head off the input, if it is complete. After an error, the state says what remains
    /// of the request.
    fn head(&mut self) -> Result<Option<Head>, ProtocolError> {
        let mut headers = [NO_HEADER; MAX_HEADERS];
        let head = match self.head_parser.parse(&self.input, &mut headers) {
            Ok(Some(head)) => head,
            Ok(None) => return Ok(None),
            Err(error) => {
                self.state = State::Skip(Skip::head(self.max_head));
                return Err(error.into());
            }
        };
        let path = head.path.to_owned();
        let (method, method_name) = (Method::from_name(head.method), head.method.to_owned());
        let last_event_id = head
            .headers()
            .find(|(name, _)| name.eq_ignore_ascii_case("Last-Event-ID"))
            .map(|(_, value)| String::from_utf8_lossy(value).into_owned());
        let (framing, len) = (head.framing(), head.len);
        self.take(len);
        self.state = what_remains(framing.as_ref());
        let Some(method) = method else {
            return Err(ProtocolError::UnknownMethod { method: method_name, path });
        };
        let Framing { body_len, expects_continue, .. } = framing?;
        let limit = self.max_body;
        match usize::try_from(body_len) {
            Ok(body_len) if body_len <= limit => {
                let expects_continue = expects_continue && body_len > 0;
                Ok(Some(Head { method, path, expects_continue, body_len, last_event_id }))
            }
            _ => Err(ProtocolError::PayloadTooLarge { size: body_len, limit }),
        }
    }

    /// The refusal of the request whose remainder is in the state.
    fn refuse(&mut self, error: ProtocolError) -> Refusal {
        let keep_alive = !matches!(self.state, State::Lost);
        if !keep_alive {
            self.lose();
        }
        Refusal { error, keep_alive }
    }

    fn lose(&mut self) {
        self.state = State::Lost;
        self.input = Vec::new();
    }

    /// Takes the body of `head` off the input, if it is complete.
    fn body(&mut self, mut head: Head) -> Decoded {
        // Also if the body has arrived: Firecracker's clients may count on it.
        let send_continue = mem::take(&mut head.expects_continue);
        if send_continue || self.input.len() < head.body_len {
            self.state = State::Body(head);
            return if send_continue { Decoded::Continue } else { Decoded::NeedMore };
        }
        let body = self.take(head.body_len);
        let Head { method, path, last_event_id, .. } = head;
        Decoded::Request(Request { method, path, body, last_event_id })
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

/// What remains of a request whose head was read, if it is refused.
fn what_remains(framing: Result<&Framing, &HeadError>) -> State {
    match framing {
        // The client may or may not send the body after a refusal.
        Ok(framing) if framing.expects_continue && framing.body_len > 0 => State::Lost,
        Ok(framing) => State::Skip(Skip::body(framing.body_len)),
        Err(HeadError::TransferEncoding(name)) if name.eq_ignore_ascii_case("chunked") => {
            State::Skip(Skip::chunks())
        }
        Err(_) => State::Lost,
    }
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
                    Decoded::NeedMore | Decoded::Lost => break,
                    Decoded::Continue => (),
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
        let (method, path) = (Method::Put, "/actions".to_owned());
        let body = b"{}".to_vec();
        assert_eq!(request, Request { method, path, body, last_event_id: None });
    }

    #[test]
    fn scheme_and_host_of_absolute_targets_are_dropped() {
        assert_eq!(only_request(b"GET http://localhost/vm/config HTTP/1.1\r\n\r\n").path, "/vm/config");
        assert_eq!(only_request(b"GET http://localhost HTTP/1.1\r\n\r\n").path, "/");
    }

    /// What comes out of `bytes` and a request after them.
    fn with_next(bytes: &[u8]) -> Vec<Result<Request, Refusal>> {
        decode_whole(&[bytes, b"GET /next HTTP/1.1\r\n\r\n"].concat())
    }

    #[test]
    fn next_request_is_found_after_a_refused_one() {
        let long = ["GET / HTTP/1.1\r\na: ", &"x".repeat(2 * MAX_HEAD), "\r\n\r\n"].concat();
        let noise = ["x".repeat(MAX_HEAD).as_str(), "\r\n"].concat();
        for refused in [
            &b"hello\r\nHost: x\r\n\r\n"[..],
            b"\0\0\0\n",
            b"GET / HTTP/2.0\r\n\r\n",
            b"GET  HTTP/1.1\r\n\r\n",
            b"GET / HTTP/1.1\r\nno colon\r\n\r\n",
            b"GET / HTTP/1.1\r\na: b\r\n folded\r\n\r\n",
            b"PUT / HTTP/1.1\r\nno colon\r\nContent-Length: 27\r\n\r\nGET /body HTTP/1.1\r\nHost: x\r\n",
            b"POST /vm HTTP/1.1\r\nContent-Length: 22\r\n\r\nGET /body HTTP/1.1\r\n\r\n",
            b"OPTIONS * HTTP/1.0\r\n\r\n",
            b"PUT /vm HTTP/1.1\r\nTransfer-Encoding: chunked\r\n\r\n5\r\n{\r\n\r\n\r\n0\r\n\r\n",
            long.as_bytes(),
            noise.as_bytes(),
        ] {
            let out = with_next(refused);
            let [Err(refusal), Ok(next)] = out.as_slice() else { panic!("{refused:?}: {out:?}") };
            assert!(refusal.keep_alive && next.path == "/next", "{out:?}");
        }
    }

    #[test]
    fn requests_after_an_uncertain_end_are_ignored() {
        for refused in [
            "PUT / HTTP/1.1\r\nContent-Length: x\r\n\r\n",
            "POST / HTTP/1.1\r\nContent-Length: 1\r\nContent-Length: 2\r\n\r\n",
            "PUT / HTTP/1.1\r\nTransfer-Encoding: gzip, chunked\r\n\r\n",
            "POST / HTTP/1.1\r\nExpect: 100-continue\r\nContent-Length: 1\r\n\r\n",
        ] {
            let out = with_next(refused.as_bytes());
            let [Err(Refusal { keep_alive: false, .. })] = out.as_slice() else { panic!("{out:?}") };
        }
        // The refusal was sent before its end was seen to be uncertain.
        let out = with_next(b"x\r\nContent-Length: x\r\n\r\n");
        let [Err(Refusal { keep_alive: true, .. })] = out.as_slice() else { panic!("{out:?}") };
    }

    #[test]
    fn unknown_methods_are_refused_by_name() {
        let refusal = only_refusal(b"POST /vm HTTP/1.1\r\n\r\n");
        let (method, path) = ("POST".into(), "/vm".into());
        assert_eq!(refusal.error, ProtocolError::UnknownMethod { method, path });
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
        assert_eq!(decoder.next(), Decoded::Continue);
        assert_eq!(decoder.next(), Decoded::NeedMore);
        decoder.push(b"ab");
        assert_eq!(decoder.next(), Decoded::NeedMore);
        decoder.push(b"c");
        assert!(matches!(decoder.next(), Decoded::Request(request) if request.body == b"abc"));
    }

    #[test]
    fn expect_is_answered_although_the_body_has_arrived() {
        let mut decoder = Decoder::new(MAX_HEAD, MAX_BODY);
        decoder.push(b"PUT /a HTTP/1.0\r\nExpect: 100-continue\r\nContent-Length: 3\r\n\r\nabc");
        assert_eq!(decoder.next(), Decoded::Continue);
        assert!(matches!(decoder.next(), Decoded::Request(request) if request.body == b"abc"));
        decoder.push(b"GET /a HTTP/1.1\r\nExpect: 100-continue\r\n\r\n");
        assert!(matches!(decoder.next(), Decoded::Request(_)));
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
                "Expect: 100-continue", "Connection: close", "Transfer-Encoding: chunked", "Content-Length: 2",
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
