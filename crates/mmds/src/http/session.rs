//! One connection of a guest: bytes in, responses out.

use vesta_http::{HeadParser, NO_HEADER, Response, Version};

use super::limits::{MAX_HEAD, MAX_HEADERS};
use super::request::{Method, Request, refusal};

/// HTTP state of one connection.
#[derive(Debug)]
pub(crate) struct Session {
    /// The part of a request head that has arrived.
    input: Vec<u8>,
    head_parser: HeadParser,
    /// Bytes of the last request's body that are still to be skipped.
    to_skip: u64,
    /// The response being sent, of which `sent` bytes are gone.
    output: Vec<u8>,
    sent: usize,
    /// Whether `output` is the last response of this connection.
    closing: bool,
}

impl Session {
    /// A session at the start of a connection.
    pub(crate) fn new() -> Session {
        Session {
            input: Vec::new(),
            head_parser: HeadParser::new(MAX_HEAD),
            to_skip: 0,
            output: Vec::new(),
            sent: 0,
            closing: false,
        }
    }

    /// Consumes bytes from the front of `bytes` and returns how many.
    ///
    /// It stops at the end of a request head, which `respond` then answers. It consumes nothing
    /// while a response is unsent, and everything after the last response.
    pub(crate) fn consume(&mut self, bytes: &[u8], respond: impl FnOnce(&Request) -> Response) -> usize {
        if self.closing {
            return bytes.len();
        }
        if !self.output().is_empty() {
            return 0;
        }
        if self.to_skip > 0 {
            let skipped = bytes.len().min(usize::try_from(self.to_skip).unwrap_or(usize::MAX));
            self.to_skip -= skipped as u64;
            return skipped;
        }
        let before = self.input.len();
        // The parser refuses a head at the limit, so there is always space for one byte.
        let len = bytes.len().min(MAX_HEAD - before);
        self.input.extend_from_slice(&bytes[..len]);
        let mut headers = [NO_HEADER; MAX_HEADERS];
        let (consumed, request) = match self.head_parser.parse(&self.input, &mut headers) {
            // The head ends in the new bytes: those before were not a whole head.
            Ok(Some(head)) => (head.len - before, Request::from_head(&head)),
            Ok(None) => return len,
            Err(error) => (bytes.len(), Err(refusal(&error))),
        };
        self.input = Vec::new();
        let (response, version, keep_alive) = match request {
            Ok(request) => {
                self.to_skip = request.body_len;
                let response = respond(&request);
                let head_only = request.method == Method::Head;
                (Response { head_only, ..response }, request.version, request.keep_alive)
            }
            Err(response) => (response, Version::Http11, false),
        };
        self.closing = !keep_alive;
        response.put(version, keep_alive, &mut self.output);
        consumed
    }

    /// Bytes to be sent.
    pub(crate) fn output(&self) -> &[u8] {
        &self.output[self.sent..]
    }

    /// Removes `len` sent bytes from the output.
    pub(crate) fn sent(&mut self, len: usize) {
        self.sent += len;
        if self.sent == self.output.len() {
            self.output = Vec::new();
            self.sent = 0;
        }
    }

    /// Whether the connection is to be closed once the output is sent.
    pub(crate) fn is_closing(&self) -> bool {
        self.closing
    }

    /// Whether the session is between two requests.
    pub(crate) fn is_idle(&self) -> bool {
        self.input.is_empty() && self.output.is_empty() && self.to_skip == 0
    }

    /// Bytes that the session stores.
    #[cfg(any(test, feature = "testing"))]
    pub(crate) fn held(&self) -> usize {
        self.input.len() + self.output.len()
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;
    use crate::http::response;

    /// Feeds `pieces` to a session and reads responses at once. Returns the responses, whose body
    /// is the path of the request, and the most bytes the session held at a time.
    fn exchange<'a>(pieces: impl IntoIterator<Item = &'a [u8]>) -> (String, usize) {
        let (mut session, mut out, mut most) = (Session::new(), Vec::new(), 0);
        for mut piece in pieces {
            while !piece.is_empty() {
                let taken = session.consume(piece, |request| response::text(200, &request.path));
                piece = &piece[taken..];
                most = most.max(session.held());
                let output = session.output().to_vec();
                assert!(taken > 0, "a session with nothing to send consumes something");
                session.sent(output.len());
                out.extend(output);
            }
        }
        (String::from_utf8(out).unwrap(), most)
    }

    fn statuses(out: &str) -> Vec<&str> {
        let responses = out.split("HTTP/1.").skip(1).filter(|text| text.starts_with(['0', '1']));
        responses.map(|response| &response[2..5]).collect()
    }

    #[test]
    fn pipelined_requests_are_answered_in_order_without_bodies() {
        let (out, _) = exchange([
            &b"GET /a HTTP/1.1\r\n\r\nPOST /b HTTP/1.1\r\nContent-Length: 20\r\n\r\nGET /x HTTP/1.1\r\n\r\n !GET /c HTTP/1.1\r\n\r\n"[..],
        ]);
        let bodies: Vec<_> = out.split("\r\n\r\n").skip(1).map(|rest| &rest[..2]).collect();
        assert_eq!(bodies, ["/a", "/b", "/c"]);
    }

    #[test]
    fn request_with_a_body_is_invalid_before_the_body_arrives() {
        for body in ["", "abc", "abcdefghij"] {
            let text = format!("GET /a HTTP/1.1\r\nContent-Length: 10\r\n\r\n{body}");
            let (out, _) = exchange([text.as_bytes()]);
            assert!(out.starts_with("HTTP/1.1 400 ") && out.ends_with("\r\n\r\nInvalid request."), "{out}");
            assert!(out.contains("Connection: close"), "{out}");
        }
    }

    #[test]
    fn response_to_http_1_0_closes_the_connection() {
        let (out, _) = exchange([&b"GET /ab HTTP/1.0\r\n\r\nGET /more HTTP/1.0\r\n\r\n"[..]]);
        assert_eq!(
            out,
            "HTTP/1.0 200 OK\r\nServer: Firecracker API\r\nConnection: close\r\n\
             Content-Type: text/plain\r\nContent-Length: 3\r\n\r\n/ab"
        );
    }

    #[test]
    fn response_to_head_has_no_body() {
        let (out, _) = exchange([&b"HEAD /ab HTTP/1.1\r\n\r\nGET /c HTTP/1.1\r\n\r\n"[..]]);
        let (first, second) = out.split_once("\r\n\r\n").unwrap();
        assert!(first.contains("Content-Length: 3"), "{out}");
        assert!(second.starts_with("HTTP/1.1 200") && second.ends_with("\r\n\r\n/c"), "{out}");
    }

    #[test]
    fn no_byte_is_consumed_while_a_response_is_unsent() {
        let mut session = Session::new();
        let request = b"GET /a HTTP/1.1\r\n\r\n";
        assert_eq!(session.consume(request, |_| response::text(200, "")), request.len());
        assert_eq!(session.consume(request, |_| panic!()), 0);
        let waiting = session.output().len();
        session.sent(waiting - 1);
        assert_eq!(session.consume(request, |_| panic!()), 0);
        session.sent(1);
        assert_eq!(session.consume(request, |_| response::text(200, "")), request.len());
    }

    #[test]
    fn endless_head_is_refused_and_the_rest_is_dropped() {
        for piece in [&b"x"[..], b"a: b\r\n", b"\r\n"] {
            let begin = if piece == b"\r\n" { &b""[..] } else { b"GET / HTTP/1.1\r\nheader: " };
            let (out, most) = exchange(std::iter::once(begin).chain(std::iter::repeat_n(piece, 8000)));
            assert_eq!(statuses(&out), ["431"]);
            assert!(most <= MAX_HEAD + 512, "{most}");
        }
    }

    #[test]
    fn head_at_the_limit_is_answered_and_one_byte_more_is_refused() {
        let fixed = "GET / HTTP/1.1\r\na: \r\n\r\n".len();
        for (len, status) in [(MAX_HEAD, "200"), (MAX_HEAD + 1, "431")] {
            let text = format!("GET / HTTP/1.1\r\na: {}\r\n\r\n", "x".repeat(len - fixed));
            assert_eq!(statuses(&exchange([text.as_bytes()]).0), [status], "{len}");
        }
    }

    #[test]
    fn requests_after_malformed_input_are_ignored() {
        let (out, _) = exchange([&b"\0\x01\n"[..], b"GET / HTTP/1.1\r\n\r\n"]);
        assert_eq!(statuses(&out), ["400"]);
        assert!(out.contains("Connection: close"));
    }

    fn stream() -> impl Strategy<Value = Vec<u8>> {
        let line = prop_oneof![4 => "(GET|PUT|POST) /[a-z]{0,8} HTTP/1\\.[01]", 1 => "[ -~]{0,20}"];
        let header = prop_oneof![
            4 => "[A-Za-z]{1,8}: [ -~]{0,12}",
            1 => prop::sample::select(vec!["Connection: close", "Connection: keep-alive", "Content-Length: 7", "Accept: application/json"])
                .prop_map(str::to_owned),
            1 => "[ -~]{0,12}",
            1 => "[a-z]{4080,4100}: x",
        ];
        let end = prop::sample::select(vec!["\r\n", "\r\n", "\n"]);
        let request = (line, prop::collection::vec(header, 0..4), end).prop_map(|(line, headers, end)| {
            [vec![line], headers, vec![String::new(), String::new()]].concat().join(end).into_bytes()
        });
        let noise = prop::collection::vec(any::<u8>(), 0..40);
        prop::collection::vec(prop_oneof![8 => request, 1 => noise], 0..6).prop_map(|parts| parts.concat())
    }

    proptest! {
        #[test]
        fn cuts_of_the_stream_do_not_change_the_responses(
            stream in stream(), cuts in prop::collection::vec(any::<prop::sample::Index>(), 0..12),
        ) {
            let (whole, _) = exchange([stream.as_slice()]);
            prop_assert_eq!(&exchange(stream.chunks(1)).0, &whole);
            let mut cuts: Vec<usize> = cuts.iter().map(|cut| cut.index(stream.len() + 1)).collect();
            cuts.extend([0, stream.len()]);
            cuts.sort_unstable();
            let (cut, most) = exchange(cuts.windows(2).map(|pair| &stream[pair[0]..pair[1]]));
            prop_assert_eq!(&cut, &whole);
            prop_assert!(most <= 2 * MAX_HEAD + 512, "{}", most);
        }
    }
}
