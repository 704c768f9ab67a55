//! One connection: from bytes to requests, and from answers to bytes.

use super::head::{self, Head};
use super::{MAX_HEAD, Response};

/// One connection of a guest's.
#[derive(Debug, Default)]
pub(crate) struct Session {
    /// The head that is on its way in.
    input: Vec<u8>,
    /// How many bytes of the last request's body are still to be skipped.
    to_skip: u64,
    /// The answer on its way out, of which `sent` bytes are gone.
    output: Vec<u8>,
    sent: usize,
    /// Whether the last answer has been given.
    closing: bool,
}

impl Session {
    /// Takes bytes off the front of `bytes`, as many as the answer shows; at most to the end of one request, which `answer`
    /// then answers. Takes none while an answer is waiting, and all of them once the last one was given.
    pub(crate) fn take(&mut self, bytes: &[u8], answer: impl FnOnce(&Head) -> Response) -> usize {
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
        // One byte past the longest head there is proves that this one is longer.
        let room = bytes.len().min(MAX_HEAD + 1 - before);
        // Only a line's end can be a head's: so a head is parsed once per line, not once per byte.
        let Some(last_line) = bytes[..room].iter().rposition(|&byte| byte == b'\n') else {
            self.input.extend_from_slice(&bytes[..room]);
            self.refuse_endless();
            return room;
        };
        self.input.extend_from_slice(&bytes[..=last_line]);
        match head::parse(&self.input) {
            Ok(Some((len, head))) => {
                self.input = Vec::new();
                self.to_skip = head.body_len;
                self.closing = !head.keep_alive;
                self.output = answer(&head).into_bytes(Some(head.method), head.is_http10, head.keep_alive);
                // The head's end is among the new bytes: the ones before made no head.
                len - before
            }
            Ok(None) => {
                self.refuse_endless();
                last_line + 1
            }
            Err(refusal) => {
                self.refuse(refusal);
                bytes.len()
            }
        }
    }

    /// What is to be sent.
    pub(crate) fn output(&self) -> &[u8] {
        &self.output[self.sent..]
    }

    /// So many bytes of the output have been sent.
    pub(crate) fn sent(&mut self, len: usize) {
        self.sent += len;
        if self.sent == self.output.len() {
            self.output = Vec::new();
            self.sent = 0;
        }
    }

    /// Whether the connection is to be closed once the output is gone.
    pub(crate) fn is_closing(&self) -> bool {
        self.closing
    }

    /// Whether it is between two requests.
    pub(crate) fn is_idle(&self) -> bool {
        self.input.is_empty() && self.output.is_empty() && self.to_skip == 0
    }

    fn refuse_endless(&mut self) {
        if self.input.len() > MAX_HEAD {
            self.refuse(Response::text(
                431,
                &format!("Request line and headers are at most {MAX_HEAD} bytes long."),
            ));
        }
    }

    fn refuse(&mut self, refusal: Response) {
        self.input = Vec::new();
        self.closing = true;
        self.output = refusal.into_bytes(None, false, false);
    }

    /// How many bytes it holds.
    #[cfg(any(test, feature = "testing"))]
    pub(crate) fn held(&self) -> usize {
        self.input.len() + self.output.len()
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    /// What comes out when `pieces` go in and answers are read at once, and the most that was held at any time. An answer's
    /// body is the request's path.
    fn exchange<'a>(pieces: impl IntoIterator<Item = &'a [u8]>) -> (String, usize) {
        let (mut session, mut out, mut most) = (Session::default(), Vec::new(), 0);
        for mut piece in pieces {
            while !piece.is_empty() {
                let taken = session.take(piece, |head| Response::text(200, &head.path));
                piece = &piece[taken..];
                most = most.max(session.held());
                let output = session.output().to_vec();
                assert!(taken > 0, "a session with nothing to send takes something");
                session.sent(output.len());
                out.extend(output);
            }
        }
        (String::from_utf8(out).unwrap(), most)
    }

    fn statuses(out: &str) -> Vec<&str> {
        out.split("HTTP/1.").skip(1).map(|answer| &answer[2..5]).collect()
    }

    #[test]
    fn requests_are_answered_one_after_the_other_and_bodies_skipped() {
        let (out, _) = exchange([
            &b"GET /a HTTP/1.1\r\n\r\nPUT /b HTTP/1.1\r\nContent-Length: 20\r\n\r\nGET /x HTTP/1.1\r\n\r\n !GET /c HTTP/1.1\r\n\r\n"[..],
        ]);
        let bodies: Vec<_> = out.split("\r\n\r\n").skip(1).map(|rest| &rest[..2]).collect();
        assert_eq!(bodies, ["/a", "/b", "/c"]);
    }

    #[test]
    fn an_answer_says_what_follows() {
        let (out, _) = exchange([&b"GET /ab HTTP/1.0\r\n\r\nGET /more HTTP/1.0\r\n\r\n"[..]]);
        assert_eq!(
            out,
            "HTTP/1.0 200 OK\r\nServer: Firecracker API\r\nConnection: close\r\n\
             Content-Type: text/plain\r\nContent-Length: 3\r\n\r\n/ab"
        );
    }

    #[test]
    fn an_answer_to_head_has_no_body_and_the_next_request_is_answered() {
        let (out, _) = exchange([&b"HEAD /ab HTTP/1.1\r\n\r\nGET /c HTTP/1.1\r\n\r\n"[..]]);
        let (first, second) = out.split_once("\r\n\r\n").unwrap();
        assert!(first.contains("Content-Length: 3"), "{out}");
        assert!(second.starts_with("HTTP/1.1 200") && second.ends_with("\r\n\r\n/c"), "{out}");
    }

    #[test]
    fn no_byte_is_taken_while_an_answer_waits() {
        let mut session = Session::default();
        let request = b"GET /a HTTP/1.1\r\n\r\n";
        assert_eq!(session.take(request, |_| Response::text(200, "")), request.len());
        assert_eq!(session.take(request, |_| panic!()), 0);
        let waiting = session.output().len();
        session.sent(waiting - 1);
        assert_eq!(session.take(request, |_| panic!()), 0);
        session.sent(1);
        assert_eq!(session.take(request, |_| Response::text(200, "")), request.len());
    }

    #[test]
    fn an_endless_head_is_refused_and_what_follows_is_dropped() {
        for piece in [&b"x"[..], b"a: b\r\n", b"\r\n"] {
            let begin = if piece == b"\r\n" { &b""[..] } else { b"GET / HTTP/1.1\r\nheader: " };
            let (out, most) = exchange(std::iter::once(begin).chain(std::iter::repeat_n(piece, 8000)));
            assert_eq!(statuses(&out), ["431"]);
            assert!(most <= MAX_HEAD + 512, "{most}");
        }
    }

    #[test]
    fn what_is_not_http_is_refused_and_nothing_after_it_is_read() {
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
        fn how_the_stream_is_cut_changes_nothing_and_little_is_held(
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
