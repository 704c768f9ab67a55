//! [`Skip`]: passes over what remains of a refused request, so that the next one can be read.
//!
//! How far a request reaches follows from its bytes alone, not from how they arrive:
//!
//! - the body of a request whose head is valid: as many bytes as `Content-Length` says, or its
//!   chunks (RFC 9112, 7.1);
//! - a head that is not valid: to the empty line that ends it, and then its body, if
//!   `Content-Length` or `Transfer-Encoding` are clear. A request line ends it too: a client whose
//!   last request was noise gets an answer to its next one.
//!
//! Nothing is stored but the last, incomplete line.

use vesta_http::decimal;

use super::request::Method;

/// Longest line between chunks, in bytes.
const MAX_CHUNK_LINE: usize = 1024;

/// What remains of a refused request.
#[derive(Debug)]
pub(super) enum Skip {
    /// This many bytes of its body.
    Body(u64),
    /// The lines of a head that is not valid.
    Head(HeadLines),
    /// Chunks, from a line with the size of one.
    ChunkSize,
    /// This many bytes of a chunk, and those after it.
    ChunkData(u64),
    /// The end of a chunk's last line, and the chunks after it.
    ChunkEnd,
    /// The lines after the last chunk.
    Trailers,
}

/// The outcome of [`Skip::advance`].
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Skipped {
    /// The input starts with the next request.
    All,
    /// The request has not ended yet.
    NeedMore,
    /// The end of the request cannot be found.
    Lost,
}

/// The rest of a head that is not valid.
#[derive(Debug)]
pub(super) struct HeadLines {
    /// Longest line that is stored until it is complete.
    max_line: usize,
    /// Whether the request line is still to be skipped. It may be valid.
    at_request_line: bool,
    /// Whether the input starts within a line that was too long to store.
    in_long_line: bool,
    /// Whether the client asks for `100 Continue`.
    expects_continue: bool,
    body: Body,
}

/// The body of a request, as far as the headers read so far say.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Body {
    /// No header says that there is one.
    None,
    Length(u64),
    Chunks,
    /// The headers contradict each other.
    Unclear,
}

impl Skip {
    /// A body of this many bytes.
    pub(super) fn body(len: u64) -> Skip {
        Skip::Body(len)
    }

    /// A body in chunks.
    pub(super) fn chunks() -> Skip {
        Skip::ChunkSize
    }

    /// A head that is not valid, from its request line. `max_head` bounds what is stored.
    pub(super) fn head(max_head: usize) -> Skip {
        Skip::Head(HeadLines {
            max_line: max_head,
            at_request_line: true,
            in_long_line: false,
            expects_continue: false,
            body: Body::None,
        })
    }

    /// Takes bytes of the request off the front of `input`.
    pub(super) fn advance(&mut self, input: &mut Vec<u8>) -> Skipped {
        let mut rest = input.as_slice();
        let skipped = loop {
            if let Some(skipped) = self.step(&mut rest) {
                break skipped;
            }
        };
        let taken = input.len() - rest.len();
        input.drain(..taken);
        skipped
    }

    /// Takes one line or one piece of a body off `input`. `None` if there may be more.
    fn step(&mut self, input: &mut &[u8]) -> Option<Skipped> {
        match self {
            Skip::Body(remaining) => return Some(take_up_to(input, remaining)),
            Skip::ChunkData(remaining) => {
                if take_up_to(input, remaining) == Skipped::NeedMore {
                    return Some(Skipped::NeedMore);
                }
                *self = Skip::ChunkEnd;
            }
            Skip::Head(head) => match head.step(input) {
                Ok(None) => {}
                Ok(Some(Body::None)) => *self = Skip::Body(0),
                Ok(Some(Body::Length(len))) => *self = Skip::Body(len),
                Ok(Some(Body::Chunks)) => *self = Skip::ChunkSize,
                Ok(Some(Body::Unclear)) => return Some(Skipped::Lost),
                Err(skipped) => return Some(skipped),
            },
            Skip::ChunkSize | Skip::ChunkEnd | Skip::Trailers => {
                let line = take_line(input);
                if line.unwrap_or(input).len() > MAX_CHUNK_LINE {
                    return Some(Skipped::Lost);
                }
                let Some(line) = line else { return Some(Skipped::NeedMore) };
                *self = match (&self, without_end(line)) {
                    (Skip::ChunkSize, line) => match chunk_size(line) {
                        Some(0) => Skip::Trailers,
                        Some(size) => Skip::ChunkData(size),
                        None => return Some(Skipped::Lost),
                    },
                    (Skip::ChunkEnd, []) => Skip::ChunkSize,
                    (Skip::Trailers, []) => return Some(Skipped::All),
                    (Skip::Trailers, _) => Skip::Trailers,
                    _ => return Some(Skipped::Lost),
                };
            }
        }
        None
    }
}

impl HeadLines {
    /// Takes a line. Returns the body after the last one.
    fn step(&mut self, input: &mut &[u8]) -> Result<Option<Body>, Skipped> {
        let before = *input;
        let line = take_line(input);
        // The same whether the line has arrived as a whole or not.
        self.in_long_line |= line.unwrap_or(input).len() >= self.max_line;
        let Some(line) = line else {
            if self.in_long_line {
                *input = &[];
            }
            return Err(Skipped::NeedMore);
        };
        if std::mem::take(&mut self.in_long_line) {
            self.at_request_line = false;
            return Ok(None);
        }
        let line = without_end(line);
        if std::mem::replace(&mut self.at_request_line, false) {
            // Empty lines before a request are no part of it.
            self.at_request_line = line.is_empty();
            return Ok(None);
        }
        if line.is_empty() {
            let has_body = !matches!(self.body, Body::None | Body::Length(0));
            let maybe_unsent = self.expects_continue && has_body;
            return Ok(Some(if maybe_unsent { Body::Unclear } else { self.body }));
        }
        if is_request_line(line) {
            *input = before;
            return Err(Skipped::All);
        }
        self.read_header(line);
        Ok(None)
    }

    fn read_header(&mut self, line: &[u8]) {
        let Some(colon) = line.iter().position(|&byte| byte == b':') else { return };
        let (name, value) = (line[..colon].trim_ascii(), line[colon + 1..].trim_ascii());
        let is = |other: &str| name.eq_ignore_ascii_case(other.as_bytes());
        if is("Content-Length") {
            self.body = match (decimal(value), self.body) {
                (Some(len), Body::None) => Body::Length(len),
                (Some(len), Body::Length(before)) if before == len => Body::Length(len),
                _ => Body::Unclear,
            };
        } else if is("Transfer-Encoding") && !value.eq_ignore_ascii_case(b"identity") {
            let chunked = value.eq_ignore_ascii_case(b"chunked") && self.body == Body::None;
            self.body = if chunked { Body::Chunks } else { Body::Unclear };
        } else if is("Expect") {
            self.expects_continue = true;
        }
    }
}

/// Takes bytes off `input`, as many as there are and `remaining` says.
fn take_up_to(input: &mut &[u8], remaining: &mut u64) -> Skipped {
    let taken = usize::try_from(*remaining).unwrap_or(usize::MAX).min(input.len());
    *input = &input[taken..];
    *remaining -= taken as u64;
    if *remaining == 0 { Skipped::All } else { Skipped::NeedMore }
}

/// Takes a whole line off `input`, and returns it without its final line feed.
fn take_line<'a>(input: &mut &'a [u8]) -> Option<&'a [u8]> {
    let end = input.iter().position(|&byte| byte == b'\n')?;
    let line = &input[..end];
    *input = &input[end + 1..];
    Some(line)
}

/// A line without its final carriage return.
fn without_end(line: &[u8]) -> &[u8] {
    line.strip_suffix(b"\r").unwrap_or(line)
}

/// The size of a chunk, from its first line: hexadecimal digits, then extensions.
fn chunk_size(line: &[u8]) -> Option<u64> {
    let digits = line.split(|&byte| byte == b';').next()?.trim_ascii();
    // `from_str_radix` accepts a sign.
    let digits = digits.iter().all(u8::is_ascii_hexdigit).then(|| str::from_utf8(digits).ok())??;
    u64::from_str_radix(digits, 16).ok()
}

/// Whether `line` is a request line with a method of the API.
fn is_request_line(line: &[u8]) -> bool {
    let mut words = str::from_utf8(line).unwrap_or_default().split(' ');
    let (method, target, version) = (words.next(), words.next(), words.next());
    method.is_some_and(|method| Method::from_name(method).is_some())
        && target.is_some_and(|target| !target.is_empty())
        && matches!(version, Some("HTTP/1.0" | "HTTP/1.1"))
        && words.next().is_none()
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Skips the front of `input`, byte by byte. Returns the outcome and what is left.
    fn skip(mut skip: Skip, input: &str) -> (Skipped, String) {
        let mut arrived = Vec::new();
        for (at, byte) in input.bytes().enumerate() {
            arrived.push(byte);
            let skipped = skip.advance(&mut arrived);
            if skipped != Skipped::NeedMore {
                return (skipped, String::from_utf8(arrived).unwrap() + &input[at + 1..]);
            }
        }
        (Skipped::NeedMore, String::from_utf8(arrived).unwrap())
    }

    #[test]
    fn chunks_end_with_an_empty_one_and_trailers() {
        for chunks in ["0\r\n\r\n", "2\r\n{}\r\n0\r\n\r\n", "A;x=y\r\n0123456789\r\n0\r\nT: v\r\n\r\n"] {
            let (skipped, rest) = skip(Skip::chunks(), &format!("{chunks}GET"));
            assert_eq!((skipped, rest.as_str()), (Skipped::All, "GET"), "{chunks}");
        }
        for bad in ["x\r\n", "\r\n", "-1\r\n", "1\r\nabc\r\n", "11111111111111111\r\n"] {
            assert_eq!(skip(Skip::chunks(), bad).0, Skipped::Lost, "{bad}");
        }
        assert_eq!(skip(Skip::chunks(), &"1".repeat(2 * MAX_CHUNK_LINE)).0, Skipped::Lost);
    }

    #[test]
    fn bad_head_ends_with_an_empty_line_and_its_body() {
        for (head, rest) in [
            ("hello\r\n\r\nGET", "GET"),
            ("\r\n\r\nhello\r\n\r\nGET", "GET"),
            ("PUT / HTTP/1.1\r\nno colon\r\ncontent-length: 3\r\n\r\nabcGET", "GET"),
            ("PUT / HTTP/1.1\r\nno colon\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\nGET", "GET"),
            ("GET / HTTP/1.1\r\nno colon\r\nPUT /a HTTP/1.1\r\n", "PUT /a HTTP/1.1\r\n"),
        ] {
            let (skipped, left) = skip(Skip::head(100), head);
            assert_eq!((skipped, left.as_str()), (Skipped::All, rest), "{head}");
        }
        for unclear in [
            "Content-Length: 1\r\nContent-Length: 2",
            "Content-Length: 0\r\nContent-Length: 2",
            "Content-Length: x",
            "Transfer-Encoding: gzip",
        ] {
            assert_eq!(skip(Skip::head(100), &format!("x\r\n{unclear}\r\n\r\n")).0, Skipped::Lost);
        }
        let may_be_unsent = "x\r\nExpect: 100-continue\r\nContent-Length: 1\r\n\r\n";
        assert_eq!(skip(Skip::head(100), may_be_unsent).0, Skipped::Lost);
    }

    #[test]
    fn long_lines_are_not_stored() {
        let mut skip = Skip::head(100);
        let mut input = Vec::new();
        for _ in 0..1000 {
            input.extend_from_slice(&[b'x'; 10]);
            assert_eq!(skip.advance(&mut input), Skipped::NeedMore);
            assert!(input.len() < 100);
        }
        input.extend_from_slice(b"\n\nGET");
        assert_eq!((skip.advance(&mut input), input.as_slice()), (Skipped::All, &b"GET"[..]));
    }
}
