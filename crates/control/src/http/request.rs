//! From bytes to requests.
//!
//! The head is parsed by `httparse`, only up to the last line end that has arrived: so one parse per line that comes in,
//! and the same outcome for every way of cutting the stream.

use std::mem;

use super::{Method, Version};

/// Most header lines of one request.
pub const MAX_HEADERS: usize = 64;

/// One whole request.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Request {
    /// What to do.
    pub method: Method,
    /// To what: the target's path. (Of `http://host/path`, which proxies send, that is `/path`.)
    pub path: String,
    /// The version to answer in.
    pub version: Version,
    /// Whether the connection stays open after the answer.
    pub keep_alive: bool,
    /// The body; empty where there is none.
    pub body: Vec<u8>,
}

/// A request that is refused before anything looks at what it wants.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Refusal {
    /// What is wrong with it.
    pub error: ProtocolError,
    /// The version to answer in.
    pub version: Version,
    /// Whether the connection stays open after the answer: only where it is certain where the next request begins.
    pub keep_alive: bool,
}

/// What is wrong with a request as HTTP.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum ProtocolError {
    /// It is not HTTP/1.x.
    #[error("not an HTTP/1.x request: {0}")]
    Malformed(httparse::Error),
    /// Request line and headers are too long.
    #[error("request line and headers are longer than {limit} bytes")]
    HeadTooLong {
        /// Most bytes allowed.
        limit: usize,
    },
    /// Too many header lines.
    #[error("more than {MAX_HEADERS} header lines")]
    TooManyHeaders,
    /// A method that no resource has.
    #[error("there is no {method} {path}: methods are GET, PUT, PATCH and DELETE")]
    UnknownMethod {
        /// The method given.
        method: String,
        /// The path given.
        path: String,
    },
    /// `Content-Length` is no number, or stands there twice with different values.
    #[error("Content-Length is `{0}`: it must be one decimal number")]
    BadContentLength(String),
    /// A body in chunks.
    #[error("Transfer-Encoding is `{0}`: send the body in one piece, with Content-Length")]
    TransferEncoding(String),
    /// A body over the limit. (Clients may know these words: the answer to this one is a fixed text.)
    #[error("Request payload with size {size} is larger than the limit of {limit} allowed by server.")]
    PayloadTooLarge {
        /// What `Content-Length` says.
        size: u64,
        /// Most bytes allowed.
        limit: usize,
    },
}

/// What came out of the bytes so far.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Decoded {
    /// Nothing whole: push more bytes.
    NeedMore,
    /// The client waits for word that its body is welcome (`Expect: 100-continue`).
    Continue(Version),
    /// A request.
    Request(Request),
    /// A request that is refused.
    Refused(Refusal),
}

/// Cuts a stream of bytes into requests.
#[derive(Debug)]
pub struct Decoder {
    max_head: usize,
    max_body: usize,
    /// What has arrived and not gone out.
    input: Vec<u8>,
    /// How much of `input` was already parsed as a head, and was not one yet.
    tried: usize,
    state: State,
}

#[derive(Debug)]
enum State {
    /// At the beginning of a request.
    Head,
    /// Behind a head, at its body.
    Body(Head),
    /// In a refused body, with so many bytes to go.
    Discard(u64),
    /// Lost: what arrives means nothing any more.
    Dead,
}

#[derive(Debug)]
struct Head {
    method: Method,
    path: String,
    version: Version,
    keep_alive: bool,
    /// Whether the client waits for word, and has not got it.
    expects_continue: bool,
    /// What `Content-Length` says; once checked, at most the limit.
    body_len: u64,
}

impl Decoder {
    /// A decoder at the beginning of a connection. `max_head` and `max_body` are in bytes.
    pub fn new(max_head: usize, max_body: usize) -> Decoder {
        Decoder { max_head, max_body, input: Vec::new(), tried: 0, state: State::Head }
    }

    /// Takes what arrived. To keep memory bounded, call it only after [`Decoder::next`] said [`Decoded::NeedMore`].
    pub fn push(&mut self, bytes: &[u8]) {
        if !matches!(self.state, State::Dead) {
            self.input.extend_from_slice(bytes);
        }
    }

    /// The next thing that what arrived so far makes whole.
    #[expect(clippy::should_implement_trait, reason = "an iterator ends; this says what it lacks")]
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

    /// Takes the head off the input, if it is whole. On an error the state says how the connection goes on.
    fn head(&mut self) -> Result<Option<Head>, Refusal> {
        let within_limit = &self.input[..self.input.len().min(self.max_head)];
        let lines_end = within_limit.iter().rposition(|&byte| byte == b'\n').map_or(0, |at| at + 1);
        if lines_end > self.tried {
            if let Some((head_len, head)) = parse_head(&self.input[..lines_end])? {
                self.take(head_len);
                self.check_body(&head)?;
                return Ok(Some(head));
            }
            self.tried = lines_end;
        }
        if self.input.len() >= self.max_head {
            return Err(fatal(ProtocolError::HeadTooLong { limit: self.max_head }, Version::Http11));
        }
        Ok(None)
    }

    /// Sees whether the body that `head` announces is within the limit.
    fn check_body(&mut self, head: &Head) -> Result<(), Refusal> {
        if head.body_len <= self.max_body as u64 {
            return Ok(());
        }
        let error = ProtocolError::PayloadTooLarge { size: head.body_len, limit: self.max_body };
        if head.expects_continue {
            // It may send the body all the same, or not: who knows what comes next.
            return Err(fatal(error, head.version));
        }
        self.state = State::Discard(head.body_len);
        Err(Refusal { error, version: head.version, keep_alive: head.keep_alive })
    }

    /// Takes the body of `head` off the input, if it is whole.
    fn body(&mut self, mut head: Head) -> Decoded {
        if (self.input.len() as u64) < head.body_len {
            // Once its body is on the way, nobody waits for word.
            let tell = mem::take(&mut head.expects_continue) && self.input.is_empty();
            let version = head.version;
            self.state = State::Body(head);
            return if tell { Decoded::Continue(version) } else { Decoded::NeedMore };
        }
        let body = self.take(head.body_len as usize);
        self.state = State::Head;
        let Head { method, path, version, keep_alive, .. } = head;
        Decoded::Request(Request { method, path, version, keep_alive, body })
    }

    /// Takes `len` bytes off the front of the input.
    fn take(&mut self, len: usize) -> Vec<u8> {
        self.tried = 0;
        if len == 0 {
            return Vec::new();
        }
        let rest = self.input.split_off(len);
        mem::replace(&mut self.input, rest)
    }
}

/// A refusal after which the connection closes.
fn fatal(error: ProtocolError, version: Version) -> Refusal {
    Refusal { error, version, keep_alive: false }
}

/// The head at the beginning of `input`, and how long it is. None if it is not whole.
fn parse_head(input: &[u8]) -> Result<Option<(usize, Head)>, Refusal> {
    let mut headers = [httparse::EMPTY_HEADER; MAX_HEADERS];
    let mut request = httparse::Request::new(&mut headers);
    let head_len = match request.parse(input) {
        Ok(httparse::Status::Complete(len)) => len,
        Ok(httparse::Status::Partial) => return Ok(None),
        Err(httparse::Error::TooManyHeaders) => {
            return Err(fatal(ProtocolError::TooManyHeaders, Version::Http11));
        }
        Err(error) => return Err(fatal(ProtocolError::Malformed(error), Version::Http11)),
    };
    let version = if request.version == Some(0) { Version::Http10 } else { Version::Http11 };
    let name = request.method.unwrap_or_default();
    let path = path_of(request.path.unwrap_or_default()).to_owned();
    let Some(method) = Method::from_name(name) else {
        return Err(fatal(ProtocolError::UnknownMethod { method: name.to_owned(), path }, version));
    };
    let headers = read_headers(request.headers).map_err(|error| fatal(error, version))?;
    let head = Head {
        method,
        path,
        version,
        keep_alive: !headers.close && (version == Version::Http11 || headers.keep_alive),
        // HTTP/1.0 knows no interim answers.
        expects_continue: headers.expects_continue && version == Version::Http11,
        body_len: headers.content_length.unwrap_or(0),
    };
    Ok(Some((head_len, head)))
}

/// What the headers say that matters here.
#[derive(Default)]
struct Headers {
    content_length: Option<u64>,
    close: bool,
    keep_alive: bool,
    expects_continue: bool,
}

fn read_headers(lines: &[httparse::Header<'_>]) -> Result<Headers, ProtocolError> {
    let mut headers = Headers::default();
    for line in lines {
        let is = |name: &str| line.name.eq_ignore_ascii_case(name);
        let text = || String::from_utf8_lossy(line.value).into_owned();
        if is("Content-Length") {
            let length = decimal(line.value).ok_or_else(|| ProtocolError::BadContentLength(text()))?;
            if headers.content_length.is_some_and(|before| before != length) {
                return Err(ProtocolError::BadContentLength(text()));
            }
            headers.content_length = Some(length);
        } else if is("Transfer-Encoding") {
            return Err(ProtocolError::TransferEncoding(text()));
        } else if is("Connection") {
            for word in line.value.split(|&byte| byte == b',').map(<[u8]>::trim_ascii) {
                headers.close |= word.eq_ignore_ascii_case(b"close");
                headers.keep_alive |= word.eq_ignore_ascii_case(b"keep-alive");
            }
        } else if is("Expect") {
            headers.expects_continue |= line.value.trim_ascii().eq_ignore_ascii_case(b"100-continue");
        }
    }
    Ok(headers)
}

/// A number written in decimal digits and nothing else.
fn decimal(text: &[u8]) -> Option<u64> {
    let text = text.trim_ascii();
    // `parse` would take a sign.
    text.iter().all(u8::is_ascii_digit).then(|| str::from_utf8(text).ok()?.parse().ok())?
}

/// The path of a request's target: of `http://host/path` what follows the host, otherwise all of it.
fn path_of(target: &str) -> &str {
    match target.strip_prefix("http://") {
        Some(rest) => rest.find('/').map_or("/", |at| &rest[at..]),
        None => target,
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    const MAX_HEAD: usize = 512;
    const MAX_BODY: usize = 100;

    /// What comes out when `pieces` go in, interim answers left out, and the most that the decoder held at any time.
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
    fn a_request_has_method_path_and_body() {
        let request =
            only_request(b"PUT /actions HTTP/1.1\r\nHost: localhost\r\ncontent-length: 2\r\n\r\n{}");
        assert_eq!(
            request,
            Request {
                method: Method::Put,
                path: "/actions".into(),
                version: Version::Http11,
                keep_alive: true,
                body: b"{}".to_vec()
            }
        );
    }

    #[test]
    fn the_host_of_an_absolute_target_is_dropped() {
        assert_eq!(only_request(b"GET http://localhost/vm/config HTTP/1.1\r\n\r\n").path, "/vm/config");
        assert_eq!(only_request(b"GET http://localhost HTTP/1.1\r\n\r\n").path, "/");
    }

    #[test]
    fn a_connection_stays_as_its_version_and_headers_say() {
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
    fn what_is_not_http_is_refused_and_nothing_after_it_is_read() {
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
            assert!(matches!(refusal.error, ProtocolError::Malformed(_)), "{refusal:?}");
            assert!(!refusal.keep_alive);
        }
    }

    #[test]
    fn other_methods_are_refused_by_name() {
        let refusal = only_refusal(b"POST /vm HTTP/1.1\r\n\r\n");
        let (method, path) = ("POST".into(), "/vm".into());
        assert_eq!(refusal.error, ProtocolError::UnknownMethod { method, path });
        assert!(!refusal.keep_alive);
    }

    #[test]
    fn lengths_that_are_not_one_decimal_number_are_refused() {
        for value in ["", "-1", "+1", "0x10", "1 2", "1, 1", "18446744073709551616"] {
            let refusal =
                only_refusal(format!("PUT / HTTP/1.1\r\nContent-Length: {value}\r\n\r\n").as_bytes());
            assert_eq!(refusal.error, ProtocolError::BadContentLength(value.into()));
        }
        let refusal = only_refusal(b"PUT / HTTP/1.1\r\nContent-Length: 1\r\nContent-Length: 2\r\n\r\n");
        assert_eq!(refusal.error, ProtocolError::BadContentLength("2".into()));
        let same_twice = b"PUT / HTTP/1.1\r\nContent-Length: 1\r\nContent-Length: 1\r\n\r\nx";
        assert_eq!(only_request(same_twice).body, b"x");
    }

    #[test]
    fn bodies_in_chunks_are_refused() {
        let refusal = only_refusal(
            b"PUT / HTTP/1.1\r\nTransfer-Encoding: chunked\r\nContent-Length: 3\r\n\r\n0\r\n\r\n",
        );
        assert_eq!(refusal.error, ProtocolError::TransferEncoding("chunked".into()));
        assert!(!refusal.keep_alive);
    }

    #[test]
    fn a_body_over_the_limit_is_skipped_and_the_next_request_is_read() {
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
    fn the_longest_body_and_the_longest_head_are_taken() {
        let body = "x".repeat(MAX_BODY);
        let fixed = format!("PUT /a HTTP/1.1\r\nContent-Length: {MAX_BODY}\r\nPad: \r\n\r\n");
        let padding = "y".repeat(MAX_HEAD - fixed.len());
        let head = fixed.replace("Pad: ", &format!("Pad: {padding}"));
        assert_eq!(head.len(), MAX_HEAD);
        assert_eq!(only_request(format!("{head}{body}").as_bytes()).body, body.as_bytes());
        let longer = head.replace("Pad: ", "Pad: y");
        assert_eq!(only_refusal(longer.as_bytes()).error, ProtocolError::HeadTooLong { limit: MAX_HEAD });
    }

    #[test]
    fn too_many_headers_are_refused() {
        let mut decoder = Decoder::new(8192, MAX_BODY);
        decoder.push(format!("GET / HTTP/1.1\r\n{}\r\n", "a: b\r\n".repeat(MAX_HEADERS + 1)).as_bytes());
        let Decoded::Refused(refusal) = decoder.next() else { panic!() };
        assert_eq!(refusal.error, ProtocolError::TooManyHeaders);
    }

    #[test]
    fn a_client_that_waits_for_word_gets_it_once() {
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
    fn a_client_that_waits_for_word_with_too_much_to_say_is_let_go() {
        let refusal = only_refusal(b"PUT /a HTTP/1.1\r\nExpect: 100-continue\r\nContent-Length: 101\r\n\r\n");
        assert_eq!(refusal.error, ProtocolError::PayloadTooLarge { size: 101, limit: 100 });
        assert!(!refusal.keep_alive);
    }

    /// Streams made of whole requests, broken ones and noise: what reaches deep into the decoder.
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
        fn how_the_stream_is_cut_changes_nothing(
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
        fn noise_never_panics_and_is_held_within_bounds(
            bytes in prop::collection::vec(any::<u8>(), 0..4096), piece in 1..64_usize,
        ) {
            let (_, most) = decode(bytes.chunks(piece));
            prop_assert!(most <= MAX_HEAD + MAX_BODY + piece, "{most}");
        }

        #[test]
        fn a_stream_is_held_within_bounds(stream in stream(), piece in 1..64_usize) {
            let (_, most) = decode(stream.chunks(piece));
            prop_assert!(most <= MAX_HEAD + MAX_BODY + piece, "{most}");
        }
    }
}
