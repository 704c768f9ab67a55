//! The head of a request: what it wants, and the few headers that matter here.

use super::{MAX_BODY, MAX_HEADERS, Response};
use crate::store::Format;

/// What a request wants done.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Method {
    Get,
    /// Not allowed either, and its answer has no body, ever.
    Head,
    Put,
    /// Anything else: there is nothing here to do it with.
    Other,
}

/// A request without its body.
#[derive(Debug, PartialEq, Eq)]
pub(crate) struct Head {
    pub(crate) method: Method,
    /// The target's path, without host and query.
    pub(crate) path: String,
    /// The form that `Accept` asks for.
    pub(crate) format: Format,
    /// The token shown.
    pub(crate) token: Option<Vec<u8>>,
    /// The life that a token is asked for, and the name of the header that does it.
    pub(crate) ttl: Option<(TtlHeader, Vec<u8>)>,
    /// Whether it came through a proxy.
    pub(crate) is_forwarded: bool,
    /// Whether the connection stays open after the answer.
    pub(crate) keep_alive: bool,
    /// Whether it is HTTP/1.0.
    pub(crate) is_http10: bool,
    /// How many bytes of body follow.
    pub(crate) body_len: u64,
}

/// By which of its names a request asks for a token's life; its answer uses the same.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum TtlHeader {
    Own,
    Ec2,
}

impl TtlHeader {
    pub(crate) fn name(self) -> &'static str {
        match self {
            TtlHeader::Own => "X-metadata-token-ttl-seconds",
            TtlHeader::Ec2 => "X-aws-ec2-metadata-token-ttl-seconds",
        }
    }
}

const TOKEN_HEADERS: [&str; 2] = ["X-metadata-token", "X-aws-ec2-metadata-token"];

/// The head at the beginning of `input`, and how long it is; `None` if it is not whole. An error is the answer after which
/// the connection closes.
pub(super) fn parse(input: &[u8]) -> Result<Option<(usize, Head)>, Response> {
    let mut headers = [httparse::EMPTY_HEADER; MAX_HEADERS];
    let mut request = httparse::Request::new(&mut headers);
    let len = match request.parse(input) {
        Ok(httparse::Status::Complete(len)) => len,
        Ok(httparse::Status::Partial) => return Ok(None),
        Err(httparse::Error::TooManyHeaders) => {
            return Err(Response::text(431, &format!("A request has at most {MAX_HEADERS} headers.")));
        }
        Err(error) => return Err(Response::text(400, &format!("This is no HTTP request: {error}."))),
    };
    let is_http10 = request.version == Some(0);
    let mut head = Head {
        method: match request.method {
            Some("GET") => Method::Get,
            Some("HEAD") => Method::Head,
            Some("PUT") => Method::Put,
            _ => Method::Other,
        },
        path: path_of(request.path.unwrap_or_default())?.to_owned(),
        format: Format::Text,
        token: None,
        ttl: None,
        is_forwarded: false,
        keep_alive: !is_http10,
        is_http10,
        body_len: 0,
    };
    for header in request.headers.iter() {
        head.read(header)?;
    }
    Ok(Some((len, head)))
}

impl Head {
    fn read(&mut self, header: &httparse::Header<'_>) -> Result<(), Response> {
        let is = |name: &str| header.name.eq_ignore_ascii_case(name);
        let value = header.value.trim_ascii();
        if is("Accept") {
            self.format = accepted(value);
        } else if TOKEN_HEADERS.into_iter().any(is) {
            self.token = Some(value.to_vec());
        } else if let Some(name) = [TtlHeader::Own, TtlHeader::Ec2].into_iter().find(|ttl| is(ttl.name())) {
            self.ttl = Some((name, value.to_vec()));
        } else if is("X-Forwarded-For") {
            self.is_forwarded = true;
        } else if is("Connection") {
            for word in value.split(|&byte| byte == b',').map(<[u8]>::trim_ascii) {
                if word.eq_ignore_ascii_case(b"close") {
                    self.keep_alive = false;
                } else if word.eq_ignore_ascii_case(b"keep-alive") && self.is_http10 {
                    self.keep_alive = true;
                }
            }
        } else if is("Content-Length") {
            let len = decimal(value)
                .ok_or_else(|| Response::text(400, "Content-Length is not one decimal number."))?;
            if len > MAX_BODY {
                return Err(Response::text(413, "No request to this service has a body."));
            }
            if self.body_len != 0 && self.body_len != len {
                return Err(Response::text(400, "Content-Length is there twice."));
            }
            self.body_len = len;
        } else if is("Transfer-Encoding") {
            return Err(Response::text(400, "No request to this service has a body."));
        } else if is("Expect") {
            // It is answered at once, and nobody knows then whether its body follows.
            self.keep_alive = false;
        }
        Ok(())
    }
}

/// A number written in decimal digits and nothing else.
pub(crate) fn decimal(text: &[u8]) -> Option<u64> {
    // `parse` would take a sign.
    text.iter().all(u8::is_ascii_digit).then(|| str::from_utf8(text).ok()?.parse().ok())?
}

/// The path of a request's target, of `http://host/path?query` that is `/path`.
fn path_of(target: &str) -> Result<&str, Response> {
    let path = match target.strip_prefix("http://") {
        Some(rest) => rest.find('/').map_or("/", |at| &rest[at..]),
        None => target,
    };
    if !path.starts_with('/') {
        return Err(Response::text(400, "Invalid URI."));
    }
    Ok(path.split(['?', '#']).next().unwrap_or_default())
}

/// What an `Accept` header asks for: JSON where it is named and text is not wanted more (RFC 9110, 12.5.1).
fn accepted(value: &[u8]) -> Format {
    let mut wanted = [0_u16; 2];
    for range in value.split(|&byte| byte == b',') {
        let mut parts = range.split(|&byte| byte == b';').map(<[u8]>::trim_ascii);
        let name = parts.next().unwrap_or_default().to_ascii_lowercase();
        let quality = parts.find_map(|part| part.strip_prefix(b"q=").map(thousandths)).unwrap_or(1000);
        match name.as_slice() {
            b"application/json" => wanted[0] = quality,
            b"text/plain" => wanted[1] = quality,
            _ => {}
        }
    }
    if wanted[0] > 0 && wanted[0] >= wanted[1] { Format::Json } else { Format::Text }
}

/// A quality between 0 and 1, in thousandths; what is no such number counts as 0.
fn thousandths(text: &[u8]) -> u16 {
    let number = str::from_utf8(text).ok().and_then(|text| text.parse::<f32>().ok()).unwrap_or(0.0);
    // A float becomes an integer by saturating; NaN becomes 0.
    #[expect(clippy::cast_sign_loss, reason = "clamped")]
    let thousandths = (number.clamp(0.0, 1.0) * 1000.0) as u16;
    thousandths
}

#[cfg(test)]
mod tests {
    use super::*;

    fn head(text: &str) -> Head {
        let (len, head) = parse(text.as_bytes()).unwrap().unwrap();
        assert_eq!(len, text.len());
        head
    }

    fn with(header: &str) -> Head {
        head(&format!("GET / HTTP/1.1\r\n{header}\r\n\r\n"))
    }

    fn refused(text: &str) -> u16 {
        parse(text.as_bytes()).unwrap_err().status()
    }

    #[test]
    fn a_request_has_a_method_and_a_path() {
        for (line, method, path) in [
            ("GET /a/b HTTP/1.1", Method::Get, "/a/b"),
            ("PUT /latest/api/token HTTP/1.1", Method::Put, "/latest/api/token"),
            ("POST / HTTP/1.0", Method::Other, "/"),
            ("HEAD / HTTP/1.1", Method::Head, "/"),
            ("GET http://169.254.169.254/a?b=/c HTTP/1.1", Method::Get, "/a"),
            ("GET http://169.254.169.254 HTTP/1.1", Method::Get, "/"),
        ] {
            let head = head(&format!("{line}\r\n\r\n"));
            assert_eq!((head.method, head.path.as_str()), (method, path), "{line}");
        }
    }

    #[test]
    fn the_form_is_the_one_wanted_most() {
        for (accept, format) in [
            ("application/json", Format::Json),
            ("Application/JSON; charset=utf-8", Format::Json),
            ("text/plain, application/json", Format::Json),
            ("text/plain, application/json;q=0.5", Format::Text),
            ("application/json;q=0", Format::Text),
            ("application/json;q=x", Format::Text),
            ("application/json;q=NaN", Format::Text),
            ("text/plain", Format::Text),
            ("*/*", Format::Text),
            ("", Format::Text),
        ] {
            assert_eq!(with(&format!("Accept: {accept}")).format, format, "{accept}");
        }
    }

    #[test]
    fn tokens_and_their_lives_go_by_two_names() {
        assert_eq!(with("x-metadata-token: abc").token.as_deref(), Some(&b"abc"[..]));
        assert_eq!(with("X-aws-ec2-metadata-token:abc ").token.as_deref(), Some(&b"abc"[..]));
        assert_eq!(with("X-Metadata-Token-TTL-Seconds: 60").ttl, Some((TtlHeader::Own, b"60".to_vec())));
        assert_eq!(
            with("X-aws-ec2-metadata-token-ttl-seconds: 6").ttl,
            Some((TtlHeader::Ec2, b"6".to_vec()))
        );
    }

    #[test]
    fn a_connection_stays_as_version_and_headers_say() {
        for (text, stays) in [
            ("GET / HTTP/1.1\r\n\r\n", true),
            ("GET / HTTP/1.1\r\nConnection: Close\r\n\r\n", false),
            ("GET / HTTP/1.1\r\nConnection: close\r\nConnection: keep-alive\r\n\r\n", false),
            ("GET / HTTP/1.0\r\n\r\n", false),
            ("GET / HTTP/1.0\r\nConnection: keep-alive\r\n\r\n", true),
            ("PUT / HTTP/1.1\r\nExpect: 100-continue\r\nContent-Length: 5\r\n\r\n", false),
        ] {
            assert_eq!(head(text).keep_alive, stays, "{text}");
        }
    }

    #[test]
    fn what_has_no_certain_meaning_is_refused() {
        for (text, status) in [
            ("hello\r\n\r\n", 400),
            ("GET / HTTP/2.0\r\n\r\n", 400),
            ("GET a HTTP/1.1\r\n\r\n", 400),
            ("OPTIONS * HTTP/1.1\r\n\r\n", 400),
            ("PUT / HTTP/1.1\r\nContent-Length: +1\r\n\r\n", 400),
            ("PUT / HTTP/1.1\r\nContent-Length: 1\r\nContent-Length: 2\r\n\r\n", 400),
            ("PUT / HTTP/1.1\r\nTransfer-Encoding: chunked\r\n\r\n", 400),
            ("PUT / HTTP/1.1\r\nContent-Length: 65537\r\n\r\n", 413),
        ] {
            assert_eq!(refused(text), status, "{text}");
        }
        assert_eq!(refused(&format!("GET / HTTP/1.1\r\n{}\r\n", "a:b\r\n".repeat(MAX_HEADERS + 1))), 431);
    }
}
