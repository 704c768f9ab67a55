//! Request heads: the request line and the headers.

use crate::version::Version;

/// An empty slot for a header. The caller of [`HeadParser::parse`] passes an array of these: as
/// many as a request may have headers.
pub const NO_HEADER: httparse::Header<'static> = httparse::EMPTY_HEADER;

/// Why a request head is refused.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum HeadError {
    /// The bytes are not HTTP/1.x.
    #[error("not an HTTP/1.x request: {0}")]
    Malformed(httparse::Error),
    /// The head is longer than the limit.
    #[error("request line and headers are longer than {limit} bytes")]
    TooLong {
        /// Most bytes allowed.
        limit: usize,
    },
    /// The head has more headers than the limit.
    #[error("more than {limit} headers")]
    TooManyHeaders {
        /// Most headers allowed.
        limit: usize,
    },
    /// `Content-Length` is not a number, or there are two with different values.
    #[error("Content-Length is `{0}`: it must be one decimal number")]
    BadContentLength(String),
    /// The body has a transfer encoding other than `identity`, such as chunks.
    #[error("Transfer-Encoding is `{0}`: send the body in one piece, with Content-Length")]
    TransferEncoding(String),
}

/// Finds request heads at the start of a buffer that grows.
#[derive(Debug)]
pub struct HeadParser {
    max_len: usize,
    /// Bytes of the buffer that were parsed already and are not a whole head.
    parsed: usize,
}

impl HeadParser {
    /// A parser for heads of at most `max_len` bytes.
    pub fn new(max_len: usize) -> HeadParser {
        HeadParser { max_len, parsed: 0 }
    }

    /// Returns the head at the start of `input`, or `None` until it is complete.
    ///
    /// After `None` the next call must pass the same bytes and more. After a head or an error, the
    /// next call is for the next request. The headers are stored in `headers`; its length is their
    /// limit.
    pub fn parse<'a>(
        &mut self,
        input: &'a [u8],
        headers: &'a mut [httparse::Header<'a>],
    ) -> Result<Option<RequestHead<'a>>, HeadError> {
        // A head ends with a line. To parse whole lines only makes the result independent of how
        // the stream was cut.
        let within_limit = &input[..input.len().min(self.max_len)];
        let lines_end = within_limit.iter().rposition(|&byte| byte == b'\n').map_or(0, |at| at + 1);
        if lines_end > std::mem::take(&mut self.parsed)
            && let Some(head) = parse_lines(&input[..lines_end], headers)?
        {
            return Ok(Some(head));
        }
        if input.len() >= self.max_len {
            return Err(HeadError::TooLong { limit: self.max_len });
        }
        self.parsed = lines_end;
        Ok(None)
    }
}

fn parse_lines<'a>(
    lines: &'a [u8],
    headers: &'a mut [httparse::Header<'a>],
) -> Result<Option<RequestHead<'a>>, HeadError> {
    let limit = headers.len();
    let mut request = httparse::Request::new(headers);
    let len = match request.parse(lines) {
        Ok(httparse::Status::Complete(len)) => len,
        Ok(httparse::Status::Partial) => return Ok(None),
        Err(httparse::Error::TooManyHeaders) => return Err(HeadError::TooManyHeaders { limit }),
        Err(error) => return Err(HeadError::Malformed(error)),
    };
    Ok(Some(RequestHead {
        method: request.method.unwrap_or_default(),
        path: path_of(request.path.unwrap_or_default()),
        version: if request.version == Some(0) { Version::Http10 } else { Version::Http11 },
        len,
        headers: request.headers,
    }))
}

/// Drops scheme and host of an absolute target, which proxies send: `http://host/path` is `/path`.
fn path_of(target: &str) -> &str {
    match target.strip_prefix("http://") {
        Some(rest) => rest.find('/').map_or("/", |at| &rest[at..]),
        None => target,
    }
}

/// A complete request head.
#[derive(Debug)]
pub struct RequestHead<'a> {
    /// The method, as sent.
    pub method: &'a str,
    /// The request target, without scheme and host, with the query.
    pub path: &'a str,
    /// The version to respond in.
    pub version: Version,
    /// Length of the head in the buffer, in bytes.
    pub len: usize,
    headers: &'a [httparse::Header<'a>],
}

/// What the headers say about the body and the connection.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Framing {
    /// Length of the body in bytes; 0 without `Content-Length`.
    pub body_len: u64,
    /// Whether the connection stays open after the response, by the rules of HTTP.
    pub keep_alive: bool,
    /// Whether the client asks for `100 Continue` before it sends the body.
    pub expects_continue: bool,
}

impl<'a> RequestHead<'a> {
    /// Names and values of the headers, in order, without surrounding whitespace.
    pub fn headers(&self) -> impl Iterator<Item = (&'a str, &'a [u8])> {
        self.headers.iter().map(|header| (header.name, header.value.trim_ascii()))
    }

    /// Evaluates the headers that frame the request (RFC 9112, 6 and 9.3). The first bad one is the
    /// error.
    pub fn framing(&self) -> Result<Framing, HeadError> {
        let (mut content_length, mut close, mut keep_alive, mut expects_continue) =
            (None, false, false, false);
        for (name, value) in self.headers() {
            let is = |other: &str| name.eq_ignore_ascii_case(other);
            let text = || String::from_utf8_lossy(value).into_owned();
            if is("Content-Length") {
                let len = decimal(value).filter(|len| content_length.is_none_or(|before| before == *len));
                content_length = Some(len.ok_or_else(|| HeadError::BadContentLength(text()))?);
            } else if is("Transfer-Encoding") {
                // `identity` is no encoding. Old clients send it.
                if !value.eq_ignore_ascii_case(b"identity") {
                    return Err(HeadError::TransferEncoding(text()));
                }
            } else if is("Connection") {
                for option in value.split(|&byte| byte == b',').map(<[u8]>::trim_ascii) {
                    close |= option.eq_ignore_ascii_case(b"close");
                    keep_alive |= option.eq_ignore_ascii_case(b"keep-alive");
                }
            } else if is("Expect") {
                expects_continue |= value.eq_ignore_ascii_case(b"100-continue");
            }
        }
        let is_http11 = self.version == Version::Http11;
        Ok(Framing {
            body_len: content_length.unwrap_or(0),
            keep_alive: !close && (is_http11 || keep_alive),
            // Also of a client of HTTP/1.0, which has no interim responses: it asks for one.
            expects_continue,
        })
    }
}

/// Parses a number of decimal digits and nothing else: no sign, no whitespace.
pub fn decimal(text: &[u8]) -> Option<u64> {
    // `parse` accepts a sign.
    text.iter().all(u8::is_ascii_digit).then(|| str::from_utf8(text).ok()?.parse().ok())?
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    const MAX_LEN: usize = 256;
    const MAX_HEADERS: usize = 8;

    /// Parses `bytes` as one head with `read`.
    fn parse<T>(bytes: &[u8], read: impl FnOnce(&RequestHead<'_>) -> T) -> Result<Option<T>, HeadError> {
        let mut headers = [NO_HEADER; MAX_HEADERS];
        let head = HeadParser::new(MAX_LEN).parse(bytes, &mut headers)?;
        Ok(head.map(|head| read(&head)))
    }

    fn framing(head: &str) -> Result<Framing, HeadError> {
        let mut headers = [NO_HEADER; MAX_HEADERS];
        let head = HeadParser::new(MAX_LEN).parse(head.as_bytes(), &mut headers);
        head.unwrap().unwrap().framing()
    }

    /// Outcome, as text, of a head that arrives in `pieces`.
    fn outcome<'a>(pieces: impl IntoIterator<Item = &'a [u8]>) -> String {
        let (mut parser, mut input) = (HeadParser::new(MAX_LEN), Vec::new());
        for piece in pieces {
            input.extend_from_slice(piece);
            let mut headers = [NO_HEADER; MAX_HEADERS];
            match parser.parse(&input, &mut headers) {
                Ok(None) => {}
                other => return format!("{other:?}"),
            }
        }
        "incomplete".to_owned()
    }

    #[test]
    fn head_has_method_path_version_length_and_headers() {
        let text = b"PUT /a?b HTTP/1.0\r\nHost:  x \r\nAccept:y\r\n\r\nbody";
        parse(text, |head| {
            assert_eq!((head.method, head.path, head.version), ("PUT", "/a?b", Version::Http10));
            assert_eq!(&text[head.len..], b"body");
            assert_eq!(head.headers().collect::<Vec<_>>(), [("Host", &b"x"[..]), ("Accept", b"y")]);
        })
        .unwrap()
        .unwrap();
    }

    #[test]
    fn scheme_and_host_of_absolute_targets_are_dropped() {
        for (target, path) in [("http://localhost/vm/config", "/vm/config"), ("http://localhost", "/")] {
            let text = format!("GET {target} HTTP/1.1\r\n\r\n");
            assert_eq!(parse(text.as_bytes(), |head| head.path.to_owned()), Ok(Some(path.to_owned())));
        }
    }

    #[test]
    fn head_at_the_limit_is_complete_and_one_byte_more_is_refused() {
        let fixed = "GET / HTTP/1.1\r\na: \r\n\r\n".len();
        let padded = |len: usize| format!("GET / HTTP/1.1\r\na: {}\r\n\r\n", "x".repeat(len - fixed));
        assert_eq!(parse(padded(MAX_LEN).as_bytes(), |head| head.len), Ok(Some(MAX_LEN)));
        let too_long = Err(HeadError::TooLong { limit: MAX_LEN });
        assert_eq!(parse(padded(MAX_LEN + 1).as_bytes(), |head| head.len), too_long);
    }

    #[test]
    fn headers_over_the_limit_are_refused() {
        let with = |count| format!("GET / HTTP/1.1\r\n{}\r\n", "a: b\r\n".repeat(count));
        assert!(parse(with(MAX_HEADERS).as_bytes(), |_| ()).is_ok());
        let too_many = Err(HeadError::TooManyHeaders { limit: MAX_HEADERS });
        assert_eq!(parse(with(MAX_HEADERS + 1).as_bytes(), |_| ()), too_many);
    }

    #[test]
    fn content_length_must_be_one_decimal_number() {
        let with = |lines: &str| framing(&format!("PUT / HTTP/1.1\r\n{lines}\r\n\r\n"));
        for value in ["", "-1", "+1", "0x10", "1 2", "1, 1", "18446744073709551616"] {
            assert_eq!(
                with(&format!("Content-Length: {value}")),
                Err(HeadError::BadContentLength(value.into()))
            );
        }
        for (first, second) in [(1, 2), (0, 2), (2, 0)] {
            assert_eq!(
                with(&format!("Content-Length: {first}\r\nContent-Length: {second}")),
                Err(HeadError::BadContentLength(second.to_string()))
            );
        }
        assert_eq!(with("Content-Length: 7\r\ncontent-length: 7").unwrap().body_len, 7);
        assert_eq!(with("a: b").unwrap().body_len, 0);
    }

    #[test]
    fn transfer_encodings_are_refused() {
        assert_eq!(
            framing("PUT / HTTP/1.1\r\nTransfer-Encoding: chunked\r\nContent-Length: 3\r\n\r\n"),
            Err(HeadError::TransferEncoding("chunked".into()))
        );
        let identity = framing("PUT / HTTP/1.1\r\nTransfer-Encoding: Identity\r\nContent-Length: 3\r\n\r\n");
        assert_eq!(identity.unwrap().body_len, 3);
    }

    #[test]
    fn version_and_connection_header_decide_keep_alive() {
        for (version, header, stays) in [
            ("1.1", "", true),
            ("1.1", "Connection: close\r\n", false),
            ("1.1", "Connection: Upgrade, Close\r\n", false),
            ("1.0", "", false),
            ("1.0", "Connection: Keep-Alive\r\n", true),
            ("1.0", "Connection: close, keep-alive\r\n", false),
        ] {
            let framing = framing(&format!("GET / HTTP/{version}\r\n{header}\r\n")).unwrap();
            assert_eq!(framing.keep_alive, stays, "{version} {header}");
        }
    }

    #[test]
    fn clients_of_every_version_can_ask_for_continue() {
        for (version, value, waits) in
            [("1.1", "100-Continue", true), ("1.1", "x", false), ("1.0", "100-continue", true)]
        {
            let framing = framing(&format!("PUT / HTTP/{version}\r\nExpect: {value}\r\n\r\n")).unwrap();
            assert_eq!(framing.expects_continue, waits, "{version} {value}");
        }
    }

    proptest! {
        #[test]
        fn cuts_of_the_stream_do_not_change_the_outcome(
            line in "(GET|PUT) /[a-z]{0,8} HTTP/1\\.[01]|[ -~]{0,20}",
            headers in prop::collection::vec("[A-Za-z]{1,8}: [ -~]{0,60}|[ -~]{0,12}", 0..10),
            end in prop::sample::select(vec!["\r\n", "\n", "\r"]),
            size in 1..9_usize,
        ) {
            let text = [vec![line], headers, vec![String::new(); 2]].concat().join(end);
            let whole = outcome([text.as_bytes()]);
            prop_assert_eq!(outcome(text.as_bytes().chunks(size)), whole);
        }
    }
}
